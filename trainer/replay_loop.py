"""Training on dumped groups (`--train-only`): the loop without engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.errors import RequestError
from data.records import Groups
from reward.scoring import reward_metrics
from trainer.collection import Batch
from trainer.group_dump import dumped_steps, read_step, step_path
from trainer.loop import RlLoop


@dataclasses.dataclass(kw_only=True)
class ReplayLoop(RlLoop):
    """Trains on one dump per step, in their order."""

    folder: Path
    catalogue_digest: str
    pushes_every_step = False
    checks_gap = False
    """The groups come from the dump's weights, so the gap is staleness and no alarm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = dumped_steps(self.folder)

    def epochs(self) -> float:
        """Passes over the dump so far."""
        return self.state.step / len(self._steps)

    def finished(self) -> str | None:
        """A dump is used once."""
        return super().finished() or ("dump_ended" if self.state.step >= len(self._steps) else None)

    def roll(self, step: int) -> Callable[[], Batch]:
        """The groups of the next dump."""
        number = self._steps[step - 1]
        prompts, scored = read_step(self.folder, number, self.catalogue_digest)
        self._check_fits(step_path(self.folder, number), scored.groups)
        metrics = reward_metrics(scored) | {"epoch": self.epochs(), "prompts": float(len(prompts))}
        return partial(Batch, prompts, scored, scored.failure_P[:0], metrics, self.epochs())

    def _check_fits(self, path: Path, groups: Groups) -> None:
        """Refuse groups that the job's settings would train as something else than they are.

        Raises:
            RequestError: another temperature, or groups that the minibatches do not divide.
        """
        asked, found = self.job.rollout.temperature, groups.spec.temperature
        if found != asked:
            raise RequestError("rollout.temperature", asked, f"{found}, with which {path} was decoded")
        size, parts = groups.shape[0], self.job.objective.minibatches
        if size % parts:
            raise RequestError("objective.minibatches", parts, f"a divisor of {size}, the groups in {path}")
