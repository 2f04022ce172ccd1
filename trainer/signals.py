"""What the stages read beside the members and their rewards: one record, so that own stages see the same.

A field is None where no stage of the recipe asks for it; asking for one that is absent is a mistake of the loop.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from trainer.gate import RankerScores
from trainer.list_signals import ListSignals


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Whole-batch tensors in the order of the members."""

    hit_PG: Tensor | None = None
    """bool: the member is the ground truth item."""
    logp_PGT: Tensor | None = None
    """Learner's renormalised log-probabilities before the update."""
    engine_logp_PGT: Tensor | None = None
    """The engine's, of the rollouts."""
    certainty_PGT: Tensor | None = None
    """KL(uniform || policy) over the legal set of each token."""
    choices_PGT: Tensor | None = None
    """Number of legal continuations of each token."""
    part_PG: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Unweighted rewards by source, for the GDPO order."""
    part_weight: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight of each source."""
    feedback_weight: float = 1.0
    """Weight of the feedback rewards."""
    ranker: RankerScores | None = None
    """Raw ranker scores of rollouts, ground truth and cross-negatives."""
    truth_logp_P: Tensor | None = None
    """Log-probability of the ground truth (per token with the gate's length_norm), -inf where it is not legal."""
    matched_PG: Tensor | None = None
    """bool: the member is the exposed item of its row's feedback."""
    formatted_PG: Tensor | None = None
    """bool: the member is an item of the catalogue."""
    responded_P: Tensor | None = None
    """bool: the exposed item had a response."""
    anchor_logp0_P: Tensor | None = None
    """Logged log-propensity of the exposed item."""
    lists: ListSignals | None = None
    """Credit of ranked lists."""
    gain_variance_PG: Tensor | None = None
    """Variance of the gain of each single item, 0 where it was observed."""

    def take_members(self, order: Tensor) -> Signals:
        """The signals with the members in another order."""

        def taken(name: str, value: object) -> object:
            if isinstance(value, Tensor) and name.endswith(("_PG", "_PGT")):
                return value[:, order]
            if isinstance(value, RankerScores):
                return value._replace(rollout_PG=value.rollout_PG[:, order])
            if isinstance(value, ListSignals):
                return value.take_members(order)
            if isinstance(value, dict) and name.endswith("_PG"):
                return {key: part[:, order] for key, part in value.items()}
            return value

        fields = {field.name: taken(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]


def needed(value: Tensor | None, name: str) -> Tensor:
    """The signal, or a mistake of the caller: the recipe has a stage that reads it.

    Raises:
        ValueError: it is absent.
    """
    if value is None:
        raise ValueError(f"a stage of this objective reads {name}, which the loop did not provide")
    return value
