"""Contract: packing and unpacking give the tensors back to the bit for any shapes, types and bucket size; a bucket
whose bytes, order, version or size differ from what was announced raises; tied tensors travel once.

Not covered: moving the bytes (test_movers), and buckets on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from rollout.buckets import (
    HEADER_BYTES,
    BucketError,
    Layout,
    TensorSpec,
    Unpacker,
    checksum,
    describe_module,
    pack,
    plan_buckets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def tensors_of(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{i}": (torch.rand(shape, generator=generator) * 100).to(dtype) for i, (shape, dtype) in enumerate(shapes)
    }


def layout_of(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> Layout:
    return plan_buckets(
        [
            TensorSpec(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for n, t in tensors.items()
        ],
        bucket_bytes=bucket_bytes,
    )


def packed(layout: Layout, tensors: dict[str, torch.Tensor], version: int = 3) -> list[torch.Tensor]:
    return [buffer.clone() for _, buffer, _ in pack(layout, tensors.items(), version=version)]


shapes = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=12
)


@settings(max_examples=80, deadline=None)
@given(shapes=shapes, size=st.integers(1, 40))
def test_what_is_packed_comes_back_to_the_bit(shapes: list, size: int) -> None:
    tensors = tensors_of(shapes)
    layout = layout_of(tensors, 16 * size)
    buffers = packed(layout, tensors)
    assert len(buffers) == layout.buckets
    assert all(b.numel() == HEADER_BYTES + layout.payload_bytes(i) for i, b in enumerate(buffers))
    unpacker = Unpacker(layout, version=3)
    back: list[tuple[str, torch.Tensor]] = []
    for buffer in buffers:
        back += unpacker.feed(buffer)
    assert unpacker.complete
    if layout.total_bytes:
        assert [name for name, _ in back] == list(tensors)
    for name, tensor in back:
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    tensors = tensors_of([((7, 5), torch.float32), ((3,), torch.bfloat16)])
    layout = layout_of(tensors, 64)
    buffers = packed(layout, tensors)
    bucket = data.draw(st.integers(0, len(buffers) - 1))
    # Behind the fields the header is padding, which nobody reads.
    meaningful = [*range(40), *range(HEADER_BYTES, buffers[bucket].numel())]
    position = data.draw(st.sampled_from(meaningful))
    buffers[bucket][position] ^= 1 << data.draw(st.integers(0, 7))
    unpacker = Unpacker(layout, version=3)
    for buffer in buffers[:bucket]:
        unpacker.feed(buffer)
    with pytest.raises(BucketError, match=f"bucket {bucket}"):
        unpacker.feed(buffers[bucket])


def test_a_bucket_left_out_or_of_another_push_is_noticed() -> None:
    tensors = tensors_of([((100,), torch.float32)])
    layout = layout_of(tensors, 64)
    buffers = packed(layout, tensors)
    unpacker = Unpacker(layout, version=3)
    unpacker.feed(buffers[0])
    with pytest.raises(BucketError, match=r"bucket 1 of version 3 .* got bucket 2 of version 3"):
        unpacker.feed(buffers[2])
    with pytest.raises(BucketError, match="got bucket 0 of version 2"):
        Unpacker(layout, version=3).feed(packed(layout, tensors, version=2)[0])


def test_checksum_equals_a_known_value() -> None:
    """xxh3_64 of no bytes with seed 0, from the specification of xxHash."""
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0x2D06800538D394C2


@pytest.mark.parametrize("wrong", ["name", "shape", "short", "long"])
def test_a_source_that_breaks_its_word_is_noticed(wrong: str) -> None:
    tensors = tensors_of([((4,), torch.float32), ((5,), torch.float32)])
    layout = layout_of(tensors, 1024)
    found = dict(tensors)
    if wrong == "name":
        found = {"other": tensors["t0"], "t1": tensors["t1"]}
    elif wrong == "shape":
        found["t1"] = torch.zeros(6)
    elif wrong == "short":
        del found["t1"]
    else:
        found["t2"] = torch.zeros(1)
    with pytest.raises(BucketError, match="weight source"):
        list(pack(layout, found.items(), version=1))


def test_tied_tensors_travel_once_and_types_are_cast_on_the_wire() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 4), "head": torch.nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    specs, aliases = describe_module(model, "bfloat16")
    assert [s.name for s in specs] == ["embed.weight"]
    assert aliases == {"head.weight": "embed.weight"}
    layout = plan_buckets(specs, bucket_bytes=1024, aliases=aliases)
    assert layout.total_bytes == 6 * 4 * 2
    (buffer,) = [b.clone() for _, b, _ in pack(layout, model.state_dict(keep_vars=True).items(), version=0)]
    ((_, tensor),) = Unpacker(layout, version=0).feed(buffer)
    assert torch.equal(tensor, model["embed"].weight.detach().bfloat16())


@pytest.mark.parametrize(
    ("specs", "size", "aliases", "match"),
    [
        (["a", "a"], 16, {}, "each name once"),
        (["a"], 24, {}, "multiple of 16"),
        (["a"], 0, {}, "multiple of 16"),
        (["a"], 16, {"b": "c"}, "tied weight"),
    ],
)
def test_impossible_layouts_are_refused(specs: list[str], size: int, aliases: dict[str, str], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        plan_buckets(
            [TensorSpec(name=n, dtype="float32", shape=(1,)) for n in specs], bucket_bytes=size, aliases=aliases
        )


def test_an_unknown_wire_type_is_refused() -> None:
    with pytest.raises(RequestError, match="complex64"):
        plan_buckets([TensorSpec(name="a", dtype="complex64", shape=(1,))], bucket_bytes=16)
