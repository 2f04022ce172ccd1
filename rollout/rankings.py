"""What a search keeps the largest of: likelihood (beam search) or perturbed likelihood (draws without replacement).

Suffixes: `_P` prompt of the batch, `_M` member, `_N` prefix, `_C` legal continuation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from data.records import DecodeSpec, LongArray
from rollout.random import uniforms


class Ranking(Protocol):
    """What a search keeps the largest of."""

    def root(self, prompts: int) -> Tensor:
        """float64 `[P]` of the empty completions."""
        ...

    def children(self, rank_N: Tensor, place_N: Tensor, score_N: Tensor, logp_NC: Tensor, token: int) -> Tensor:
        """float64 `[N, C]` of the continuations.

        Args:
            rank_N: of the prefixes.
            place_N: prompt and slot of the prefixes, as `prompt * width + slot`.
            score_N: log-probability of the prefixes.
            logp_NC: of the continuations.
            token: number of tokens of the prefixes.
        """
        ...


class Likelihood:
    """Beam search: the most probable prefixes."""

    def root(self, prompts: int) -> Tensor:
        """See `Ranking.root`."""
        return torch.zeros(prompts, dtype=torch.float64)

    def children(self, rank_N: Tensor, place_N: Tensor, score_N: Tensor, logp_NC: Tensor, token: int) -> Tensor:
        """See `Ranking.children`."""
        return score_N[:, None] + logp_NC.double()


class Perturbation:
    """Stochastic beam search: the prefixes with the largest Gumbel-perturbed log-probabilities.

    Every completion has a perturbed log-probability `G = log p + Gumbel noise`, independent of the others, and the
    `width` largest are a sample without replacement. A prefix has the maximum of its completions, which is itself
    Gumbel distributed around the prefix's log-probability; children are drawn given that their maximum is their
    parent's. The root is drawn too, not fixed, because the threshold has to be that of independent noise.

    Source: Kool, van Hoof, Welling: Stochastic Beams and Where to Find Them (ICML 2019), sections 3 and 4, appendix B.
    """

    def __init__(self, spec: DecodeSpec, prompt_id_P: LongArray, device: torch.device) -> None:
        self._spec = spec
        self._prompt_id_P = prompt_id_P
        self._device = device

    def _gumbel(self, members: int, token: int) -> Tensor:
        uniform_PM = torch.from_numpy(
            uniforms(
                seed=self._spec.seed,
                step=self._spec.step,
                prompt_id_P=self._prompt_id_P,
                members=members,
                token=token,
            )
        )
        # Half a step of the generator away from 0, whose double logarithm is infinite.
        return -(-(uniform_PM + 2.0**-54).log()).log().to(self._device)

    def root(self, prompts: int) -> Tensor:
        """See `Ranking.root`."""
        return self._gumbel(1, 0)[:, 0]

    def children(self, rank_N: Tensor, place_N: Tensor, score_N: Tensor, logp_NC: Tensor, token: int) -> Tensor:
        """See `Ranking.children`."""
        # A prefix has the draws of its slot, so they do not depend on how many rows there are.
        width, branches = self._spec.width, logp_NC.shape[1]
        noise_NC = self._gumbel(width * branches, token + 1).view(-1, branches)[place_N]
        free_NC = score_N[:, None] + logp_NC.double() + noise_NC
        peak_N1 = free_NC.max(1, keepdim=True).values
        below_NC = torch.log(-torch.expm1(free_NC - peak_N1))
        shift_NC = rank_N[:, None] - free_NC + below_NC
        bound_NC = rank_N[:, None] - shift_NC.clamp(min=0) - (-shift_NC.abs()).exp().log1p()
        return bound_NC.masked_fill(free_NC == -torch.inf, -torch.inf)
