"""When failed rewards stop a run: a pure state machine over the steps.

A failed group is masked and counted, never scored as zero. A step is a failed step when any of its groups failed. The
run stops, after a checkpoint, at a step in which more than `max_failed_share` of the groups failed, or at the
`max_failed_steps`-th failed step in a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.records import RewardFailure
from reward.settings import RewardSettings


@dataclass(frozen=True, kw_only=True)
class FailureVerdict:
    """What the tracker says about a step."""

    failed_share: float
    """Share of the step's groups without a reward."""
    stop: bool
    """True: write a checkpoint and end the run with exit code 1."""
    message: str
    """One line for the user; empty when the run goes on."""


class FailureTracker:
    """Counts failed steps in a row."""

    def __init__(self, settings: RewardSettings) -> None:
        self.max_share = settings.max_failed_share
        self.max_steps = settings.max_failed_steps
        self.in_a_row = 0

    def observe(self, failure_P: npt.NDArray[np.str_]) -> FailureVerdict:
        """The verdict on a step with these failures (`ScoredGroups.failure_P`)."""
        reasons = Counter(str(reason) for reason in failure_P if reason != RewardFailure.NONE.value)
        failed = reasons.total()
        share = failed / max(1, len(failure_P))
        self.in_a_row = self.in_a_row + 1 if failed else 0
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        message = ""
        if share > self.max_share:
            message = (
                f"{failed} of {len(failure_P)} groups have no reward ({counts}), "
                f"more than reward.max_failed_share = {self.max_share:g}"
            )
        elif self.in_a_row >= self.max_steps:
            message = (
                f"rewards failed in {self.in_a_row} steps in a row (reward.max_failed_steps), "
                f"in this one {failed} of {len(failure_P)} groups ({counts})"
            )
        return FailureVerdict(failed_share=share, stop=bool(message), message=message)

    def state_dict(self) -> dict[str, int]:
        """State for the checkpoint."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint. After a stop the count starts anew, or no restart could ever pass."""
        count = int(state["in_a_row"])
        self.in_a_row = count if count < self.max_steps else 0
