"""Every name of vLLM's internals that windlass touches, and nothing else of vLLM is touched.

vLLM promises none of these, so they are listed (`NAMES`), checked by a test (`missing_names`), and used through
the functions below only. On a new vLLM version this is the file to read first.

`vllm` is imported inside the functions: the module itself imports without it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.errors import RequestError
from rollout.branches import LayerShape
from rollout.paging import Placement

VLLM_VERSION = "0.32.0"
"""The version that was read and measured."""

NAMES: dict[str, tuple[str, ...]] = {
    "vllm.LLM": ("collective_rpc", "reset_prefix_cache"),
    "vllm.v1.engine.core_client.InprocClient": ("shutdown",),
    "vllm.distributed.parallel_state.cleanup_dist_env_and_memory": ("shutdown_ray",),
    "vllm.config.VllmConfig": ("model_config", "compilation_config", "cache_config"),
    "vllm.config.ModelConfig": ("get_vocab_size", "max_model_len"),
    "vllm.forward_context.set_forward_context": ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    "vllm.v1.attention.backend.CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
    ),
    "vllm.v1.attention.backend.AttentionMetadataBuilder": ("build",),
    "vllm.v1.worker.utils.AttentionGroup": ("layer_names", "get_metadata_builder"),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": ("load_model",),
    # The rest is for the weight channel (rollout.weight_transfer).
    "vllm.v1.worker.gpu_worker.Worker": ("start_weight_update", "update_weights", "finish_weight_update"),
    "vllm.distributed.weight_transfer.base.WeightTransferEngine": ("receive_weights", "shutdown"),
    "vllm.distributed.weight_transfer.base.WeightTransferInitInfo": (),
    "vllm.distributed.weight_transfer.base.WeightTransferUpdateInfo": (),
    "vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory": ("register_engine", "_registry"),
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": (),
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": (),
    "vllm.model_executor.layers.quantization.base_config.QuantizeMethodBase": ("process_weights_after_loading",),
}
"""Importable name, and its attributes, dataclass fields or parameters that we rely on."""

ENVIRONMENT = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_CPU_OMP_THREADS_BIND")
"""Environment variables of vLLM that the beam loop needs to be honoured."""
RUNNER_ATTRIBUTES = ("attn_groups", "vllm_config", "model", "device")
"""Attributes of a live model runner (set in its constructor, so only a live one shows them)."""
LAYER_ATTRIBUTES = (
    "kv_cache",
    "impl",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "head_size_v",
    "sliding_window",
    "kv_sharing_target_layer_name",
)
"""Attributes of a live attention layer, found through `compilation_config.static_forward_context`."""


def missing_names() -> list[str]:
    """The names of `NAMES` and `ENVIRONMENT` that the installed vLLM does not have."""
    missing = []
    for path, parts in NAMES.items():
        module_name, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError):
            missing.append(path)
            continue
        missing += [f"{path}: {part}" for part in parts if part not in _parts(found)]
    variables = importlib.import_module("vllm.envs").environment_variables
    return missing + [f"vllm.envs: {name}" for name in ENVIRONMENT if name not in variables]


def _parts(found: Any) -> set[str]:
    """Attributes and fields of a class, parameters of a function."""
    if not inspect.isclass(found):
        return set(inspect.signature(found).parameters)
    return {name for base in found.__mro__ for name in (*vars(base), *inspect.get_annotations(base))}


def environment(*, threads: int) -> dict[str, str]:
    """Environment of a process that holds an engine; takes effect when set before torch and vllm are imported."""
    return {
        # The engine core in our process, beside the worker: up in seconds, and calls pass objects, not bytes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The second runner has other internals than those listed here.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        # Learners, engines and rankers share the cores: a thread that waits must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


@dataclass(frozen=True)
class LayerGroup:
    """Attention layers that share their metadata."""

    group: Any
    layers: dict[int, str]
    """Name by number; layers are numbered over all groups."""
    block_size: int


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

    def layer(self, name: str) -> Any:
        """A live attention layer."""
        return self.runner.vllm_config.compilation_config.static_forward_context[name]


def view(runner: Any) -> RunnerView:
    """The view of a live model runner.

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
    return RunnerView(runner, groups, shapes, cache.dtype, runner.device)


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


