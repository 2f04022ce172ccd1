"""Joined attention equals plain softmax attention of every row to its prompt and its ancestors.

The oracle copies the prompt to every row and computes in float64. Checked: random trees, prompts of any lengths,
prompts that lose all their rows, rows that stay, grouped heads, sliding windows, few own tokens and many, both ways of
the attention kernel, equal bits alone and together, starting anew. Not here: the model around it (test_engines.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout import branches as module
from rollout.branches import Branches, LayerShape, PromptStore, attention

SIZE = 8
CPU = torch.device("cpu")


def expected_attention(query_HD: Tensor, keys: list[Tensor], values: list[Tensor], shape: LayerShape) -> Tensor:
    """One row, keys and values `[K, D]` of all positions it may see in order."""
    seen = slice(-shape.window if shape.window else None, None)
    key_XHD, value_XHD = (
        torch.stack(content[seen]).double().repeat_interleave(shape.heads // shape.kv_heads, 1)
        for content in (keys, values)
    )
    weight_HX = (torch.einsum("hd,xhd->hx", query_HD.double(), key_XHD) * shape.scale).softmax(-1)
    return torch.einsum("hx,xhd->hd", weight_HX, value_XHD)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Wave:
    """Prompts in a store, and beside it every row's keys and values as plain lists."""

    def __init__(self, lengths: list[int], shapes: list[LayerShape], rows: int, seeds: list[int]) -> None:
        self.shapes = shapes
        self.seeds = seeds
        store = PromptStore(shapes, dtype=torch.float32, device=CPU)
        store.reserve(sum(lengths))
        self.branches = Branches(store, lengths, rows=rows, device=CPU)
        self.roots: list[list[tuple[list[Tensor], list[Tensor]]]] = [[] for _ in shapes]
        for layer, shape in enumerate(shapes):
            contents = [
                normals(seed + layer, 2, n, shape.kv_heads, SIZE) for seed, n in zip(seeds, lengths, strict=True)
            ]
            self.roots[layer] = [(list(key), list(value)) for key, value in contents]
            start = 0
            for prompt in self.branches.order:
                store.write(layer, start, *contents[prompt])
                start += lengths[prompt]
        self.restart()

    def restart(self) -> None:
        self.rows = [list(roots) for roots in self.roots]
        self.prompts = list(range(len(self.seeds)))

    def grow(self, parents: list[int], level: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Per layer the joined attention and the expected one."""
        position_N = self.branches.grow(torch.tensor(parents))
        assert position_N.tolist() == [len(self.rows[0][parent][0]) for parent in parents]
        self.prompts = [self.prompts[parent] for parent in parents]
        for layer, shape in enumerate(self.shapes):
            # A row's content follows from its prompt and its place in it, as in a model.
            ranks = [self.prompts[:row].count(prompt) for row, prompt in enumerate(self.prompts)]
            seeds = [
                1000 * self.seeds[p] + 100 * level + 10 * layer + r for p, r in zip(self.prompts, ranks, strict=True)
            ]
            query_NHD, key_NKD, value_NKD = (
                torch.stack([normals(seed + part * 10**6, heads, SIZE) for seed in seeds])
                for part, heads in enumerate((shape.heads, shape.kv_heads, shape.kv_heads))
            )
            output_NHD = torch.full_like(query_NHD, torch.nan)
            self.branches.attend(layer, query_NHD, key_NKD, value_NKD, output_NHD)
            grown = [
                ([*self.rows[layer][parent][0], key], [*self.rows[layer][parent][1], value])
                for parent, key, value in zip(parents, key_NKD, value_NKD, strict=True)
            ]
            self.rows[layer] = grown
            yield (
                output_NHD,
                [expected_attention(query, *row, shape) for query, row in zip(query_NHD, grown, strict=True)],
            )


shapes = st.builds(
    lambda kv_heads, grouped, window: LayerShape(
        heads=kv_heads * grouped, kv_heads=kv_heads, head_size=SIZE, scale=0.4, window=window
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2, 5, 100]),
)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    layers=st.lists(shapes, min_size=1, max_size=2),
    rows=st.integers(1, 4),
    plain=st.booleans(),
    few=st.integers(0, 4),
    room=st.integers(1, 3),
    data=st.data(),
)
def test_joined_attention_is_attention(
    lengths: list[int], layers: list[LayerShape], rows: int, plain: bool, few: int, room: int, data: st.DataObject
) -> None:
    wave = Wave(lengths, layers, rows, list(range(len(lengths))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW", few)
        patch.setattr(module, "ROOM", room)
        if plain:
            patch.setattr(module, "attention", plain_attention)
        for again in range(2):
            for level in range(4):
                # Samples and single beams stay where they are.
                stays = level > 0 and data.draw(st.booleans())
                parents = list(range(len(wave.prompts))) if stays else []
                for prompt in range(0 if stays else len(lengths)):
                    mine = [row for row, owner in enumerate(wave.prompts) if owner == prompt]
                    if mine:
                        parents += data.draw(st.lists(st.sampled_from(mine), min_size=0, max_size=rows))
                if not parents:
                    break
                for found, expected in wave.grow(parents, level + 4 * again):
                    torch.testing.assert_close(found.double(), torch.stack(expected), atol=2e-6, rtol=0)
            wave.branches.restart()
            wave.restart()


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The way of devices without a kernel of torch's that returns the log-sum-exp."""
    return module.plain_attention(query, key, value, scale)


def test_both_kernels_agree_in_bfloat16() -> None:
    query, key, value = (normals(part, 3, 2, n, 32).bfloat16() for part, n in enumerate((5, 70, 70)))
    for found, expected in zip(attention(query, key, value, 0.2), plain_attention(query, key, value, 0.2), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("few", [0, 8])
def test_equal_bits_alone_and_together(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", few)
    layers = [LayerShape(heads=4, kv_heads=2, head_size=SIZE, scale=0.4)]
    lengths, growth = [300, 40, 300, 7], [[0, 0, 1, 2, 2, 3], [0, 1, 1, 2, 3, 4, 5, 5]]
    together = Wave(lengths, layers, 3, [1, 2, 3, 4])
    found: list[list[Tensor]] = [[] for _ in lengths]
    for level, parents in enumerate(growth):
        for output_NHD, _ in together.grow(parents, level):
            for row, prompt in enumerate(together.prompts):
                found[prompt].append(output_NHD[row])
    for prompt, length in enumerate(lengths):
        alone = Wave([length], layers, 3, [prompt + 1])
        owners = list(range(len(lengths)))
        mine: list[Tensor] = []
        for level, parents in enumerate(growth):
            before = [row for row, owner in enumerate(owners) if owner == prompt]
            for output_NHD, _ in alone.grow([before.index(row) for row in parents if owners[row] == prompt], level):
                mine += list(output_NHD)
            owners = [owners[parent] for parent in parents]
        assert all(torch.equal(one, other) for one, other in zip(mine, found[prompt], strict=True))


def test_too_many_rows_are_refused() -> None:
    wave = Wave([3], [LayerShape(heads=1, kv_heads=1, head_size=SIZE, scale=1.0)], 2, [0])
    with pytest.raises(ValueError, match="more than 2 rows"):
        wave.branches.grow(torch.tensor([0, 0, 0]))
