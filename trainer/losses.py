"""The loss of the learner, token by token, from coefficients that the objective stages computed once per batch.

The coefficients carry their denominators, so the loss is a plain sum over tokens: neither ranks, packing nor
accumulation can change it.

    loss = sum_t  policy_weight * -S(rho, A)  +  kl_weight * k3  +  nll_weight * -log p_full  -  entropy_weight * H
    S(rho, A) = min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
    k3 = exp(ref - lp) - (ref - lp) - 1

`rho`, `k3` and the entropy `H` speak of the renormalised policy at the rollout temperature, the NLL of the full
vocabulary at temperature 1. Source: ../shared/methods.md section 0.

Suffix `_K`: target tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.records import BoolArray, FloatArray, IntArray
from trainer.objective_settings import Ratio

MAXIMA = ("gap_max",)
"""Statistics that are joined over micro-batches and ranks by their maximum; all others are sums."""


@dataclass(frozen=True, kw_only=True)
class UpdateInputs:
    """Per-token coefficients of one update, float32 `[P, G, T]` in the order of the completions."""

    advantage_PGT: FloatArray
    old_logp_PGT: FloatArray
    """Renormalised log-probabilities of the policy before the update."""
    ref_logp_PGT: FloatArray | None
    """Those of the reference policy; None where no `kl_weight` is set."""
    policy_weight_PGT: FloatArray
    kl_weight_PGT: FloatArray
    nll_weight_PGT: FloatArray
    ratio: Ratio = Ratio.TOKEN
    clip_low: float = 0.2
    clip_high: float = 0.2
    temperature: float = 1.0
    segment_PGT: IntArray | None = None
    """Number of the item within its completion, for `Ratio.ITEM`; None is one item per completion."""
    entropy_weight_PGT: FloatArray | None = None
    """Weights of the entropy bonus; None without one."""
    detached_PGT: BoolArray | None = None
    """True on tokens whose ratio is exp(lp - stop_gradient(lp)), 1 in value; None where there is none."""

    def __post_init__(self) -> None:
        if self.ref_logp_PGT is None and np.any(self.kl_weight_PGT):
            raise ValueError("kl_weight_PGT has weights, but there are no reference log-probabilities")

    def take(self, rows: np.ndarray) -> UpdateInputs:
        """The coefficients of the given prompts. Denominators stay those of the whole batch."""
        arrays = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if field.name.endswith("_PGT") and (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **arrays)

    def scaled(self, factor: int) -> UpdateInputs:
        """The weights of a minibatch, so that its loss is its own mean and not its share of the batch's."""
        entropy_PGT = self.entropy_weight_PGT
        return dataclasses.replace(
            self,
            policy_weight_PGT=self.policy_weight_PGT * factor,
            kl_weight_PGT=self.kl_weight_PGT * factor,
            nll_weight_PGT=self.nll_weight_PGT * factor,
            entropy_weight_PGT=None if entropy_PGT is None else entropy_PGT * factor,
        )


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """The coefficients of the target tokens of a micro-batch."""

    advantage_K: Tensor
    old_logp_K: Tensor
    ref_logp_K: Tensor | None
    policy_weight_K: Tensor
    kl_weight_K: Tensor
    nll_weight_K: Tensor
    unit_K: Tensor
    """int64, which tokens share a ratio (read for `Ratio.ITEM` and `Ratio.SEQUENCE`)."""
    ratio: Ratio
    clip_low: float
    clip_high: float
    entropy_weight_K: Tensor | None = None
    detached_K: Tensor | None = None


def token_inputs(inputs: UpdateInputs, slot_K: Tensor, unit_K: Tensor) -> TokenInputs:
    """Pick the coefficients of a micro-batch.

    Args:
        slot_K: int64, flat index into `[P, G, T]` of every target.
        unit_K: int64, flat index of the completion of every target.
    """
    device = slot_K.device

    def pick(array: FloatArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).reshape(-1).to(device)[slot_K]

    if inputs.ratio is Ratio.ITEM and inputs.segment_PGT is not None:
        segment = torch.from_numpy(np.ascontiguousarray(inputs.segment_PGT)).reshape(-1).to(device)[slot_K].long()
        unit_K = unit_K * (int(inputs.segment_PGT.max(initial=0)) + 2) + segment + 1
    unique_unit_K: Tensor = torch.unique(unit_K, return_inverse=True)[1]
    return TokenInputs(
        advantage_K=pick(inputs.advantage_PGT),
        old_logp_K=pick(inputs.old_logp_PGT),
        ref_logp_K=None if inputs.ref_logp_PGT is None else pick(inputs.ref_logp_PGT),
        policy_weight_K=pick(inputs.policy_weight_PGT),
        kl_weight_K=pick(inputs.kl_weight_PGT),
        nll_weight_K=pick(inputs.nll_weight_PGT),
        unit_K=unique_unit_K,
        ratio=inputs.ratio,
        clip_low=inputs.clip_low,
        clip_high=inputs.clip_high,
        entropy_weight_K=None if inputs.entropy_weight_PGT is None else pick(inputs.entropy_weight_PGT),
        detached_K=None if inputs.detached_PGT is None else pick(inputs.detached_PGT.astype(np.float32)) != 0,
    )


