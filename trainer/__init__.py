"""Tree batches, objective stages, learners, loop, SFT, ranker training, evaluation, checkpoints."""
