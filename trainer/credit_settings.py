"""The `objective.credit` section: what a position of a ranked list is credited with.

Source: methods.md section 3 (FlexRec), section 6 (`beam_as_list`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings
from reward.swap_credit import SwapForm
from trainer.uncertainty import Uncertainty, VarianceKind


class CreditKind(StrEnum):
    """What the credit of a completion is shared among."""

    NONE = "none"
    """A completion has its reward: the identity."""
    SEQUENCE = "sequence"
    """Ranked lists, one reward per list: list-level GRPO."""
    ITEMS = "items"
    """Ranked lists, credit per position on the tokens of its item; the reward of the list on the format tokens."""
    BEAM_AS_LIST = "beam_as_list"
    """The beam of a prompt, read as one list of single items; a completion has the credit of its position."""


class ItemNorm(StrEnum):
    """What the credit of a position is compared with."""

    PER_RANK = "per_rank"
    """The credit of the same position in the other lists of the group. Under causal credit the last gets zero."""
    POOLED = "pooled"
    """The credit of all positions of the group."""


class Credit(Settings):
    """Credit for the positions of ranked lists."""

    kind: CreditKind = CreditKind.NONE
    """none, sequence (list-level GRPO), items (credit per position) or beam_as_list (the beam is the list)."""
    form: SwapForm = SwapForm.CAUSAL
    """causal or all_pairs (counterfactual swaps), independent (own part of the NDCG), suffix_dcg (Rank-GRPO)."""
    item_norm: ItemNorm = ItemNorm.PER_RANK
    """per_rank or pooled; beam_as_list has one completion per position and is always pooled."""
    ndcg_weight: float = Field(0.0, ge=0, le=100.0)
    """Weight of the NDCG in the reward of a whole list, beside 1 for a permutation of the candidates."""
    uncertainty: Uncertainty = Uncertainty()
    """Smaller steps where the gains are uncertain."""

    @property
    def of_lists(self) -> bool:
        """Whether a completion is a ranked list."""
        return self.kind in (CreditKind.SEQUENCE, CreditKind.ITEMS)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        by_position = self.kind in (CreditKind.ITEMS, CreditKind.BEAM_AS_LIST)
        if self.uncertainty.variance is not VarianceKind.OFF and not by_position:
            raise RequestError(
                "objective.credit.uncertainty.variance",
                self.uncertainty.variance.value,
                f"off with objective.credit.kind {self.kind.value}: uncertainty scales the credit of positions",
            )
        if self.ndcg_weight and not self.of_lists:
            raise RequestError(
                "objective.credit.ndcg_weight",
                self.ndcg_weight,
                f"0 with objective.credit.kind {self.kind.value}: only whole lists have an NDCG",
            )
        return self
