"""`windlass bench stages`: what the objective costs of a learner's step, with every stage on and with none.

The loop of a job (`trainer.loop.RlLoop`) with the reference engine takes steps, and its own phase timer tells the
seconds. A learner's step is score, objective and update; rollouts, rewards and pushes are not part of it. There is no
reference model, which would make the step longer and the share smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Final

import numpy as np
import torch
import tyro
from pydantic import Field
from torch import Tensor

from data.dataset import Samples
from data.errors import RequestError
from data.feedback import Anchors
from data.records import FloatArray, IntArray
from launch.bench.frame import Local, Way, answer, paired
from launch.bench.models import BenchModel, bench_model
from launch.bench.reward import scorer
from launch.bench.settings import Device
from launch.bench.step import step_work
from launch.bench.step_job import StepBench, random_samples
from trainer.loop import RlLoop
from trainer.members import Members
from trainer.signals import Signals

LEARNER: Final = ("score", "objective", "update")
"""Phases of a learner's step."""
EVERY_STAGE: Final[dict[str, Any]] = {
    "feedback": "bench",
    "reward": {"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0, "ranker": "bench"},
    "objective": {
        "nll_weight": 1.0,
        "entropy_weight": 0.01,
        "window": {"kind": "soft", "anchor_rank": 1, "mass": 1.5, "negatives": "sample"},
        "gate": {"kind": "adagrpo"},
        "anchor": {"mode": "append"},
        "tempering": {"mode": "soften_confident"},
        "truncation": {"level": "sequence"},
        "stages": [f"{__name__}:unchanged"],
        "max_distrust": 3,
    },
}
"""All stages that go together."""


class StagesBench(StepBench):
    """Arguments of `windlass bench stages`; `--group` is the number of completions, `--width` changes nothing."""

    prompts: int = Field(64, ge=2)
    """Prompts of a step."""
    group: int = Field(16, ge=4, le=1024)
    """Completions per prompt."""


def stages_command(
    settings: Annotated[StagesBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time the objective within a learner's step, with every stage on and with none, in turns."""
    settings.check_device(Device.CPU)
    torch.set_num_threads(settings.threads)
    with bench_model(settings) as model, ExitStack() as stack:
        if settings.group > model.catalogue.n_items:
            raise RequestError("--group", settings.group, f"4 to {model.catalogue.n_items}, the items of the catalogue")
        steps = {
            name: Steps(settings, model, sections, stack) for name, sections in (("ours", EVERY_STAGE), ("plain", {}))
        }
        ways = {name: _way(taken, settings, model) for name, taken in steps.items()}
        seconds = paired(ways, settings.repeats)
    phases = {name: taken.phases() for name, taken in steps.items()}
    return answer(
        settings,
        ways,
        seconds,
        checked=all(taken.sound() for taken in steps.values()),
        objective_share={name: found["objective_share"] for name, found in phases.items()},
        phases=phases,
        model=model.record(),
    )


class Steps:
    """Steps of one job, with the seconds of their phases and their metrics."""

    def __init__(self, settings: StagesBench, model: BenchModel, sections: Mapping[str, Any], stack: ExitStack) -> None:
        from launch.bench.local_loop import local_loop

        samples = random_samples(settings, model.catalogue)
        rollout = {"engine": "reference", "decode": "sample"}
        job = settings.job(model.levels, model.config.max_position_embeddings, rollout=rollout, **sections)
        feedback = random_anchors(samples, settings.seed) if job.feedback else None
        rewards = scorer(job.reward, HashRanker(), job.reward.chunk) if job.reward.ranker else None
        entered = local_loop(job, model.hf_dir, model.catalogue, samples, rewards=rewards, feedback=feedback)
        self._settings = settings
        self._loop: RlLoop = stack.enter_context(entered)[0]
        self._times: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def take(self) -> None:
        """Take one step."""
        self.metrics.append(self._loop.step())
        self._times.append(self._loop.timer.take())

    def phases(self) -> dict[str, float]:
        """Median seconds of each phase behind the warm-up, and the objective's share of the learner's step."""
        steps = self._times[1:]
        names = [name for name in steps[0] if name != "time/step"]
        shares = [step["time/objective"] / sum(step[f"time/{phase}"] for phase in LEARNER) for step in steps]
        medians = {name.removeprefix("time/"): statistics.median(step[name] for step in steps) for name in names}
        return {**medians, "objective_share": statistics.median(shares)}

    def sound(self) -> bool:
        """Whether every step trained on all groups and told what its stages did."""
        job, found = self._loop.job, self.metrics[-1]
        wanted = {"groups/live_share", "advantage/sum"}
        if job.feedback:
            wanted |= {"gate/tail", "anchor/effective_size", "tempering/mean", "window/mass/1", "truncation/mean"}
        members = self._settings.group + bool(job.feedback)
        return wanted <= found.keys() and found["groups/members"] == members

    def told(self) -> dict[str, Any]:
        """What the job was set to."""
        return self._loop.job.model_dump(mode="json", include={"learner", "rollout", "objective", "reward"})


def _way(steps: Steps, settings: StagesBench, model: BenchModel) -> Way:
    local = Local(steps.take)
    return Way(
        time=local.time,
        tokens=step_work(settings, model)[0],
        peak_mib=local.peak_mib,
        settings=steps.told(),
    )


class HashRanker:
    """Scores of a history and an item without a network: the ranker's time is not the objective's."""

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        pairs = zip(histories, candidates, strict=True)
        return [((items * 7919 + int(history.sum())) % 1009).astype(np.float32) for history, items in pairs]


def random_anchors(samples: Samples, seed: int) -> Anchors:
    """Every target as the exposed item of its request, every other one with a response."""
    random = np.random.default_rng([seed, 1])
    rows = len(samples)
    return Anchors(
        item_N=samples.target_N,
        response_N=(np.arange(rows) % 2).astype(np.float32),
        logp0_N=(-10 * random.random(rows)).astype(np.float32),
        policy_version_N=np.full(rows, "bench"),
    )


def unchanged(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """An own stage that changes nothing, called as any other."""
    return torch.ones_like(advantage_PG)
