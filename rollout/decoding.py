"""The decoding loop: beam search and sampling over a constraint, against any backend that computes logits.

Invariants, which the test of the same name asserts:

- The completions of a prompt are a function of (weights, prompt, spec) and never of the other prompts of the batch.
- Ties are broken by order: the better parent first, then the smaller token; so equal scores give one answer.
- A beam is never a copy of another; where fewer completions are legal than `width`, slots stay empty, at the end.
- `logp` is the log-probability under the policy renormalised over the legal continuations at the temperature.

Suffixes: `_P` prompt of the batch, `_S` hypothesis slot of a prompt, `_N` live row (a prefix the backend holds),
`_C` legal continuation, `_T` token of the completion, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from data.constraint import Constraint, LegalSets
from data.errors import RunError
from data.records import NO_ITEM, Decode, DecodeSpec, IntArray, LongArray
from rollout.random import uniforms
from rollout.rankings import Likelihood, Perturbation, Ranking

StateT = TypeVar("StateT")

_MAX_VOCABULARY = 2**32
"""Bound on token ids, to pair a row and a token in one 64-bit integer."""


class Backend(Protocol):
    """Computes the next-token logits of prefixes that grow one token at a time."""

    def prefill(
        self, prompts: Sequence[IntArray], rows: int, new_tokens: int, vocabulary_V: Tensor | None = None
    ) -> Tensor:
        """Logits `[P, V]` after each prompt; becomes rows 0..P-1.

        At most `rows` rows per prompt and `new_tokens` extensions follow. With `vocabulary_V` the columns are the
        logits of those tokens; by default those of the whole vocabulary.
        """
        ...

    def extend(self, parent_N: Tensor, token_N: Tensor, vocabulary_V: Tensor | None = None) -> Tensor:
        """Logits `[N, V]` of the rows `parent_N` of the last call, continued by one token each: the new rows."""
        ...

    def restart(self) -> None:
        """The rows are the prompts of the last `prefill` again."""
        ...

    def release(self) -> None:
        """Forget the prompts of the last `prefill`."""
        ...


class Completions(NamedTuple):
    """Completions of a batch of prompts, as tensors `[P, S]` and `[P, S, T]`; S is `width`."""

    token_PST: Tensor
    """int64, padded with -1."""
    logp_PST: Tensor
    """float32, 0 in the padding."""
    length_PS: Tensor
    item_PS: Tensor
    valid_PS: Tensor
    threshold_P: Tensor
    """float64, the largest rank that a search dropped (see `Groups.threshold_P`); minus infinity for draws."""
    scored_PMT: Tensor
    """float32, see `data.records.Groups.scored_logp_PMT`."""


def decode(
    backend: Backend,
    constraint: Constraint[StateT],
    *,
    prompts: Sequence[IntArray],
    prompt_id_P: LongArray,
    items: Sequence[IntArray],
    spec: DecodeSpec,
    levels: Sequence[Tensor] | None = None,
    scored_PMT: Tensor | None = None,
) -> Completions:
    """Complete every prompt `spec.width` times.

    Args:
        items: what each prompt brings to the constraint: items it may not get, or the candidates of its list.
        levels: per token of a completion, the tokens (increasing) that the constraint can ever allow there; by default
            logits of the whole vocabulary are computed.
        scored_PMT: int64 `[P, M, T]`, padded with -1; completions whose log-probabilities are wanted too.

    Raises:
        RunError: the logits are not finite on a legal token, or the constraint has a dead end.
    """
    state = constraint.start(items)
    head = _Head(levels)
    try:
        logits_PV = backend.prefill(prompts, spec.width, constraint.max_tokens - 1, head.vocabulary(0))
        if spec.decode is Decode.SAMPLE:
            done = _sample(backend, constraint, state, logits_PV, spec, head, prompt_id_P)
        else:
            beam = spec.decode is Decode.BEAM
            ranking = Likelihood() if beam else Perturbation(spec, prompt_id_P, logits_PV.device)
            done = _search(backend, constraint, state, logits_PV, spec, head, ranking)
        if scored_PMT is None:
            return done
        scores = []
        # As many at once as there is room for rows.
        for first in range(0, scored_PMT.shape[1], spec.width):
            some_PMT = scored_PMT[:, first : first + spec.width].to(logits_PV.device)
            backend.restart()
            scores.append(_score(backend, constraint, state, logits_PV, spec, head, some_PMT))
        return done._replace(scored_PMT=torch.cat(scores, 1))
    finally:
        backend.release()


@dataclass(frozen=True)
class _Slots:
    """Hypotheses of every prompt, whether they still grow or not."""

    token_PST: Tensor
    logp_PST: Tensor
    length_PS: Tensor
    item_PS: Tensor
    valid_PS: Tensor
    row_PS: Tensor
    """Live row of the hypothesis, -1 where it is done or absent."""

    @staticmethod
    def empty(prompts: int, slots: int, tokens: int, device: torch.device) -> _Slots:
        shape = (prompts, slots)
        return _Slots(
            token_PST=torch.full((*shape, tokens), -1, device=device),
            logp_PST=torch.zeros((*shape, tokens), device=device),
            length_PS=torch.zeros(shape, dtype=torch.long, device=device),
            item_PS=torch.full(shape, NO_ITEM, device=device),
            valid_PS=torch.ones(shape, dtype=torch.bool, device=device),
            row_PS=torch.arange(prompts, device=device)[:, None].expand(shape).clone(),
        )

    def take(self, slot_PS: Tensor) -> _Slots:
        """The hypotheses at the given slots of each prompt."""
        wide_PST = slot_PS[..., None].expand(*slot_PS.shape, self.token_PST.shape[2])
        return _Slots(
            token_PST=self.token_PST.gather(1, wide_PST),
            logp_PST=self.logp_PST.gather(1, wide_PST),
            length_PS=self.length_PS.gather(1, slot_PS),
            item_PS=self.item_PS.gather(1, slot_PS),
            valid_PS=self.valid_PS.gather(1, slot_PS),
            row_PS=self.row_PS.gather(1, slot_PS),
        )

    def finish(self, threshold_P: Tensor) -> Completions:
        return Completions(
            threshold_P=threshold_P,
            scored_PMT=self.logp_PST[:, :0],
            token_PST=self.token_PST.masked_fill(~self.valid_PS[..., None], -1),
            logp_PST=self.logp_PST.masked_fill(~self.valid_PS[..., None], 0.0),
            length_PS=self.length_PS.masked_fill(~self.valid_PS, 0),
            item_PS=self.item_PS.masked_fill(~self.valid_PS, NO_ITEM),
            valid_PS=self.valid_PS,
        )


class _Head:
    """For which tokens logits are computed, and in which columns they stand."""

    def __init__(self, levels: Sequence[Tensor] | None) -> None:
        self._levels = levels

    def vocabulary(self, token_index: int) -> Tensor | None:
        return None if self._levels is None else self._levels[token_index]

    def columns(self, legal: LegalSets, token_index: int) -> LegalSets:
        """The legal sets, with columns of the logits for tokens."""
        if self._levels is None:
            return legal
        # What only pads a row may be no token of the level: any column does for it.
        return legal._replace(token_NC=torch.searchsorted(self._levels[token_index], legal.token_NC))


def _search(
    backend: Backend,
    constraint: Constraint[StateT],
    state: StateT,
    logits_NV: Tensor,
    spec: DecodeSpec,
    head: _Head,
    ranking: Ranking,
) -> Completions:
    """Keep the best of a ranking at every level; a completed hypothesis keeps competing with the rank it has."""
    prompts, device = logits_NV.shape[0], logits_NV.device
    slots = _Slots.empty(prompts, 1, constraint.max_tokens, device)
    rank_PS = ranking.root(prompts).to(device)[:, None]
    score_PS = torch.zeros_like(rank_PS)
    # What is dropped at any level stands for completions that are not in the answer.
    threshold_P = torch.full_like(rank_PS[:, 0], -torch.inf)
    prompt_P1 = torch.arange(prompts, device=device)[:, None]
    for token_index in range(constraint.max_tokens):
        legal = constraint.legal(state)
        logp_NC = policy_logp(logits_NV, head.columns(legal, token_index), spec.temperature)
        live_PS = slots.row_PS >= 0
        row_PS = slots.row_PS.clamp(min=0)
        # Every live slot has a row of its own.
        slot_N = torch.empty(len(logp_NC), dtype=torch.long, device=device)
        slot_N[slots.row_PS[live_PS]] = live_PS.flatten().nonzero()[:, 0]
        place_PS = prompt_P1 * spec.width + torch.arange(row_PS.shape[1], device=device)
        rank_N, score_N, place_N = (values_PS.flatten()[slot_N] for values_PS in (rank_PS, score_PS, place_PS))
        rank_NC = ranking.children(rank_N, place_N, score_N, logp_NC, token_index)
        # One more than can be chosen, so that the best that is dropped is known.
        best_NK = stable_top(rank_NC, min(spec.width + 1, rank_NC.shape[1]))
        rank_NK, logp_NK = rank_NC.gather(1, best_NK), logp_NC.gather(1, best_NK)
        token_NK = legal.token_NC.gather(1, best_NK)
        branches = rank_NK.shape[1]

        # One more branch per hypothesis stands for "stay as you are": the completed ones take it, nobody else.
        candidate_PSB = torch.full((*row_PS.shape, branches + 1), -torch.inf, dtype=torch.float64, device=device)
        candidate_PSB[..., :branches] = rank_NK[row_PS].masked_fill(~live_PS[..., None], -torch.inf)
        candidate_PSB[..., branches] = rank_PS.masked_fill(live_PS | ~slots.valid_PS, -torch.inf)
        candidate_PX = candidate_PSB.flatten(1)
        if candidate_PX.shape[1] <= spec.width:
            candidate_PX = torch.nn.functional.pad(
                candidate_PX, (0, spec.width + 1 - candidate_PX.shape[1]), value=-torch.inf
            )
        ordered_PS = stable_top(candidate_PX, spec.width + 1)
        dropped_P = candidate_PX.gather(1, ordered_PS[:, -1:])[:, 0]
        threshold_P = torch.maximum(threshold_P, dropped_P)
        chosen_PS = ordered_PS[:, :-1]
        rank_PS = candidate_PX.gather(1, chosen_PS)
        valid_PS = rank_PS > -torch.inf
        parent_PS = (chosen_PS // (branches + 1)).clamp(max=row_PS.shape[1] - 1)
        branch_PS = chosen_PS % (branches + 1)

        slots = slots.take(parent_PS)
        score_PS = score_PS.gather(1, parent_PS)
        grows_PS = valid_PS & (branch_PS < branches)
        row_N, branch_N = slots.row_PS[grows_PS], branch_PS[grows_PS]
        score_PS[grows_PS] += logp_NK[row_N, branch_N].double()
        slots = _Slots(
            token_PST=slots.token_PST,
            logp_PST=slots.logp_PST,
            length_PS=slots.length_PS,
            item_PS=slots.item_PS,
            valid_PS=valid_PS,
            row_PS=torch.full_like(slots.row_PS, -1),
        )
        grown = _grow(constraint, state, slots, grows_PS, row_N, token_NK[row_N, branch_N], logp_NK[row_N, branch_N])
        if grown is None:
            return slots.finish(threshold_P)
        state, parent_N, token_N = grown
        logits_NV = backend.extend(parent_N, token_N, head.vocabulary(token_index + 1))
    raise RunError(f"a completion is not done after {constraint.max_tokens} tokens: the constraint breaks its limit")


def _grow(
    constraint: Constraint[StateT],
    state: StateT,
    slots: _Slots,
    grows_PS: Tensor,
    row_M: Tensor,
    token_M: Tensor,
    logp_M: Tensor,
) -> tuple[StateT, Tensor, Tensor] | None:
    """Append one token to the slots `grows_PS` (in place) and number the rows that go on.

    Slots with the same prefix share a row, so that equal samples are computed once. Returns the constraint state,
    parents and tokens of the rows that go on, or None when none does.
    """
    at_MT = slots.length_PS[grows_PS]
    prompt_M, slot_M = grows_PS.nonzero(as_tuple=True)
    slots.token_PST[prompt_M, slot_M, at_MT] = token_M
    slots.logp_PST[prompt_M, slot_M, at_MT] = logp_M
    slots.length_PS[prompt_M, slot_M] += 1

    key_N, shared_M = torch.unique(row_M * _MAX_VOCABULARY + token_M, return_inverse=True)
    parent_N, token_N = key_N // _MAX_VOCABULARY, key_N % _MAX_VOCABULARY
    grown = constraint.advance(state, parent_N, token_N)
    done_N = constraint.done(grown)
    done_M = done_N[shared_M]
    slots.item_PS[prompt_M[done_M], slot_M[done_M]] = constraint.items(grown)[shared_M][done_M].to(slots.item_PS.dtype)
    if bool(done_N.all()):
        slots.row_PS[prompt_M, slot_M] = -1
        return None
    number_N = (~done_N).cumsum(0) - 1
    slots.row_PS[prompt_M, slot_M] = torch.where(done_M, -1, number_N[shared_M])
    if bool(done_N.any()):
        parent_N, token_N = parent_N[~done_N], token_N[~done_N]
        grown = constraint.advance(state, parent_N, token_N)
    return grown, parent_N, token_N


def _sample(
    backend: Backend,
    constraint: Constraint[StateT],
    state: StateT,
    logits_NV: Tensor,
    spec: DecodeSpec,
    head: _Head,
    prompt_id_P: LongArray,
) -> Completions:
    """Independent draws by inversion of the distribution function, one keyed uniform per member and token."""
    prompts, device = logits_NV.shape[0], logits_NV.device
    slots = _Slots.empty(prompts, spec.width, constraint.max_tokens, device)
    for token_index in range(constraint.max_tokens):
        legal = constraint.legal(state)
        logp_NC = policy_logp(logits_NV, head.columns(legal, token_index), spec.temperature)
        mass_NC = logp_NC.double().exp().cumsum(1)
        uniform_PS = torch.from_numpy(
            uniforms(seed=spec.seed, step=spec.step, prompt_id_P=prompt_id_P, members=spec.width, token=token_index)
        ).to(device)
        live_PS = slots.row_PS >= 0
        row_PS = slots.row_PS.clamp(min=0)
        choice_PS = torch.empty_like(row_PS)
        # Member by member, because all at once would hold [P, S, C], too much over a full vocabulary.
        for member in range(spec.width):
            member_mass_PC = mass_NC[row_PS[:, member]].contiguous()
            threshold_P = uniform_PS[:, member] * member_mass_PC[:, -1]
            choice_PS[:, member] = torch.searchsorted(member_mass_PC, threshold_P[:, None], right=True)[:, 0]
        row_M, choice_M = row_PS[live_PS], choice_PS[live_PS]
        grown = _grow(
            constraint, state, slots, live_PS, row_M, legal.token_NC[row_M, choice_M], logp_NC[row_M, choice_M]
        )
        if grown is None:
            return slots.finish(torch.full((prompts,), -torch.inf, dtype=torch.float64))
        state, parent_N, token_N = grown
        logits_NV = backend.extend(parent_N, token_N, head.vocabulary(token_index + 1))
    raise RunError(f"a completion is not done after {constraint.max_tokens} tokens: the constraint breaks its limit")


def _score(
    backend: Backend,
    constraint: Constraint[StateT],
    state: StateT,
    logits_NV: Tensor,
    spec: DecodeSpec,
    head: _Head,
    token_PMT: Tensor,
) -> Tensor:
    """Log-probabilities `[P, M, T]` of given completions; a completion ends at a token that is not legal."""
    prompts, members, tokens = token_PMT.shape
    slots = _Slots.empty(prompts, members, tokens, logits_NV.device)
    for token_index in range(tokens):
        wanted_PM = token_PMT[..., token_index] >= 0
        live_PM = wanted_PM & (slots.row_PS >= 0)
        if not bool(live_PM.any()):
            break
        legal = constraint.legal(state)
        logp_NC = policy_logp(logits_NV, head.columns(legal, token_index), spec.temperature)
        row_M, token_M = slots.row_PS[live_PM], token_PMT[..., token_index][live_PM]
        same_MC = (legal.token_NC[row_M] == token_M[:, None]) & legal.legal_NC[row_M]
        logp_M = logp_NC[row_M].masked_fill(~same_MC, -torch.inf).max(1).values
        legal_M = same_MC.any(1)
        slots.logp_PST[..., token_index][live_PM] = logp_M
        goes_PM = live_PM.clone()
        goes_PM[live_PM] = legal_M
        slots.row_PS[~goes_PM] = -1
        if not bool(legal_M.any()):
            break
        grown = _grow(constraint, state, slots, goes_PM, row_M[legal_M], token_M[legal_M], logp_M[legal_M])
        if grown is None or token_index + 1 == tokens:
            break
        state, parent_N, token_N = grown
        logits_NV = backend.extend(parent_N, token_N, head.vocabulary(token_index + 1))
    return slots.logp_PST


def policy_logp(logits_NV: Tensor, legal: LegalSets, temperature: float) -> Tensor:
    """`data.constraint.legal_log_softmax` in a form whose bits do not depend on the padding of the legal sets.

    The padding follows the widest state of the batch, and a vectorised sum adds in an order that depends on the width;
    a running sum in float64 does not. Returns float32 `[N, C]`, minus infinity where not legal.

    Raises:
        RunError: a legal token has a logit that is not a number.
    """
    gathered_NC = (logits_NV.gather(1, legal.token_NC).double() / temperature).masked_fill(~legal.legal_NC, -torch.inf)
    peak_N1 = gathered_NC.max(1, keepdim=True).values
    total_N1 = (gathered_NC - peak_N1).exp().cumsum(1)[:, -1:]
    logp_NC = (gathered_NC - peak_N1 - total_N1.log()).float()
    # A NaN logit, a plus infinity and a row of minus infinities all come out as NaN here.
    if bool(logp_NC.isnan().any()):
        raise RunError("the engine's logits are not finite on the legal tokens: the weights are broken")
    return logp_NC.masked_fill(~legal.legal_NC, -torch.inf)


def stable_top(value_NC: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest values of each row, largest first, equal values in order of position.

    `torch.topk` leaves open which of equal values it takes. Returns int64 `[N, count]`.
    """
    smallest_N1 = value_NC.topk(count, dim=1).values[:, -1:]
    above_NC = value_NC > smallest_N1
    equal_NC = value_NC == smallest_N1
    wanted_N1 = count - above_NC.sum(1, keepdim=True)
    taken_NC = above_NC | (equal_NC & (equal_NC.cumsum(1) <= wanted_N1))
    position_NK = taken_NC.nonzero()[:, 1].view(value_NC.shape[0], count)
    order_NK = value_NC.gather(1, position_NK).sort(dim=1, descending=True, stable=True).indices
    return position_NK.gather(1, order_NK)