class _OwnCache:
    """Stands in for an attention layer, and for its implementation, while prompts are computed: the layer works on a
    cache of ours, and its keys and values are handed out."""

    def __init__(self, layer: Any, cache: Tensor, keep: Callable[[Tensor, Tensor], None]) -> None:
        self.kv_cache = cache
        self.impl = self
        self._layer = layer
        self._keep = keep

    def do_kv_cache_update(self, _: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self._layer.impl.do_kv_cache_update(self._layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        self._keep(key, value)
        computed: Tensor = self._layer.impl.forward(
            self._layer, query, key, value, kv_cache, attn_metadata, output=output, **scales
        )
        return computed


class _OwnAttention:
    """Stands in for an attention layer, and for its implementation, while branches are computed."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
        self.kv_cache = torch.empty(0)
        self.impl = self
        self._attend = attend

    def forward(
        self,
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        self._attend(query, key, value, output)
        return output


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
) -> Tensor:
    """One forward pass over whole prompts in a cache of ours; logits `[M, V]` of the tokens `logit_M`.

    `keep` gets the number, the keys and the values of every layer.
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
            stand_ins[name] = _OwnCache(view.layer(name), caches[number], partial(keep, number))
    return _forward(view, token_X, placement.position_X, logit_M, metadata, slots, stand_ins)


def branch(
    view: RunnerView,
    token_N: Tensor,
    position_N: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
) -> Tensor:
    """One forward pass over one token of every row, with attention of ours; logits `[N, V]`.

    `attend` gets the number of the layer, queries, keys, values, and where the output goes.
    """
    stand_ins = {
        name: _OwnAttention(partial(attend, number)) for group in view.groups for number, name in group.layers.items()
    }
    every_N = torch.arange(len(token_N))
    return _forward(view, token_N, position_N, every_N, dict.fromkeys(stand_ins), {}, stand_ins)


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
    logit_M: Tensor,
    metadata: dict[str, Any],
    slots: dict[str, Tensor],
    stand_ins: dict[str, Any],
) -> Tensor:
    from vllm.forward_context import get_forward_context, set_forward_context

    device, config = view.device, view.runner.vllm_config
    with (
        torch.inference_mode(),
        set_forward_context(metadata, config, num_tokens=len(token_X), slot_mapping=slots),
    ):
        context = get_forward_context()
        # Attention layers are looked up here by name. vLLM's own layers, and the caches in them, stay as they are.
        context.no_compile_layers = {**context.no_compile_layers, **stand_ins}
        hidden = view.runner.model(input_ids=token_X.to(device), positions=position_X.to(device))
        logits: Tensor = view.runner.model.compute_logits(hidden[logit_M.to(device)])
    return logits


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


def shutdown(llm: Any) -> None:
    """End an engine whose core runs in this process, and the process group of one that came with it."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory(shutdown_ray=False)


_WEIGHT_TRANSFER_CLASSES = ("WeightTransferEngine", "WeightTransferInitInfo", "WeightTransferUpdateInfo")


def __getattr__(name: str) -> Any:
    """The base classes of the weight transfer, imported when they are asked for."""
    if name in _WEIGHT_TRANSFER_CLASSES:
        return getattr(importlib.import_module("vllm.distributed.weight_transfer.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def weight_transfer_registered(backend: str) -> bool:
    """Whether vLLM knows a weight-transfer backend of that name."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    return backend in WeightTransferEngineFactory._registry


def register_weight_transfer(backend: str, engine: type) -> None:
    """Register a weight-transfer engine."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(backend, engine)


def initialize_layerwise_reload(model: torch.nn.Module) -> None:
    """Give the repacked layers fresh parameters to load into."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload as initialize

    initialize(model)


def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Repack what was loaded."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload as finalize

    finalize(model, model_config)


def process_weights_after_loading(module: Any) -> None:
    """Repack the weight of one layer."""
    module.quant_method.process_weights_after_loading(module)
