"""What a cycle asks of those who know models: which rows fit, an update, and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.feedback_reading import FeedbackChecks
from launch.continual.guard import Evidence


class Interrupted(Exception):
    """The update was asked to stop; called again with the same task it goes on."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update."""

    parent: Path
    """Model folder that it starts from; it does not change."""
    feedback: Path
    """Feedback log with the rows to train on, checked already; it does not change."""
    work: Path
    """A folder for the update alone. It stays until the model is in the registry, also over a crash."""
    versions: Sequence[Path] = ()
    """Folders of all models that may have served the rows."""


class Updater(Protocol):
    """Trains and measures models."""

    def lacks(self, rows: int, responses: int) -> str:
        """What rows to train on lack for an update, in words; empty when they are enough.

        Args:
            rows: all of them.
            responses: those with a response.
        """
        ...

    def checks(self, model: Path, versions: Sequence[Path]) -> FeedbackChecks:
        """What the rows of the log must be for this model; the cycle adds the policies it knows.

        Args:
            model: folder of the served model.
            versions: folders of all models that may have served; the catalogue may have grown from one to another.
        """
        ...

    def update(self, task: Update) -> Path:
        """Train, and return the new model's folder, below `task.work`.

        A second call with the same task goes on where the first one died, or begins anew; its result is the same.

        Raises:
            Interrupted: asked to stop.
        """
        ...

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Sequence[tuple[str, float]]
    ) -> Mapping[tuple[str, float], Evidence]:
        """Measure two models on the same rows; what cannot be measured is left out.

        Args:
            candidate: model folder.
            parent: the model that it was updated from.
            held_out: feedback log that neither was trained on.
            trained: feedback log that the candidate was trained on, for measures of exposure.
            wanted: metrics and the confidences of their intervals.

        Raises:
            Interrupted: asked to stop.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the lineage keeps of the way models are made."""
        ...
