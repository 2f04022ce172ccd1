"""Contract: the learning rate follows warm-up and schedule, decay spares vectors, and DeepSpeed's bucket is no larger
than what fills it.

The values are computed by hand. Not here: that DeepSpeed takes them (test_learner_group.py compares the metric).
"""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from trainer.optimisation import LARGEST_BUCKET, decay_groups, deepspeed_config, learning_rate
from trainer.settings import LearnerSettings, Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.CONSTANT, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.LINEAR, [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
        (Schedule.COSINE, [0.5, 1.0, 1.0, 0.8681980515, 0.55, 0.2318019485, 0.1]),
    ],
)
def test_schedule(schedule: Schedule, expected: list[float]) -> None:
    settings = LearnerSettings(lr=1.0, warmup_steps=2, schedule=schedule, min_lr_share=0.1)
    assert [learning_rate(settings, step, 6) for step in range(7)] == pytest.approx(expected)
    assert learning_rate(settings, 100, 6) == pytest.approx(expected[-1])


def test_vectors_do_not_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = decay_groups(module, 0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


@pytest.mark.parametrize(("trained", "bucket"), [(1_000, 1_000), (7_000_000_000, LARGEST_BUCKET)])
def test_the_bucket_holds_what_is_trained_up_to_a_limit(trained: int, bucket: int) -> None:
    config = deepspeed_config(LearnerSettings(), 1, trained)
    assert config["zero_optimization"]["reduce_bucket_size"] == bucket


def test_settings_name_what_is_legal() -> None:
    with pytest.raises(ValidationError, match="512 or more"):
        LearnerSettings(token_budget=256, row_tokens=512)
    with pytest.raises(ValidationError, match="betas"):
        LearnerSettings(betas=(0.9, 1.0))
