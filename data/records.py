"""Records that travel between processes: prompts, groups of completions, scored groups.

Records hold NumPy arrays, because Ray moves them without a copy and Parquet writes them as they are; tensors exist
inside a process only. Suffixes: `_P` prompt, `_G` group member, `_T` token of a completion. Everything is token ids,
never text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NO_ITEM = -1
"""Item id of a completion that maps to no item of the catalogue, and of an absent ground truth."""


FORMAT_SEGMENT = -1
"""Segment of a token that belongs to no item of its list: free text, and the token that begins the list."""
NO_SEGMENT = -2
"""Segment of a position that holds no token."""


class Decode(StrEnum):
    """How a group was decoded. Recorded with every group, because beams are not samples."""

    SAMPLE = "sample"
    """Independent draws from the renormalised policy; duplicates are possible."""
    BEAM = "beam"
    """Deterministic beam search; the group is the `width` most probable completions the beams reached."""
    SAMPLE_WITHOUT_REPLACEMENT = "sample_without_replacement"
    """Stochastic beam search with Gumbel top-k: draws that differ; `Groups.importance_weight_PG` makes up for it."""


class Kind(StrEnum):
    """Where a group member comes from."""

    ROLLOUT = "rollout"
    ANCHOR = "anchor"
    GROUND_TRUTH = "ground_truth"
    """It is learned by its likelihood and carries no advantage."""
    DEMONSTRATION = "demonstration"
    """A ground truth that was put among the rollouts and carries an advantage."""
    NEGATIVE = "negative"
    """A random item of the catalogue, in place of a rollout that missed."""


class Finish(StrEnum):
    """Why a completion ended."""

    ITEM = "item"
    """It reached a leaf of the item trie."""
    LIST = "list"
    """It placed every item of its list."""
    LIST_TEXT_CUT = "list_text_cut"
    """The same, but its free text was ended by the limit."""
    LENGTH = "length"
    """It reached the token limit (unconstrained decoding only)."""
    ABSENT = "absent"
    """There were fewer legal completions than group members; the slot is empty."""
    GIVEN = "given"
    """No engine generated it: the ground truth was put into the group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One context to recommend for."""

    prompt_id: int
    """Row of the split it comes from; with the step it keys the random numbers."""
    token_ids: IntArray
    """[T] prompt tokens."""
    user_id: int
    history: IntArray
    """Item ids, oldest first, as many as the prompt shows."""
    exclusions: IntArray
    """Item ids that may not be recommended, sorted, without duplicates (empty when `exclude_seen` is off)."""
    target: int = NO_ITEM
    """Ground truth item, or `NO_ITEM`."""
    timestamp: int = 0
    """Seconds; time of the target."""
    scored_items: tuple[int, ...] = ()
    """Items whose log-probabilities come back with the group, computed from the same pass over the prompt: a ground
    truth, an anchor."""
    need: str = ""
    """What a list is for; the empty string where single items are asked for."""
    candidates: IntArray | None = None
    """[C] items that a list ranks, in the order of the prompt; none where single items are asked for."""
    gain_C: FloatArray | None = None
    """Gain of each candidate for the need; 0 where it was not observed."""
    observed_C: BoolArray | None = None
    """Candidates whose gain was observed."""

    @property
    def constraint_items(self) -> IntArray:
        """What the prompt brings to its constraint: the candidates of its list, or the items it may not get."""
        return self.exclusions if self.candidates is None else self.candidates


def excluded_pairs(prompts: Sequence[Prompt]) -> tuple[LongArray, IntArray]:
    """Every exclusion of the prompts: the row of its prompt, and the item."""
    exclusions = [prompt.exclusions for prompt in prompts]
    size_P = np.fromiter(map(len, exclusions), np.int64, len(exclusions))
    if not size_P.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    return np.repeat(np.arange(len(prompts)), size_P), np.concatenate(exclusions)


@dataclass(frozen=True, kw_only=True)
class ListSpec:
    """Which lists an engine is asked for."""

    candidates: int
    """Most candidates of a prompt."""
    length: int = 0
    """Items of a list; 0 ranks all candidates."""
    text_tokens: int = 0
    """Most tokens of free text before the list; 0 begins with the list."""

    @property
    def width(self) -> int:
        """Items of the longest list."""
        return self.length or self.candidates


@dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """What the engine is asked to do with a batch of prompts."""

    decode: Decode
    width: int
    """Group size: number of beams or of samples per prompt."""
    temperature: float = 1.0
    """Divides the logits before the softmax over the legal set."""
    seed: int = 0
    """Seed of the run; random numbers are keyed by (seed, step, prompt_id, member, token index)."""
    step: int = 0
    constrained: bool = True
    """False decodes over the whole vocabulary for `max_tokens` tokens, to measure the invalid rate."""
    max_tokens: int = 0
    """Token limit of unconstrained decoding; 0 means the depth of the trie."""
    lists: ListSpec | None = None
    """Ranked lists of the prompts' candidates; none generates single items of the catalogue."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Completions of P prompts with G slots each, in the order of the prompts; a struct of arrays."""

    prompt_id_P: LongArray
    valid_PG: BoolArray
    """False where there were fewer legal completions than slots; valid slots come first."""
    token_PGT: IntArray
    """Completion tokens, padded with -1."""
    length_PG: IntArray
    item_PG: IntArray
    """Item of the completion (`NO_ITEM` when it maps to none); the first item of a shared leaf, and of a list."""
    logp_PGT: FloatArray
    """Behaviour log-probabilities of the renormalised policy at the rollout temperature; 0 in the padding."""
    finish_PG: npt.NDArray[np.str_]
    """A `Finish` per slot."""
    weight_version_P: LongArray
    engine_id_P: npt.NDArray[np.str_]
    spec: DecodeSpec
    constraint: str
    """Specification of the constraint, e.g. `item_trie`, `item_trie-exclusions` or `list-all-of-30`."""
    catalogue_digest: str
    threshold_P: npt.NDArray[np.float64] | None = None
    """Of `sample_without_replacement` only: the largest perturbed log-probability that is not in the group, minus
    infinity where the group is everything legal."""
    scored_logp_PMT: FloatArray | None = None
    """Log-probabilities, like `logp_PGT`, of the `scored_items` of each prompt, 0 in the padding; minus infinity at
    the first token that is not legal (an excluded item), and 0 after it. None where no prompt has such items."""
    item_PGK: IntArray | None = None
    """Of ranked lists only: their items in order, `NO_ITEM` behind the last and in empty slots."""
    segment_PGT: IntArray | None = None
    """Of ranked lists only: rank of the item that each token belongs to, `FORMAT_SEGMENT` for the tokens of no item,
    `NO_SEGMENT` in the padding."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, G, T)."""
        prompts, members, tokens = self.token_PGT.shape
        return prompts, members, tokens

    @property
    def token_mask_PGT(self) -> BoolArray:
        """True on the tokens of valid completions."""
        steps = np.arange(self.token_PGT.shape[2])
        return (steps < self.length_PG[..., None]) & self.valid_PG[..., None]

    @property
    def generated_PG(self) -> BoolArray:
        """True for valid completions that an engine generated, which have behaviour log-probabilities."""
        generated: BoolArray = self.valid_PG & (self.finish_PG != Finish.GIVEN.value)
        return generated

    @property
    def sequence_logp_PG(self) -> FloatArray:
        """Behaviour log-probability of each completion."""
        total_PG: FloatArray = np.where(self.token_mask_PGT, self.logp_PGT, 0.0).sum(-1, dtype=np.float64)
        return total_PG.astype(np.float32)

    @property
    def importance_weight_PG(self) -> npt.NDArray[np.float64]:
        """Weight of each completion in unbiased estimates, 0 where absent.

        For any f, the expectation over groups of `sum_g weight_g f(g)` is the expectation of f under the policy: the
        mean for independent draws (`1 / members`), and `p / q` for draws without replacement, with
        `q = 1 - exp(-exp(log p - threshold))` the probability to be above the threshold.

        Raises:
            ValueError: beams are not drawn, so there is no such weight.

        Source: Kool, van Hoof, Welling: Stochastic Beams and Where to Find Them (ICML 2019), equation 11.
        """
        if self.spec.decode is Decode.SAMPLE:
            return np.where(self.valid_PG, 1.0 / self.valid_PG.shape[1], 0.0)
        if self.threshold_P is None:
            raise ValueError(f"completions decoded with {self.spec.decode.value} have no importance weights")
        logp_PG = np.where(self.token_mask_PGT, self.logp_PGT, 0.0).sum(-1, dtype=np.float64)
        # exp(-threshold) is infinite where the group is everything, and q is 1 then.
        with np.errstate(over="ignore"):
            inclusion_PG = -np.expm1(-np.exp(logp_PG - self.threshold_P[:, None]))
        # Where p is lost to rounding, p / q is what it tends to.
        limit_PG = np.broadcast_to(np.exp(self.threshold_P)[:, None], inclusion_PG.shape)
        weight_PG = np.divide(np.exp(logp_PG), inclusion_PG, out=limit_PG.copy(), where=inclusion_PG > 0)
        return np.where(self.valid_PG, weight_PG, 0.0)

    def take(self, rows: npt.NDArray[np.integer]) -> Groups:
        """The groups of the given prompt rows."""
        taken: dict[str, Any] = {f.name: getattr(self, f.name)[rows] for f in self._per_prompt_fields()}
        return dataclasses.replace(self, **taken)

    @staticmethod
    def concat(parts: Sequence[Groups]) -> Groups:
        """Join shards of one request, padding the token axis to the longest.

        Raises:
            ValueError: the parts do not come from the same request and catalogue.
        """
        if any(part.scored_logp_PMT is not None for part in parts):
            parts = [part._with_scores() for part in parts]
        first = parts[0]
        for part in parts[1:]:
            if (part.spec, part.constraint, part.catalogue_digest) != (
                first.spec,
                first.constraint,
                first.catalogue_digest,
            ):
                raise ValueError("shards of different requests or catalogues cannot be joined")
        tokens = max(part.token_PGT.shape[2] for part in parts)
        joined: dict[str, Any] = {}
        for field in first._per_prompt_fields():
            arrays = [getattr(part, field.name) for part in parts]
            if field.name.endswith("_PGT"):
                fill = {"token_PGT": -1, "segment_PGT": NO_SEGMENT}.get(field.name, 0)
                pads = [((0, 0), (0, 0), (0, tokens - a.shape[2])) for a in arrays]
                arrays = [
                    np.pad(a, pad, constant_values=fill) if any(pad[2]) else a
                    for a, pad in zip(arrays, pads, strict=True)
                ]
            if field.name == "scored_logp_PMT":
                arrays = _padded_alike(arrays)
            joined[field.name] = np.concatenate(arrays)
        return dataclasses.replace(first, **joined)

    def _with_scores(self) -> Groups:
        """The same groups, with no scored items where they had none to have."""
        if self.scored_logp_PMT is not None:
            return self
        return dataclasses.replace(self, scored_logp_PMT=np.zeros((len(self.prompt_id_P), 0, 0), np.float32))

    def _per_prompt_fields(self) -> list[dataclasses.Field[Any]]:
        fields = [f for f in dataclasses.fields(self) if f.name.split("_")[-1].startswith("P")]
        return [f for f in fields if getattr(self, f.name) is not None]


