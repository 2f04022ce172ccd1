"""Members of a batch of groups: the first argument of every objective stage.

Suffixes: `_P` prompt, `_G` group member, `_T` token of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.records import Kind, ScoredGroups

KIND_CODE = {Kind.ROLLOUT: 0, Kind.ANCHOR: 1, Kind.GROUND_TRUTH: 2}
"""Codes of `kind_PG`."""

PADDING = -2
"""Segment of a position that holds no token."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """Which members of which groups count, what they are, and which tokens they have."""

    valid_PG: Tensor
    """bool: the slot holds a completion and its group has a reward; all else is masked and counted."""
    kind_PG: Tensor
    """int64 `KIND_CODE`; rank-based stages look at valid rollouts only."""
    segment_PGT: Tensor
    """int64: rank in the list of the token's item, -1 for format tokens, `PADDING` for none."""

    @property
    def rollout_PG(self) -> Tensor:
        """bool: valid members that the policy generated."""
        return self.valid_PG & (self.kind_PG == KIND_CODE[Kind.ROLLOUT])

    @property
    def token_mask_PGT(self) -> Tensor:
        """bool: tokens of valid members."""
        return (self.segment_PGT != PADDING) & self.valid_PG.unsqueeze(-1)

    @property
    def length_PG(self) -> Tensor:
        """int64: tokens of each valid member."""
        return self.token_mask_PGT.sum(-1)


def rollout_members(scored: ScoredGroups) -> Members:
    """Members of single-item groups as they were rolled out: every token belongs to list position 0."""
    groups = scored.groups
    valid_PG = groups.valid_PG & scored.usable_P[:, None]
    steps_T = np.arange(groups.token_PGT.shape[2])
    segment_PGT = np.where(steps_T < groups.length_PG[..., None], 0, PADDING)
    return Members(
        valid_PG=torch.from_numpy(valid_PG),
        kind_PG=torch.full(valid_PG.shape, KIND_CODE[Kind.ROLLOUT], dtype=torch.int64),
        segment_PGT=torch.from_numpy(segment_PGT.astype(np.int64)),
    )
