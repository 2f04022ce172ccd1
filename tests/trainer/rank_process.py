"""One rank of several in a process of its own, for tests without Ray: python -m tests.trainer.rank_process RANK.

Takes jobs from standard input, one a line, until it ends (`rank_pair`). Runs the tasks of a job one after the other,
each with a fresh learner in the same process group, writes what the rank sees to `OUT/NAME-RANK.npz`, and says `done`.
Importable, so that a single rank can do the same inside the test process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.trainer.learner_world import make_completions, make_constraint, make_inputs
from trainer.learner import Learner
from trainer.learner_state import MASTER, MOMENTS
from trainer.ranks import RankPlace
from trainer.settings import LearnerSettings


def sft_rows(seed: int = 0) -> list[tuple[Any, Any]]:
    """Sequences of several lengths with marks."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(4, 44, n).astype(np.int32), rng.random(n) < 0.7) for n in (9, 30, 14, 22, 5, 31, 18)]


def run_task(task: dict[str, Any], place: RankPlace) -> dict[str, Any]:
    """Run a task; arrays by name: masters and moments, scores, losses of each step.

    Keys of a task: `settings`, `model`, `steps` (list of "update" or "sft"), and perhaps `load`, `save`, `seed`.
    """
    learner = Learner(LearnerSettings(**task["settings"]), Path(task["model"]), make_constraint(), place=place)
    if "load" in task:
        learner.load(Path(task["load"]))
    results: dict[str, Any] = {"norm": [], "loss": [], "step": learner.step}
    for number, kind in enumerate(task["steps"]):
        seed = task.get("seed", 0) + number
        if kind == "sft":
            statistics = learner.update_sft(sft_rows(seed))
        else:
            completions = make_completions(seed=seed)
            statistics = learner.update(completions, make_inputs(completions, seed=seed))
        results["loss"].append(statistics["loss"])
        results["norm"].append(learner.step_metrics()["grad_norm"])
    for name, parameter in learner._trained.items():
        for kind in (MASTER, *MOMENTS):
            results[f"{kind}/{name}"] = learner._state.get(parameter, kind).cpu().numpy()
    for name, value in learner.whole_parameters():
        results[f"weight/{name}"] = value.float().cpu().numpy()
    scores = learner.score(make_completions(seed=9), 0.7)
    results |= {"logp": scores.logp_PGT, "full": scores.full_logp_PGT}
    if "save" in task:
        learner.save(Path(task["save"]))
    if "export" in task:
        learner.export_hf(Path(task["export"]))
    learner.close()
    return results


def main() -> None:
    """Run the tasks of all jobs as one rank."""
    rank = int(sys.argv[1])
    # What libraries print is no answer: it goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        place = RankPlace(rank=rank, ranks=job["ranks"], port=job["port"])
        for name, task in job["tasks"].items():
            np.savez(Path(job["out"]) / f"{name}-{rank}.npz", **run_task(task, place))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
