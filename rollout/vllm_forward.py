"""Forward passes of a vLLM model with keys and values of ours, past its scheduler and its cache.

vLLM finds the attention layers of a forward pass by name in its context. There we put stand-ins: while prompts are
computed they run the layer's own kernel on a cache of ours, while branches are computed they hand over to
`rollout.branches`. vLLM's layers, and the caches in them, stay as they are.

The names of vLLM that this touches are listed in `rollout.vllm_internals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import RequestError
from rollout import vllm_internals as internals
from rollout.branches import LayerShape
from rollout.paging import Placement


@dataclass(frozen=True)
class LayerGroup:
    """Attention layers that share their metadata."""

    group: Any
    layers: dict[int, str]
    """Name by number; layers are numbered over all groups."""
    block_size: int


@dataclass
class AdapterSlot:
    """The LoRA adapter of an engine."""

    enabled: bool
    """Whether the engine was started with room for one."""
    request: Any = None
    """What names it inside vLLM; none before the first push of one that is pushed."""


@dataclass(frozen=True)
class RunnerView:
    """What the beam loop needs of a model runner."""

    runner: Any
    groups: list[LayerGroup]
    shapes: list[LayerShape]
    """Of every attention layer, in order of their numbers."""
    dtype: torch.dtype
    """Of keys and values."""
    device: torch.device
    adapter: AdapterSlot
    """The LoRA adapter to apply."""

    def layer(self, name: str) -> Any:
        """A live attention layer."""
        return self.runner.vllm_config.compilation_config.static_forward_context[name]


def view(runner: Any, adapter: Path | None = None, *, live_adapter: bool = False) -> RunnerView:
    """The view of a live model runner, with the LoRA adapter that was loaded into it or is pushed to it.

    Raises:
        RequestError: the model has layers that keep something else than keys and values, or scores that are more than
            scaled products.
    """
    groups: list[LayerGroup] = []
    shapes: list[LayerShape] = []
    layers = runner.vllm_config.compilation_config.static_forward_context
    for group in (group for kind in runner.attn_groups for group in kind):
        names = {len(shapes) + place: name for place, name in enumerate(group.layer_names)}
        shapes += [_layer_shape(name, layers[name]) for name in group.layer_names]
        # One `[blocks, heads, block size, content]` view per layer, in this order of axes in every layout.
        groups.append(LayerGroup(group, names, layers[group.layer_names[0]].kv_cache.shape[2]))
    cache = layers[groups[0].layers[0]].kv_cache
    slot = AdapterSlot(
        live_adapter or adapter is not None, None if adapter is None else internals.lora_request(adapter)
    )
    return RunnerView(runner, groups, shapes, cache.dtype, runner.device, slot)


def _layer_shape(name: str, layer: Any) -> LayerShape:
    from vllm.model_executor.layers.attention import Attention

    legal = "softmax attention over keys and values of its own, or the reference engine"
    if type(layer) is not Attention:
        raise RequestError(f"layer {name} of the model", type(layer).__name__, legal)
    special = {
        "shared keys": layer.kv_sharing_target_layer_name is not None,
        "values of another size": layer.head_size_v != layer.head_size,
        "quantised keys": not layer.kv_cache.is_floating_point() or layer.kv_cache.itemsize < 2,
        "capped scores": bool(getattr(layer.impl, "logits_soft_cap", 0)),
        "position biases": getattr(layer.impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(layer.impl, "sinks", None) is not None,
    }
    for found, there in special.items():
        if there:
            raise RequestError(f"layer {name} of the model", found, legal)
    return LayerShape(
        heads=layer.num_heads,
        kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        scale=layer.impl.scale,
        window=layer.sliding_window,
    )


@dataclass(frozen=True)
class _StandIn:
    """Takes the place of an attention layer, and of its implementation, in the context of a forward pass."""

    kv_cache: Tensor
    attend: Callable[..., Tensor]
    """Gets what the implementation gets: query, key, value, cache, metadata and, by name, the output."""
    layer: Any = None
    """The layer whose place it takes, for filling the cache."""

    @property
    def impl(self) -> _StandIn:
        """What the layer delegates to."""
        return self

    def do_kv_cache_update(self, _: Any, *tensors: Tensor) -> None:
        """Write keys and values into the cache, as the layer does it."""
        self.layer.impl.do_kv_cache_update(self.layer, *tensors)

    def forward(self, _: Any, *inputs: Any, **named: Any) -> Tensor:
        """Attention."""
        return self.attend(*inputs, **named)


def own_caches(view: RunnerView, tokens: int, prompts: int) -> list[Tensor]:
    """A cache of every layer that holds `tokens` tokens of `prompts` prompts, laid out like vLLM's own."""
    caches = []
    for group in view.groups:
        blocks = 1 + -(-tokens // group.block_size) + prompts
        for name in group.layers.values():
            theirs = view.layer(name).kv_cache
            order = sorted(range(1, theirs.dim()), key=lambda axis: theirs.stride(axis), reverse=True)
            ordered = torch.zeros(
                (blocks, *(theirs.shape[axis] for axis in order)), dtype=theirs.dtype, device=theirs.device
            )
            back = [0] * theirs.dim()
            for place, axis in enumerate(order, start=1):
                back[axis] = place
            caches.append(ordered.permute(back))
    return caches


def prefill(
    view: RunnerView,
    token_X: Tensor,
    lengths: Sequence[int],
    caches: Sequence[Tensor],
    keep: Callable[[int, Tensor, Tensor], None],
    logit_M: Tensor,
    vocabulary_V: Tensor | None = None,
) -> Tensor:
    """One forward pass over whole prompts in a cache of ours; logits `[M, V]` of the tokens `logit_M`.

    `keep` gets the number, the keys and the values of every layer. `vocabulary_V` as in `_logits`.
    """
    metadata: dict[str, Any] = {}
    slots: dict[str, Tensor] = {}
    stand_ins: dict[str, Any] = {}
    for group in view.groups:
        placement = Placement.of(lengths, group.block_size)
        slot_X = placement.slot_X.to(view.device)
        built = group.group.get_metadata_builder(0).build(0, _common_metadata(placement, slot_X, view.device))
        for number, name in group.layers.items():
            metadata[name], slots[name] = built, slot_X
            layer = view.layer(name)
            stand_ins[name] = _StandIn(caches[number], partial(_kept_attention, layer, partial(keep, number)), layer)
    hidden_XD = _forward(view, token_X, placement.position_X, len(logit_M), metadata, slots, stand_ins)
    return _logits(view, hidden_XD[logit_M.to(view.device)], vocabulary_V)


def branch(
    view: RunnerView,
    token_N: Tensor,
    position_N: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
    vocabulary_V: Tensor | None = None,
) -> Tensor:
    """One forward pass over one token of every row, with attention of ours; logits `[N, V]`.

    `attend` gets the number of the layer, queries, keys, values, and where the output goes. `vocabulary_V` as in
    `_logits`.
    """
    nothing = torch.empty(0)
    stand_ins = {
        name: _StandIn(nothing, partial(_branch_attention, partial(attend, number)))
        for group in view.groups
        for number, name in group.layers.items()
    }
    hidden_ND = _forward(view, token_N, position_N, len(token_N), dict.fromkeys(stand_ins), {}, stand_ins)
    return _logits(view, hidden_ND, vocabulary_V)


def _kept_attention(
    layer: Any,
    keep: Callable[[Tensor, Tensor], None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    **named: Any,
) -> Tensor:
    keep(key, value)
    output: Tensor = layer.impl.forward(layer, query, key, value, *rest, **named)
    return output


def _branch_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    output: Tensor,
    **named: Any,
) -> Tensor:
    attend(query, key, value, output)
    return output


def _common_metadata(placement: Placement, slot_X: Tensor, device: torch.device) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    prompts = len(placement.length_P)
    start_cpu = torch.zeros(prompts + 1, dtype=torch.int32)
    start_cpu[1:] = placement.length_P.cumsum(0)
    longest = int(placement.length_P.max())
    return CommonAttentionMetadata(
        query_start_loc=start_cpu.to(device),
        query_start_loc_cpu=start_cpu,
        seq_lens=placement.length_P.to(device),
        seq_lens_cpu_upper_bound=placement.length_P,
        num_reqs=prompts,
        num_actual_tokens=len(slot_X),
        max_query_len=longest,
        max_seq_len=longest,
        block_table_tensor=placement.block_table_PB.to(device),
        slot_mapping=slot_X,
        causal=True,
    )


def _forward(
    view: RunnerView,
    token_X: Tensor,
    position_X: Tensor,
    logits: int,
    metadata: dict[str, Any],
    slots: dict[str, Tensor],
    stand_ins: dict[str, Any],
) -> Tensor:
    from vllm.forward_context import get_forward_context, set_forward_context

    device, config = view.device, view.runner.vllm_config
    if view.adapter.enabled:
        internals.apply_lora(view.runner, view.adapter.request, tokens=len(token_X), logits=logits)
    with (
        torch.inference_mode(),
        set_forward_context(metadata, config, num_tokens=len(token_X), slot_mapping=slots),
    ):
        context = get_forward_context()
        context.no_compile_layers = {**context.no_compile_layers, **stand_ins}
        hidden_XD: Tensor = view.runner.model(input_ids=token_X.to(device), positions=position_X.to(device))
    return hidden_XD


def _logits(view: RunnerView, hidden_MD: Tensor, vocabulary_V: Tensor | None) -> Tensor:
    """Logits of the whole vocabulary, or of the tokens `vocabulary_V` only."""
    with torch.inference_mode():
        if vocabulary_V is None:
            logits_MV: Tensor = view.runner.model.compute_logits(hidden_MD)
            return logits_MV
        # Torch's products of few rows add in another order than those of many.
        rows = len(hidden_MD)
        padded_MD = torch.nn.functional.pad(hidden_MD, (0, 0, 0, -rows % _ROWS))
        weight_VD = view.runner.model.lm_head.weight.index_select(0, vocabulary_V)
        return torch.nn.functional.linear(padded_MD, weight_VD)[:rows]


_ROWS = 32


def head_has_rows(view: RunnerView) -> bool:
    """Whether the logits of a token are the product of one row of a plain matrix, which lies in this worker."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    model = view.runner.model
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    if view.adapter.enabled or head is None or processor is None:
        return False
    if view.runner.vllm_config.parallel_config.tensor_parallel_size > 1:
        return False
    plain = type(head.quant_method) is UnquantizedEmbeddingMethod and getattr(head, "bias", None) is None
    as_is = processor.soft_cap is None and processor.scale == 1.0 and processor.head_dtype in (None, head.weight.dtype)
    return plain and as_is


def use_fused_norms() -> None:
    """Let RMSNorm on a CPU run in vLLM's C++ kernels, which vLLM itself uses on GPUs only.

    On a CPU it is half a dozen passes of plain torch otherwise, most of the time of a small model's prefill. The
    kernels round once, after the product with the weight, where the plain operations round before it too.
    """
    from vllm import ir

    if _FUSED not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(_FUSED, supports_args=_fusible)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(_FUSED, supports_args=_fusible_sum, inplace=True)(_fused_add_rms_norm)
    ir.ops.rms_norm.set_default([_FUSED, "native"])
    ir.ops.fused_add_rms_norm.set_default([_FUSED, "native"])


_FUSED = "windlass_cpu"


def _fusible(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    # The kernel takes neighbouring rows for granted, which those of a part of a projection are not.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    output = torch.empty_like(rows)
    torch.ops._C.rms_norm(output, rows, weight, epsilon)
    return output.view(x.shape)


def _fusible_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fusible(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
