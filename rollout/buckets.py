"""Packed buckets: how the weights of a model are laid out as bytes, packed, checked and unpacked.

The tensors of a push form one stream of bytes, each tensor aligned to 16 bytes, and the stream is cut into buckets of
one size, so that a tensor larger than a bucket spans several and the memory of the movers is bounded by the setting
alone. The layout (names, types, shapes, offsets) travels once, in the metadata message; every bucket carries a header
with its index, the version and the xxh3 checksum of its payload, because the payload of a sharded learner is gathered
while it is being sent and its checksums are not known before. Tied tensors travel once: the others are aliases.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from data.errors import RequestError, RunError

HEADER_BYTES = 64
"""Room of the header in front of the payload; keeps the payload aligned for every dtype."""
ALIGNMENT = 16
"""Bytes to which every tensor of the stream, and the bucket size, are aligned."""
_HEADER = struct.Struct("<8sIIqqQ")
_MAGIC = b"windlass"
_FORMAT = 1
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class BucketError(RunError):
    """A bucket is not what was announced: wrong checksum, version, index, size or tensor."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to send, by its Hugging Face name."""

    name: str
    dtype: str
    """Name of the torch dtype on the wire, e.g. `bfloat16`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return torch.Size(self.shape).numel() * wire_dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every tensor lies in the stream, and how the stream is cut."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """First byte of each tensor in the stream, increasing."""
    total_bytes: int
    bucket_bytes: int
    """Payload of every bucket but the last, which is shorter."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that are tied to another tensor, mapped to the name that travels."""

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return -(-self.total_bytes // self.bucket_bytes)

    def payload_bytes(self, index: int) -> int:
        """Payload of bucket `index` in bytes."""
        return min(self.bucket_bytes, self.total_bytes - index * self.bucket_bytes)


def wire_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in a `TensorSpec`; raises RequestError for one that cannot travel."""
    if name not in _DTYPES:
        raise RequestError("weight push dtype", name, ", ".join(_DTYPES))
    return _DTYPES[name]


def plan_buckets(specs: Iterable[TensorSpec], *, bucket_bytes: int, aliases: Mapping[str, str] | None = None) -> Layout:
    """Lay the tensors out in the given order.

    Raises:
        RequestError: a name occurs twice, an alias points nowhere, or the bucket size is not a multiple of 16.
    """
    if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT:
        raise RequestError("bucket_bytes", bucket_bytes, f"a positive multiple of {ALIGNMENT}")
    ordered = tuple(specs)
    names = {spec.name for spec in ordered}
    if len(names) != len(ordered):
        twice = sorted({s.name for s in ordered if sum(o.name == s.name for o in ordered) > 1})
        raise RequestError("names of a weight push", twice, "each name once")
    for alias, name in (aliases or {}).items():
        if name not in names or alias in names:
            raise RequestError("tied weight", f"{alias} -> {name}", "an alias of one tensor that travels")
    offsets, end = [], 0
    for spec in ordered:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(offset)
        end = offset + spec.nbytes
    return Layout(
        specs=ordered,
        offsets=tuple(offsets),
        total_bytes=end,
        bucket_bytes=bucket_bytes,
        aliases=dict(aliases or {}),
    )


def describe_module(module: torch.nn.Module, dtype: str | None = None) -> tuple[list[TensorSpec], dict[str, str]]:
    """Tensors of a module that a push carries (parameters and persistent buffers), and its tied names.

    Args:
        module: a Hugging Face model, or anything whose names the engine knows.
        dtype: dtype on the wire of floating tensors; None keeps their own.
    """
    first_name: dict[int, str] = {}
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        own = str(tensor.dtype).removeprefix("torch.")
        specs.append(
            TensorSpec(
                name=name, dtype=dtype if dtype and tensor.is_floating_point() else own, shape=tuple(tensor.shape)
            )
        )
    return specs, aliases


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [nbytes] view (or copy, when not contiguous) of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def checksum(payload: Tensor) -> int:
    """xxh3 (64 bit) of a uint8 tensor; one on a GPU is copied to the host first."""
    return int(xxhash.xxh3_64_intdigest(payload.cpu().numpy().data))


def seal(buffer: Tensor, *, index: int, version: int) -> int:
    """Write the header into a uint8 buffer whose payload is complete; returns the checksum."""
    payload = buffer[HEADER_BYTES:]
    digest = checksum(payload)
    header = _HEADER.pack(_MAGIC, _FORMAT, index, version, payload.numel(), digest)
    header += bytes(HEADER_BYTES - len(header))
    buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    return digest


def open_sealed(buffer: Tensor, *, index: int, version: int, payload_bytes: int) -> tuple[Tensor, int]:
    """Payload and checksum of a received bucket.

    Raises:
        BucketError: it is not bucket `index` of push `version`, or its bytes differ from what the sender packed.
    """
    magic, form, found_index, found_version, nbytes, digest = _HEADER.unpack(
        bytes(buffer[: _HEADER.size].cpu().numpy())
    )
    if (magic, form) != (_MAGIC, _FORMAT):
        raise BucketError(f"bucket {index} of version {version}: no bucket header (got {magic!r}, format {form})")
    if (found_index, found_version, nbytes) != (index, version, payload_bytes):
        raise BucketError(
            f"bucket {index} of version {version} ({payload_bytes} bytes) expected, "
            f"got bucket {found_index} of version {found_version} ({nbytes} bytes)"
        )
    payload = buffer[HEADER_BYTES : HEADER_BYTES + nbytes]
    found = checksum(payload)
    if found != digest:
        raise BucketError(f"bucket {index} of version {version}: checksum {found:016x}, the sender's is {digest:016x}")
    return payload, digest


def pack(
    layout: Layout, tensors: Iterable[tuple[str, Tensor]], *, version: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor, int]]:
    """Pack tensors in the order of the layout; yields (bucket index, sealed buffer, checksum).

    The buffer is reused: the consumer must be done with it before it asks for the next. Tensors named as aliases are
    passed over, so that a source may yield tied tensors twice.

    Raises:
        BucketError: the source yields other names, shapes or fewer tensors than the layout announces.
    """
    buffer = torch.zeros(HEADER_BYTES + min(layout.bucket_bytes, layout.total_bytes), dtype=torch.uint8, device=device)
    index, filled = 0, 0

    def full() -> tuple[int, Tensor, int]:
        sealed = buffer[: HEADER_BYTES + layout.payload_bytes(index)]
        return index, sealed, seal(sealed, index=index, version=version)

    expected = iter(zip(layout.specs, layout.offsets, strict=True))
    for name, tensor in tensors:
        if name in layout.aliases:
            continue
        spec, offset = next(expected, (None, 0))
        if spec is None or spec.name != name or spec.shape != tuple(tensor.shape):
            raise BucketError(
                f"the weight source yielded {name} {tuple(tensor.shape)} where the metadata announced "
                f"{f'{spec.name} {spec.shape}' if spec else 'the end'}"
            )
        data = as_bytes(tensor.detach().to(wire_dtype(spec.dtype)))
        position, taken = offset, 0
        while taken < data.numel():
            start = position - index * layout.bucket_bytes
            if start >= layout.bucket_bytes:
                yield full()
                index += 1
                continue
            count = min(data.numel() - taken, layout.bucket_bytes - start)
            buffer[HEADER_BYTES + start : HEADER_BYTES + start + count] = data[taken : taken + count]
            position, taken = position + count, taken + count
        filled = max(filled, position)
    rest = next(expected, None)
    if rest is not None:
        raise BucketError(f"the weight source ended before {rest[0].name}")
    if filled > index * layout.bucket_bytes:
        yield full()


class Unpacker:
    """Turns the buckets of one push back into tensors, in the order of the layout."""

    def __init__(self, layout: Layout, *, version: int) -> None:
        self._layout = layout
        self._version = version
        self._entry = 0
        self._partial: Tensor | None = None
        self.checksums: list[int] = []
        """Checksums of the buckets so far, verified."""

    @property
    def complete(self) -> bool:
        """True when every bucket has arrived."""
        return len(self.checksums) == self._layout.buckets

    def feed(self, buffer: Tensor) -> list[tuple[str, Tensor]]:
        """Check the next bucket; returns the tensors it completes, as views of `buffer` where they lie in it whole.

        Raises:
            BucketError: see `open_sealed`.
        """
        layout, index = self._layout, len(self.checksums)
        payload, digest = open_sealed(
            buffer, index=index, version=self._version, payload_bytes=layout.payload_bytes(index)
        )
        low = index * layout.bucket_bytes
        high = low + payload.numel()
        done: list[tuple[str, Tensor]] = []
        while self._entry < len(layout.specs):
            spec, start = layout.specs[self._entry], layout.offsets[self._entry]
            end = start + spec.nbytes
            if start >= high and spec.nbytes:
                break
            if start >= low and end <= high:
                data = payload[start - low : end - low]
            else:
                if self._partial is None:
                    self._partial = torch.empty(spec.nbytes, dtype=torch.uint8, device=buffer.device)
                first, last = max(start, low), min(end, high)
                self._partial[first - start : last - start] = payload[first - low : last - low]
                if end > high:
                    break
                data, self._partial = self._partial, None
            done.append((spec.name, data.view(wire_dtype(spec.dtype)).view(spec.shape)))
            self._entry += 1
        self.checksums.append(digest)
        return done
