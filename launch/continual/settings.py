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
