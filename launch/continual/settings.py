"""Settings of the service, as its recipe gives them."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from data.settings import Settings
from launch.continual.guard import GuardSettings
from launch.continual.log_folder import CompletenessSettings
from launch.continual.rows import RowSettings


class LateRule(StrEnum):
    """What becomes of files and days that come or change after a day was done."""

    APPLY = "apply"
    """Their requests that were not seen before are a partition of their own."""
    QUARANTINE = "quarantine"
    """They are recorded with the reason and not used."""


class CorrectionRule(StrEnum):
    """What becomes of requests that were trained on without a response, and have one now."""

    RETRAIN = "retrain"
    """The next update trains on them again, with their response and their propensity."""
    RECORD = "record"
    """They are counted."""


class ReplaySettings(Settings):
    """Rows of earlier updates that join an update."""

    share: float = Field(0.0, ge=0, le=10)
    """Rows of earlier updates for each row of this one; 0 keeps and joins none."""
    days: int = Field(7, ge=1)
    """Days before a partition from which they are drawn, of promoted updates."""
    seed: int = Field(0, ge=0)
    """Of the draw, which also depends on the request and on the pass."""


class GapRule(StrEnum):
    """What becomes of a day while an earlier one waits or is missing."""

    PROCEED = "proceed"
    WAIT = "wait"


class RejectRule(StrEnum):
    """What becomes of the rows of a rejected update."""

    SKIP = "skip"
    """They are never trained on."""
    ACCUMULATE = "accumulate"
    """The next update trains on them as well, held-out rows included."""


class PartitionSettings(Settings):
    """How partitions are found, checked and followed."""

    complete: CompletenessSettings = CompletenessSettings()
    """When a day is complete."""
    rows: RowSettings = RowSettings()
    """Which rows are used."""
    late: LateRule = LateRule.APPLY
    """apply or quarantine: files and days that come, or change, after a day was done."""
    late_responses: CorrectionRule = CorrectionRule.RETRAIN
    """retrain or record: requests that were trained on without a response and have one now."""
    late_responses_every_s: float = Field(86_400.0, ge=0)
    """Seconds between two looks at the late responses of a day."""
    replay: ReplaySettings = ReplaySettings()
    """Rows of earlier updates that join an update."""
    gaps: GapRule = GapRule.PROCEED
    """proceed or wait: a day while an earlier one waits or is missing."""
    on_reject: RejectRule = RejectRule.SKIP
    """skip or accumulate: the rows of a rejected update."""
    duplicate_days: int = Field(30, ge=0)
    """Days around a partition whose request ids are remembered."""
    policies: tuple[str, ...] = ()
    """Policy versions that are trusted beside those of the registry."""


class ServiceSettings(PartitionSettings):
    """Everything that a cycle needs but the model."""

    guard: GuardSettings = GuardSettings()
    """What must hold for a promotion."""
