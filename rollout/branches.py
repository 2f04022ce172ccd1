"""Keys and values of prompts and of the branches that grow from them, and attention over both.

All branches are after the same number of tokens. Attention to a prompt is computed once for all its branches, their
queries stacked as if they were one long query; attention to a branch's own tokens is computed row by row; the two are
joined through the log-sum-exp of their scores. So a prompt is never copied, and a branch's own tokens are only where
the branches change places: samples keep theirs. Pure torch: no vLLM in here.

What a prompt's numbers pass through depends on the prompt and the request only, never on its neighbours: prompts are
computed together where their lengths are equal, and the stack of queries is padded to the request's width.

Suffixes: `_P` prompt, `_N` row of the current level, `_R` place in a prompt's stack of rows, `_H` query head, `_K`
key-value head, `_G` query head of a key-value head, `_D` content of a head, `_X` token of a prompt, `_T` own token,
`_2` key and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 8
"""Own tokens of a branch that room is made for at once."""
FEW = 8
"""Own tokens of a branch up to which no kernel is called."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What attention needs to know of one layer."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    """A query sees itself and the `window - 1` tokens before it; none sees everything."""

    @property
    def values_per_token(self) -> int:
        """Numbers that one token leaves behind."""
        return 2 * self.kv_heads * self.head_size


