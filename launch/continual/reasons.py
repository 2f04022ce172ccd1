"""What the service says about partitions: decisions, and the reasons for them. The values are names of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Decision(StrEnum):
    """What became of a partition."""

    PROMOTED = "promoted"
    REJECTED = "rejected"
    """The guard refused the updated model."""
    SKIPPED = "skipped"
    """The partition was not used."""
    WAITING = "waiting"
    """Nothing was done yet."""


class Reason(StrEnum):
    """Why."""

    STILL_WRITTEN = "still_written"
    """Waits: no `_SUCCESS`, and no settle time is set or a file is younger than it."""
    FILES_MISSING = "files_missing"
    """Waits: files that `_SUCCESS` names are not there."""
    DAY_NOT_OVER = "day_not_over"
    """Waits: by our clock the day has not ended, which a day in the future (a clock that jumped) never does."""
    RESPONSE_WINDOW_OPEN = "response_window_open"
    """Waits: the day's last requests may still be answered."""
    EARLIER_DAY_WAITS = "earlier_day_waits"
    """Waits: an earlier day does, or is missing, and `gaps` is wait."""
    WOULD_RUN = "would_run"
    """Waits: a dry run."""
    INTERRUPTED = "interrupted"
    """Waits: asked to stop; the next start goes on."""
    EMPTY = "empty"
    """Skipped: no rows."""
    OTHER_SCHEMA = "other_schema"
    """Skipped: a file has other columns or another format."""
    DAMAGED_FILE = "damaged_file"
    """Skipped: a file cannot be read, or has another number of rows than `_SUCCESS` says."""
    TOO_MANY_BAD_ROWS = "too_many_bad_rows"
    """Skipped: more rows than `max_bad_share` have faults that a sound log does not have."""
    PROPENSITIES_DO_NOT_FIT = "propensities_do_not_fit"
    """Skipped: the mean weight of a uniform policy, at most 1 in expectation, is above `weight_limit`."""
    NOTHING_TO_TRAIN = "nothing_to_train"
    """Skipped: no usable row is left."""
    TOO_FEW_ROWS = "too_few_rows"
    """Skipped: less than an update takes; the next one trains on these rows as well."""
    NOTHING_HELD_OUT = "nothing_held_out"
    """Skipped: no usable row among the last ones, which the guard needs."""
    LATE_DAY = "late_day"
    """The day came after a later one was done; skipped where `late` is quarantine."""
    LATE_FILE = "late_file"
    """A file came after its day was done; skipped where `late` is quarantine."""
    LATE_RESPONSES = "late_responses"
    """Responses came after their day was done; rows that had none before are trained on again by the next update."""
    REWRITTEN_FILE = "rewritten_file"
    """A file changed after its day was done; skipped where `late` is quarantine."""
    VANISHED_FILE = "vanished_file"
    """A file is gone after its day was done; nothing is undone."""
    MISSING_DAY = "missing_day"
    """Days before this one are not in the log."""
    MIXED_POLICIES = "mixed_policies"
    """The rows were served by several known versions; each row's propensity is that of its own."""
    GUARD = "guard"
    """A condition of the guard does not hold."""
    GUARD_PASSED = "guard_passed"
    """Every condition of the guard holds."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """A reason with what was found, in words."""

    reason: Reason
    found: str = ""

    def __str__(self) -> str:
        return self.reason.value.replace("_", " ") + (f": {self.found}" if self.found else "")
