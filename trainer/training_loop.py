"""What every training loop does between its steps: evaluate, select, log, keep checkpoints, stop.

A loop of a kind says how a step is taken (`loop.RlLoop`, `sft.SftLoop`); this is the frame around it. Step k turns the
weights of step k-1 into those of step k; step 0 is the initial model, a candidate in model selection.
"""

from __future__ import annotations

import abc
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from data.faults import fault_point
from trainer.evaluation import Evaluation
from trainer.jobs import PolicyJobSettings
from trainer.list_evaluation import ListEvaluation
from trainer.phases import PhaseTimer
from trainer.run_state import RunState, limit_met

Metrics = dict[str, float]


class Host(Protocol):
    """What the loop leaves to its surroundings (`trainer.policy_run`)."""

    def push(self, version: int) -> Metrics:
        """Take the learners' weights to the fleet; raises when a check fails."""
        ...

    def rest_engines(self) -> Metrics:
        """The learners begin: engines that share cards with them sleep until the next push."""
        ...

    def evaluate(self, step: int) -> Evaluation | ListEvaluation | None:
        """Evaluate the fleet's present weights on the validation rows; none without a fleet."""
        ...

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        """Write the checkpoint of a state; `keep` adds what the loop has besides, given the folder."""
        ...

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step."""
        ...

    def interrupted(self) -> bool:
        """True once somebody asked the run to end."""
        ...


@dataclasses.dataclass(kw_only=True)
class TrainingLoop(abc.ABC):
    """Takes a job from a state to its end."""

    settings: PolicyJobSettings
    host: Host
    state: RunState
    resumed: bool = False
    """Whether `state` comes from a checkpoint; that of step 0 is one as well."""
    timer: PhaseTimer = dataclasses.field(default_factory=PhaseTimer)
    _saved: int | None = None

    @abc.abstractmethod
    def step(self) -> Metrics:
        """Take one step: train, move `state` on, and return the metrics."""

    @abc.abstractmethod
    def epochs(self) -> float:
        """Passes over the training rows so far."""

    @property
    @abc.abstractmethod
    def pushes_every_step(self) -> bool:
        """Whether the fleet already holds the weights of `state.step` when a step ends."""

    def run(self) -> str:
        """Step until a limit is met; returns its name, or `interrupted`."""
        try:
            self._begin()
            # What is there by now stays. A full collection that looks at it takes 0.3 s, in which no engine gets work.
            gc.freeze()
            while not self.host.interrupted() and self.finished() is None:
                metrics = self.step()
                self._settle(metrics)
            if self._saved != self.state.step:
                self._save()
        finally:
            gc.unfreeze()
            self.close()
        return self.finished() or "interrupted"

    @abc.abstractmethod
    def keep(self, folder: Path) -> None:
        """Write what belongs to the checkpoint of `state` besides weights, optimiser and `state` itself."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what the loop began beside its steps."""

    def save_last_good(self) -> None:
        """Keep the present state before the run fails, unless it is kept already."""
        if self._saved != self.state.step:
            self._save()

    def _begin(self) -> None:
        """Bring the fleet to the learners' weights; evaluate and keep the initial model, unless that is done."""
        if self.resumed:
            self._saved = self.state.step
            if self.pushes_every_step:
                self.host.push(self.state.step)
            return
        with self.timer.phase("push"):
            metrics = self.host.push(0)
        self._settle(metrics)

    def finished(self) -> str | None:
        """The limit that was met; none while the job goes on."""
        limits, stopping = self.settings.limits, self.settings.early_stopping
        return limit_met(self.state, epochs=self.epochs(), limits=limits, early_stopping=stopping)

    def _settle(self, metrics: Metrics) -> None:
        """End a step: evaluate when it is due, write its metrics, keep a checkpoint when one is due."""
        # The time of the step counts before it is asked whether the step was the last one.
        times = self._time_spent()
        evaluation_due = self._evaluation_due()
        if evaluation_due:
            metrics |= self._evaluate()
            evaluating = self._time_spent()
            times = {name: times.get(name, 0.0) + evaluating.get(name, 0.0) for name in times | evaluating}
        self.host.log(self.state.step, metrics | times)
        fault_point("step")
        if evaluation_due or self.state.step % self.settings.checkpoints.interval == 0:
            self._save()

    def _time_spent(self) -> dict[str, float]:
        """Seconds by phase since the last call, which the run has then spent."""
        times = self.timer.take()
        self.state = dataclasses.replace(self.state, elapsed_s=self.state.elapsed_s + times["time/step"])
        return times

    def _evaluation_due(self) -> bool:
        every = self.settings.evaluation.every
        first_or_last = self.state.step == 0 or self.finished() is not None
        return first_or_last or bool(every and self.state.step % every == 0)

    def _evaluate(self) -> Metrics:
        metrics: Metrics = {}
        if self.state.step and not self.pushes_every_step:
            with self.timer.phase("push"):
                metrics |= self.host.push(self.state.step)
        with self.timer.phase("evaluate"):
            evaluation = self.host.evaluate(self.state.step)
        if evaluation is None:
            return metrics
        score = evaluation.items.values[self.settings.evaluation.metric]
        self.state = self.state.evaluated(score, self.settings.early_stopping.min_improvement)
        return metrics | evaluation.metrics()

    def _save(self) -> None:
        with self.timer.phase("checkpoint"):
            self.host.save(self.state, self.keep)
        self._saved = self.state.step