def attention(query_PHRD: Tensor, key_PHXD: Tensor, value_PHXD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query to every key, and the log-sum-exp of the scores, float32 `[P, H, R]`."""
    if query_PHRD.device.type == "cpu":
        output_PHRD, lse_PHR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_PHRD, key_PHXD, value_PHXD, 0.0, False, scale=scale
        )
        return output_PHRD, lse_PHR
    return plain_attention(query_PHRD, key_PHXD, value_PHXD, scale)


def plain_attention(query_PHRD: Tensor, key_PHXD: Tensor, value_PHXD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` on any device."""
    score_PHRX = torch.matmul(query_PHRD, key_PHXD.transpose(-1, -2)).float() * scale
    lse_PHR = score_PHRX.logsumexp(-1)
    weight_PHRX = (score_PHRX - lse_PHR[..., None]).exp().to(value_PHXD.dtype)
    return torch.matmul(weight_PHRX, value_PHXD), lse_PHR


def own_attention(query_NKGD: Tensor, own_2TNKD: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """What each row's queries find in the row's own tokens: contents, and the scores by which they are joined.

    A kernel's work per row costs more than the few tokens of a path are worth: each of those is a content of its own,
    computed for all rows at once. Of more tokens the kernel makes one content, whose score is their log-sum-exp.

    Returns:
        Contents that broadcast to `[N, K, G, D]`, each with its float32 `[N, K, G]`.
    """
    key_TNKD, value_TNKD = own_2TNKD
    if len(key_TNKD) > FEW:
        return [attention(query_NKGD, key_TNKD.permute(1, 2, 0, 3), value_TNKD.permute(1, 2, 0, 3), scale)]
    query_NKGD = query_NKGD.float() * scale
    return [
        (value_NKD[:, :, None], (query_NKGD * key_NKD[:, :, None]).sum(-1))
        for key_NKD, value_NKD in zip(key_TNKD, value_TNKD, strict=True)
    ]


class PromptStore:
    """Room for the keys and values of a wave of prompts; the memory is kept from wave to wave."""

    def __init__(self, layers: Sequence[LayerShape], *, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = tuple(layers)
        self._dtype = dtype
        self._device = device
        self._room = 0
        self._key: list[Tensor] = []
        self._value: list[Tensor] = []

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in all layers."""
        return sum(layer.values_per_token for layer in self.layers) * self._dtype.itemsize

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; what was kept may be lost."""
        if tokens <= self._room:
            return
        self._key, self._value = [], []
        for layer in self.layers:
            shape = (tokens, layer.kv_heads, layer.head_size)
            self._key.append(torch.empty(shape, dtype=self._dtype, device=self._device))
            self._value.append(torch.empty(shape, dtype=self._dtype, device=self._device))
        self._room = tokens

    def clear(self) -> None:
        """Give the memory back."""
        self._key, self._value, self._room = [], [], 0

    def write(self, layer: int, start: int, key_XKD: Tensor, value_XKD: Tensor) -> None:
        """Keep the keys and values of neighbouring tokens."""
        stop = start + len(key_XKD)
        self._key[layer][start:stop] = key_XKD
        self._value[layer][start:stop] = value_XKD

    def read(self, layer: int, start: int, prompts: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values, `[P, X, K, D]` without a copy, of neighbouring prompts of one length."""
        stop = start + prompts * length
        shape = (prompts, length, *self._key[layer].shape[1:])
        return self._key[layer][start:stop].view(shape), self._value[layer][start:stop].view(shape)


@dataclass(frozen=True)
class _Stack:
    """The rows of neighbouring prompts of one length, stacked prompt by prompt."""

    start: int
    """First token of the prompts in the store."""
    length: int
    row_PR: Tensor
    """Row at each place, padded with row 0."""
    row_M: Tensor
    """Rows at the places that are no padding ..."""
    place_M: Tensor
    """... and those places, counted over the whole stack."""


class Branches:
    """The rows that grow from the prompts of one wave."""

    def __init__(self, store: PromptStore, lengths: Sequence[int], *, rows: int, device: torch.device) -> None:
        """Args: `rows` is the most rows per prompt."""
        self._store = store
        self._rows = rows
        self._device = device
        self._length_P = torch.tensor(lengths, dtype=torch.long)
        order_P = self._length_P.argsort(descending=True, stable=True)
        self.order: list[int] = order_P.tolist()
        """Prompts in the order in which they lie in the store: equal lengths are neighbours."""
        self._start_P = torch.empty_like(self._length_P)
        self._start_P[order_P] = self._length_P[order_P].cumsum(0) - self._length_P[order_P]
        self.restart()

    def restart(self) -> None:
        """Forget what grew; the rows are the prompts again."""
        self._prompt_N = torch.arange(len(self._length_P))
        self._grown = 0
        self._moved_N: Tensor | None = None
        self._own: list[Tensor] = [torch.empty(0)] * len(self._store.layers)
        self._stacks: list[_Stack] = []

    def grow(self, parent_N: Tensor) -> Tensor:
        """Rows `parent_N` of the last level get one token each; returns its position, int64 `[N]`.

        Raises:
            ValueError: a prompt gets more rows than there is room for.
        """
        here_N = parent_N.cpu()
        prompt_N = self._prompt_N[here_N]
        if int(prompt_N.bincount().max()) > self._rows:
            raise ValueError(f"a prompt grows into more than {self._rows} rows")
        stayed = len(parent_N) == len(self._prompt_N) and bool((here_N == torch.arange(len(here_N))).all())
        self._moved_N = None if stayed else parent_N.to(self._device)
        self._prompt_N = prompt_N
        self._stacks = list(self._stacked(prompt_N))
        self._grown += 1
        return self._length_P[prompt_N] + self._grown - 1

    def _stacked(self, prompt_N: Tensor) -> list[_Stack]:
        """Stack the rows; a prompt without rows takes no part, and interrupts its neighbours."""
        counts_P = prompt_N.bincount(minlength=len(self._length_P))
        row_N = prompt_N.argsort(stable=True)
        rank_N = torch.arange(len(prompt_N)) - (counts_P.cumsum(0) - counts_P)[prompt_N[row_N]]
        row_PR = torch.zeros((len(counts_P), self._rows), dtype=torch.long)
        row_PR[prompt_N[row_N], rank_N] = row_N
        taken_PR = torch.arange(self._rows) < counts_P[:, None]

        order_P = torch.tensor(self.order)
        live_P = order_P[counts_P[order_P] > 0]
        length_P, start_P = self._length_P[live_P], self._start_P[live_P]
        breaks = torch.ones(len(live_P), dtype=torch.bool)
        breaks[1:] = (length_P[1:] != length_P[:-1]) | (start_P[1:] != start_P[:-1] + length_P[:-1])
        first = breaks.nonzero()[:, 0].tolist()
        stacks = []
        for begin, end in zip(first, [*first[1:], len(live_P)], strict=True):
            some_P = live_P[begin:end]
            place_M = taken_PR[some_P].flatten().nonzero()[:, 0]
            stacks.append(
                _Stack(
                    start=int(start_P[begin]),
                    length=int(length_P[begin]),
                    row_PR=row_PR[some_P].to(self._device),
                    row_M=row_PR[some_P].flatten()[place_M].to(self._device),
                    place_M=place_M.to(self._device),
                )
            )
        return stacks

    def attend(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, output_NHD: Tensor) -> None:
        """Attention of the newest tokens to their prompts, their ancestors and themselves, into `output_NHD`.

        Call it once per layer after each `grow`.
        """
        shape = self._store.layers[layer]
        own_2TNKD = self._with_newest(layer, key_NKD, value_NKD)
        seen = slice(max(0, self._grown - (shape.window or self._grown)), self._grown)
        grouped_NKGD = query_NHD.view(len(query_NHD), shape.kv_heads, -1, shape.head_size)
        prompt_NHD, lse_NH = self._prompt_attention(layer, query_NHD)
        shape_NKG = grouped_NKGD.shape[:3]
        parts = own_attention(grouped_NKGD, own_2TNKD[:, seen], shape.scale)

        weight_NKGP = torch.stack([lse_NH.view(shape_NKG), *(score.float() for _, score in parts)], -1).softmax(-1)
        joined_NKGD = prompt_NHD.float().view(grouped_NKGD.shape) * weight_NKGP[..., :1]
        for place, (content, _) in enumerate(parts, start=1):
            joined_NKGD.addcmul_(content, weight_NKGP[..., place : place + 1])
        output_NHD.copy_(joined_NKGD.view(output_NHD.shape))

    def _with_newest(self, layer: int, key_NKD: Tensor, value_NKD: Tensor) -> Tensor:
        """Keys and values of each row's own tokens, the newest among them, `[2, room, N, K, D]`."""
        level, own = self._grown - 1, self._own[layer]
        if not level:
            own = key_NKD.new_empty(2, ROOM, *key_NKD.shape)
        elif self._moved_N is not None or level == own.shape[1]:
            before_2TNKD, own = own[:, :level], key_NKD.new_empty(2, -(-self._grown // ROOM) * ROOM, *key_NKD.shape)
            for before_TNKD, now_TNKD in zip(before_2TNKD, own[:, :level], strict=True):
                if self._moved_N is None:
                    now_TNKD.copy_(before_TNKD)
                else:
                    torch.index_select(before_TNKD, 1, self._moved_N, out=now_TNKD)
        own[0, level], own[1, level] = key_NKD, value_NKD
        self._own[layer] = own
        return own

    def _prompt_attention(self, layer: int, query_NHD: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to the prompts, and its log-sum-exp `[N, H]`: minus infinity where the window has left a prompt."""
        shape = self._store.layers[layer]
        output_NHD = torch.zeros_like(query_NHD)
        lse_NH = torch.full(query_NHD.shape[:2], -torch.inf, device=query_NHD.device)
        for stack in self._stacks:
            # A query at position length + grown - 1 sees the last `window` positions, its own with them.
            hidden = 0 if shape.window is None else max(0, stack.length + self._grown - shape.window)
            if hidden >= stack.length:
                continue
            prompts, places = stack.row_PR.shape
            key_PXKD, value_PXKD = self._store.read(layer, stack.start, prompts, stack.length)
            # The query heads of a key-value head are stacked too.
            grouped = (prompts, places, shape.kv_heads, -1, shape.head_size)
            query_PRHD = query_NHD.index_select(0, stack.row_PR.flatten()).view(grouped)
            some_PKYD, lse_PKY = attention(
                query_PRHD.permute(0, 2, 3, 1, 4).flatten(2, 3),
                key_PXKD[:, hidden:].transpose(1, 2),
                value_PXKD[:, hidden:].transpose(1, 2),
                shape.scale,
            )
            by_head = (prompts, shape.kv_heads, -1, places)
            some_XHD = (
                some_PKYD.view(*by_head, shape.head_size).permute(0, 3, 1, 2, 4).reshape(-1, *query_NHD.shape[1:])
            )
            lse_XH = lse_PKY.view(by_head).permute(0, 3, 1, 2).reshape(-1, shape.heads)
            output_NHD[stack.row_M] = some_XHD[stack.place_M]
            lse_NH[stack.row_M] = lse_XH[stack.place_M].float()
        return output_NHD, lse_NH
