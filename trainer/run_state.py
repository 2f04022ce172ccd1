"""What a run must remember besides weights and optimiser: step, cursor, selection, failures, time spent.

It lies in every checkpoint as `trainer_state.json`. Pure: nothing here reads a clock; time comes in from outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from data.errors import RequestError
from trainer.run_settings import EarlyStoppingSettings, LimitSettings

FORMAT: Final = 1
FILE: Final = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State between two steps."""

    step: int = 0
    """Steps that are done; the weight version that the fleet holds."""
    elapsed_s: float = 0.0
    """Wall time spent so far, over all starts."""
    best_score: float | None = None
    """Largest value of the selection metric."""
    best_step: int | None = None
    """Its step; 0 is the initial model, which is a candidate like every other."""
    evaluations_without_rise: int = 0
    risen_to: float | None = None
    """Score of the last rise that counted for early stopping; none means the best score."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """Position of the feed, with the fingerprint of its dataset; behind the batches that were collected ahead."""
    epochs: float = 0.0
    """Passes over the training rows, up to the batch of `step`."""
    failures: dict[str, Any] = field(default_factory=dict)
    """State of the reward failure tracker."""
    noise: dict[str, float] | None = None
    """The learner's own gap to float32, as measured last; none for a learner in float32."""
    anchor_log_mean: float | None = None
    """Logarithm of the moving mean of the anchors' importance weights; none before the first."""

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint that is being written."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the file of a checkpoint.

        Raises:
            RequestError: absent, damaged, or of another format version.
        """
        path = folder / FILE
        legal = "a checkpoint as windlass wrote it"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(str(path), f"cannot be read ({error})", legal) from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise RequestError(str(path), "another format", f"format {FORMAT}")
        try:
            return cls(**content)
        except TypeError as error:
            raise RequestError(str(path), f"is damaged ({error})", legal) from error

    def evaluated(self, score: float, min_improvement: float) -> Self:
        """The state after an evaluation of the current step.

        The best step is the one with the largest score, as among the checkpoints; `min_improvement` concerns patience.
        """
        best = self.best_score is None or score > self.best_score
        state = replace(self, best_score=score, best_step=self.step) if best else self
        before = self.best_score if self.risen_to is None else self.risen_to
        if before is None or score > before + min_improvement:
            return replace(state, risen_to=score, evaluations_without_rise=0)
        return replace(state, risen_to=before, evaluations_without_rise=self.evaluations_without_rise + 1)


def limit_met(
    state: RunState, *, epochs: float, limits: LimitSettings, early_stopping: EarlyStoppingSettings
) -> str | None:
    """Why the run is over, as the name of the limit that was met; none while it goes on.

    Args:
        epochs: passes over the training rows so far.
    """
    if limits.max_steps is not None and state.step >= limits.max_steps:
        return "max_steps"
    if limits.max_epochs is not None and epochs >= limits.max_epochs:
        return "max_epochs"
    if limits.max_hours is not None and state.elapsed_s >= limits.max_hours * 3600:
        return "max_hours"
    if early_stopping.patience and state.evaluations_without_rise >= early_stopping.patience:
        return "early_stopping"
    return None
