"""Members of a batch of groups: the first argument of every objective stage.

Suffixes: `_P` prompt, `_G` group member, `_T` token of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.records import NO_SEGMENT, BoolArray, Finish, Kind, LongArray, ScoredGroups
from trainer.trees import Completions

KIND_CODE = {
    Kind.ROLLOUT: 0,
    Kind.ANCHOR: 1,
    Kind.GROUND_TRUTH: 2,
    Kind.DEMONSTRATION: 3,
    Kind.NEGATIVE: 4,
}
"""Codes of `kind_PG`."""

PADDING = NO_SEGMENT
"""Segment of a position that holds no token."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """Which members of which groups count, what they are, and which tokens they have."""

    valid_PG: Tensor
    """bool: the slot holds a completion and its group has a reward; all else is masked and counted."""
    kind_PG: Tensor
    """int64 `KIND_CODE`; rank-based stages look at valid rollouts only."""
    segment_PGT: Tensor
    """int64: rank in the list of the token's item, `FORMAT_SEGMENT` for format tokens, `PADDING` for none."""

    @property
    def rollout_PG(self) -> Tensor:
        """bool: valid members that the policy generated."""
        return self.of_kind(Kind.ROLLOUT)

    def of_kind(self, kind: Kind) -> Tensor:
        """bool: valid members of the kind."""
        return self.valid_PG & (self.kind_PG == KIND_CODE[kind])

    def limited_to(self, mask_PG: Tensor) -> Members:
        """The same members, of which only those in `mask_PG` are valid still."""
        return Members(valid_PG=self.valid_PG & mask_PG, kind_PG=self.kind_PG, segment_PGT=self.segment_PGT)

    @property
    def token_mask_PGT(self) -> Tensor:
        """bool: tokens of valid members."""
        return (self.segment_PGT != PADDING) & self.valid_PG.unsqueeze(-1)

    @property
    def length_PG(self) -> Tensor:
        """int64: tokens of each valid member."""
        return self.token_mask_PGT.sum(-1)


def batch_members(scored: ScoredGroups, completions: Completions, extra: Sequence[Kind] = ()) -> tuple[Members, Tensor]:
    """Members of groups of single items or lists, and their rewards `[P, G]`.

    Args:
        completions: the groups' completions, with one further member each per entry of `extra`.
        extra: what the last members are; they have no reward of the configured sources (their columns are 0). A
            ground truth needs none, so it stays in groups whose rewards failed; anchors and negatives leave with
            their group.
    """
    token_mask_PGT = completions.token_mask_PGT
    given_PG = scored.groups.finish_PG == Finish.GIVEN.value
    kind_PG = np.where(given_PG, KIND_CODE[Kind.DEMONSTRATION], KIND_CODE[Kind.ROLLOUT]).astype(np.int64)
    extra_PE = np.tile(np.array([KIND_CODE[kind] for kind in extra], dtype=np.int64), (len(kind_PG), 1))
    kind_PG = np.concatenate([kind_PG, extra_PE], 1)
    needs_reward_PG = kind_PG != KIND_CODE[Kind.GROUND_TRUTH]
    valid_PG = completions.valid_PG & (scored.usable_P[:, None] | ~needs_reward_PG)
    reward_PG = torch.nn.functional.pad(torch.tensor(scored.reward_PG), (0, len(extra)))
    members = Members(
        valid_PG=torch.from_numpy(valid_PG),
        kind_PG=torch.from_numpy(kind_PG),
        segment_PGT=torch.from_numpy(np.where(token_mask_PGT, _item_ranks(scored, token_mask_PGT), PADDING)),
    )
    return members, reward_PG


def _item_ranks(scored: ScoredGroups, token_mask_PGT: BoolArray) -> LongArray:
    """Rank of the item of each token, 0 for single items."""
    rank_PGT = np.zeros(token_mask_PGT.shape, dtype=np.int64)
    segment_PGT = scored.groups.segment_PGT
    if segment_PGT is not None:
        _, members, tokens = segment_PGT.shape
        rank_PGT[:, :members, :tokens] = segment_PGT
    return rank_PGT
