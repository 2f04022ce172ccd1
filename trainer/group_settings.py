"""Section `group` of an `rl` job: what joins a group beside the rollouts, and which groups are worth a step.

Source: ../shared/methods.md sections 2 (`gt_in_group`), 4 (`gt_inject`) and 6 (group builder); DAPO (Yu et al. 2025),
dynamic sampling.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from data.settings import Settings


class Refill(StrEnum):
    """What becomes of groups whose rewards are all equal, which have no gradient."""

    NONE = "none"
    """They stay: the identity."""
    OVERSAMPLE = "oversample"
    """Groups of further prompts take their places."""


class GroundTruth(StrEnum):
    """How the ground truth joins a group that lacks it, as a member with an advantage."""

    NONE = "none"
    """Not at all: the identity."""
    APPEND = "append"
    """As a further member (AdaGRPO's y* in the gradient group)."""
    INJECT = "inject"
    """In place of the last rollout, so that the group keeps its size (ReRe's add_gt)."""


class GroupSettings(Settings):
    """Builds the groups of a step."""

    refill: Refill = Refill.NONE
    """none, or oversample: groups of further prompts replace those without variance (DAPO's dynamic sampling)."""
    extra_batches: int = Field(2, ge=1, le=64)
    """Most further batches that a step rolls out for `oversample`; what they cannot replace stays."""
    ground_truth: GroundTruth = GroundTruth.NONE
    """none, append (a further member) or inject (for the last rollout), in groups that lack the ground truth."""