def token_loss(
    logp_K: Tensor, full_logp_K: Tensor, inputs: TokenInputs, entropy_K: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a micro-batch (a sum) and its statistics (sums, and maxima named in `MAXIMA`).

    Args:
        logp_K: renormalised log-probabilities at the rollout temperature, with gradient.
        full_logp_K: full-vocabulary log-probabilities at temperature 1, with gradient.
        entropy_K: entropy of the renormalised policy, with gradient; read where the inputs weigh it.

    Tokens with weight 0 take no part: neither their values nor non-finite ones among them reach loss or gradient.
    """
    on_K = inputs.policy_weight_K != 0
    kl_on_K = inputs.kl_weight_K != 0
    nll_on_K = inputs.nll_weight_K != 0
    old_logp_K = inputs.old_logp_K
    if inputs.detached_K is not None:
        old_logp_K = torch.where(inputs.detached_K, logp_K.detach(), old_logp_K)
    advantage_K = _where(on_K, inputs.advantage_K)
    log_ratio_K = _where(on_K, logp_K - old_logp_K)
    ratio_K = _shared(log_ratio_K, on_K, inputs).exp()
    clipped_K = ratio_K.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    surrogate_K = torch.minimum(ratio_K * advantage_K, clipped_K * advantage_K)
    policy_K = _where(on_K, inputs.policy_weight_K * -surrogate_K)
    nll_K = _where(nll_on_K, -full_logp_K)
    loss = policy_K.sum() + (inputs.nll_weight_K * nll_K).sum()
    kl_K = torch.zeros_like(logp_K)
    if inputs.ref_logp_K is not None:
        difference_K = _where(kl_on_K, inputs.ref_logp_K - logp_K)
        kl_K = difference_K.exp() - difference_K - 1
        loss = loss + (inputs.kl_weight_K * kl_K).sum()
    if inputs.entropy_weight_K is not None:
        if entropy_K is None:
            raise ValueError("entropy_weight_PGT has weights, but no entropy with gradient came")
        bonus_K = _where(inputs.entropy_weight_K != 0, inputs.entropy_weight_K * entropy_K)
        loss = loss - bonus_K.sum()
    with torch.no_grad():
        gap_K = log_ratio_K.abs()
        high_K = on_K & (ratio_K > 1 + inputs.clip_high) & (advantage_K > 0)
        low_K = on_K & (ratio_K < 1 - inputs.clip_low) & (advantage_K < 0)
        sums = {
            "loss": loss,
            "policy_loss": policy_K,
            "nll_loss": inputs.nll_weight_K * nll_K,
            "kl_loss": inputs.kl_weight_K * kl_K,
            "policy_tokens": on_K,
            "kl_tokens": kl_on_K,
            "nll_tokens": nll_on_K,
            "clip_high": high_K,
            "clip_low": low_K,
            "ratio": _where(on_K, ratio_K),
            "gap": gap_K,
            "kl": _where(kl_on_K, kl_K),
            "nll": nll_K,
        }
        largest = gap_K.double().amax() if gap_K.numel() else torch.zeros((), dtype=torch.float64, device=loss.device)
        # One transfer for all of them: each one alone would wait for the device.
        values = torch.stack([*(value.double().sum() for value in sums.values()), largest]).tolist()
        statistics = dict(zip([*sums, "gap_max"], values, strict=True))
    return loss, statistics


def _where(on_K: Tensor, value_K: Tensor) -> Tensor:
    return torch.where(on_K, value_K, torch.zeros((), dtype=value_K.dtype, device=value_K.device))


def _shared(log_ratio_K: Tensor, on_K: Tensor, inputs: TokenInputs) -> Tensor:
    """The log-ratio of each token's unit: its own, or the mean over the unit's tokens (geometric mean of ratios)."""
    if inputs.ratio is Ratio.TOKEN:
        return log_ratio_K
    units = int(inputs.unit_K.max()) + 1 if inputs.unit_K.numel() else 0
    zeros = torch.zeros(units, dtype=log_ratio_K.dtype, device=log_ratio_K.device)
    total = zeros.index_add(0, inputs.unit_K, log_ratio_K)
    count = zeros.index_add(0, inputs.unit_K, on_K.to(log_ratio_K.dtype))
    return (total / count.clamp_min(1))[inputs.unit_K]


def join_statistics(parts: list[dict[str, float]]) -> dict[str, float]:
    """Join the statistics of micro-batches or ranks."""
    joined: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name in MAXIMA:
                joined[name] = max(joined.get(name, 0.0), value)
            else:
                joined[name] = joined.get(name, 0.0) + value
    return joined


def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of an update from the joined statistics of all ranks."""
    policy, kl, nll = (max(sums.get(f"{name}_tokens", 0.0), 1.0) for name in ("policy", "kl", "nll"))
    return {
        "loss": sums.get("loss", 0.0),
        "loss/policy": sums.get("policy_loss", 0.0),
        "loss/kl": sums.get("kl_loss", 0.0),
        "loss/nll": sums.get("nll_loss", 0.0),
        "kl": sums.get("kl", 0.0) / kl,
        "nll": sums.get("nll", 0.0) / nll,
        "ratio/mean": sums.get("ratio", 0.0) / policy,
        "ratio/clip_high_share": sums.get("clip_high", 0.0) / policy,
        "ratio/clip_low_share": sums.get("clip_low", 0.0) / policy,
        "ratio/gap_mean": sums.get("gap", 0.0) / policy,
        "ratio/gap_max": sums.get("gap_max", 0.0),
        "tokens/policy": sums.get("policy_tokens", 0.0),
        "tokens/nll": sums.get("nll_tokens", 0.0),
    }