def _padded_alike(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Zeros behind the last two axes, up to the largest of each."""
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    pads = [((0, 0), *((0, n - m) for n, m in zip(largest, array.shape[1:], strict=True))) for array in arrays]
    return [np.pad(array, pad) for array, pad in zip(arrays, pads, strict=True)]


class RewardFailure(StrEnum):
    """Why a group has no reward. Failed groups are masked and counted; a failure is never a zero."""

    NONE = ""
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    NON_FINITE = "non_finite"
    BAD_REQUEST = "bad_request"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """Groups with their rewards."""

    groups: Groups
    reward_PG: FloatArray
    """Sequence reward; 0 where invalid or failed, which `usable_P` and `valid_PG` mask."""
    failure_P: npt.NDArray[np.str_]
    """A `RewardFailure` per group; the empty string when it was scored."""
    parts_PG: dict[str, FloatArray]
    """Unweighted reward by the name of its source."""

    @property
    def usable_P(self) -> BoolArray:
        """True for groups whose rewards are complete."""
        usable: BoolArray = self.failure_P == RewardFailure.NONE.value
        return usable

    def take(self, rows: npt.NDArray[np.integer]) -> ScoredGroups:
        """The given groups."""
        return ScoredGroups(
            groups=self.groups.take(rows),
            reward_PG=self.reward_PG[rows],
            failure_P=self.failure_P[rows],
            parts_PG={name: part[rows] for name, part in self.parts_PG.items()},
        )

    @staticmethod
    def concat(parts: Sequence[ScoredGroups]) -> ScoredGroups:
        """Join groups of one request that were scored by the same sources.

        Raises:
            ValueError: the groups do not come from the same request and catalogue.
        """
        return ScoredGroups(
            groups=Groups.concat([part.groups for part in parts]),
            reward_PG=np.concatenate([part.reward_PG for part in parts]),
            failure_P=np.concatenate([part.failure_P for part in parts]),
            parts_PG={name: np.concatenate([part.parts_PG[name] for part in parts]) for name in parts[0].parts_PG},
        )
