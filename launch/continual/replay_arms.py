"""What a replay compares: ways to update the model, as overrides of an ABPO recipe.

Every arm reads the log that its own model made. Arms without an anchor see the logged item as a ground truth where it
had a response, and nothing elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_NO_ANCHOR: Final = (
    "--objective.anchor.mode=none",
    "--objective.tempering.mode=none",
    "--reward.feedback=0",
    "--reward.item_match=1",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to update the model."""

    name: str
    told: str
    """In words, for reports."""
    updates: bool = True
    overrides: tuple[str, ...] = ()
    """Keys of the recipe that make it this arm."""


ARMS: Final = {
    arm.name: arm
    for arm in (
        Arm(name="none", told="no update", updates=False),
        Arm(
            name="sft",
            told="SFT on positives",
            overrides=(
                *_NO_ANCHOR,
                "--objective.nll_weight=1",
                "--objective.policy_weight=0",
                "--objective.beta=0",
                "--rollout.width=2",
            ),
        ),
        Arm(name="grpo", told="GRPO without anchor", overrides=_NO_ANCHOR),
        Arm(name="abpo", told="ABPO"),
        Arm(
            name="abpo-no-anchor",
            told="ABPO, the logged item is no member",
            overrides=("--objective.anchor.mode=feedback_only",),
        ),
        Arm(name="abpo-no-snips", told="ABPO without SNIPS", overrides=("--objective.anchor.snips=none",)),
        Arm(
            name="abpo-no-tempering",
            told="ABPO without tempering",
            overrides=("--objective.tempering.mode=none",),
        ),
    )
}
