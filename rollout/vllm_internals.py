"""Every name of vLLM's internals that windlass touches, and nothing else of vLLM is touched.

vLLM promises none of these, so they are listed (`NAMES`), checked by a test (`missing_names`), and used through
the functions below and in `rollout.vllm_forward` only. On a new vLLM version this is the file to read first.

`vllm` is imported inside the functions: the module itself imports without it.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

from data.errors import RequestError

VLLM_VERSION = "0.32.0"
"""The version that was read and measured."""

NAMES: dict[str, tuple[str, ...]] = {
    "vllm.LLM": ("collective_rpc", "reset_prefix_cache", "sleep", "wake_up"),
    "vllm.platforms.interface.Platform": ("is_sleep_mode_available",),
    "vllm.engine.arg_utils.EngineArgs": ("enable_sleep_mode", "gpu_memory_utilization"),
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
    "vllm.forward_context.get_forward_context": (),
    "vllm.forward_context.ForwardContext": ("no_compile_layers",),
    "vllm.model_executor.layers.attention.Attention": ("forward",),
    "vllm.v1.attention.backend.AttentionImpl": ("forward",),
    "vllm.v1.attention.backend.AttentionMetadataBuilder": ("build",),
    "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod": (),
    "vllm.model_executor.layers.logits_processor.LogitsProcessor": ("forward",),
    "vllm.ir.op.IrOp": ("register_impl", "set_default"),
    "vllm.v1.worker.utils.AttentionGroup": ("layer_names", "get_metadata_builder"),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": ("load_model",),
    "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin": ("_set_active_loras",),
    "vllm.v1.engine.llm_engine.LLMEngine": ("add_lora",),
    "vllm.lora.request.LoRARequest": ("lora_int_id",),
    "vllm.lora.lora_model.LoRAModel": ("from_lora_tensors",),
    "vllm.lora.peft_helper.PEFTHelper": ("r", "lora_alpha", "target_modules"),
    "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager": ("remove_all_adapters",),
    "vllm.lora.model_manager.LRUCacheLoRAModelManager": ("add_adapter",),
    # The rest is for the weight channel (rollout.weight_transfer).
    "vllm.v1.worker.gpu_worker.Worker": ("start_weight_update", "update_weights", "finish_weight_update"),
    "vllm.distributed.weight_transfer.base.WeightTransferEngine": ("receive_weights", "shutdown"),
    "vllm.distributed.weight_transfer.base.WeightTransferInitInfo": (),
    "vllm.distributed.weight_transfer.base.WeightTransferUpdateInfo": (),
    "vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory": ("register_engine", "_registry"),
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator": (
        "from_unique_id_bytes",
        "broadcast",
        "destroy",
    ),
    "vllm.distributed.device_communicators.pynccl_wrapper.NCCLLibrary": ("ncclGetUniqueId",),
    "vllm.distributed.device_communicators.pynccl_wrapper.ncclUniqueId": ("internal",),
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


def environment(*, threads: int, batch_invariant: bool = False) -> dict[str, str]:
    """Environment of a process that holds an engine; takes effect when set before torch and vllm are imported."""
    return {
        # The engine core in our process, beside the worker: up in seconds, and calls pass objects, not bytes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The second runner has other internals than those listed here.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_BATCH_INVARIANT": str(int(batch_invariant)),
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


_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
_LORA_NUMBER = 1


def lora_arguments(rank: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for one adapter.

    Raises:
        RequestError: the rank is too large for vLLM.
    """
    room = [legal for legal in _LORA_RANKS if legal >= rank]
    if not room:
        raise RequestError("rollout.adapter", f"rank {rank}", f"at most {_LORA_RANKS[-1]}")
    return {"enable_lora": True, "max_lora_rank": room[0], "max_loras": 1}


def add_lora(llm: Any, adapter: Path) -> None:
    """Load the adapter into every worker."""
    llm.llm_engine.add_lora(lora_request(adapter))


def lora_request(adapter: Path) -> Any:
    """What names the adapter inside vLLM."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("windlass", _LORA_NUMBER, str(adapter))


def apply_lora(runner: Any, request: Any, *, tokens: int, logits: int) -> None:
    """Apply the adapter (none: no adapter) to every token and every row of logits of the next forward pass."""
    number = 0 if request is None else request.lora_int_id
    runner._set_active_loras((number,) * logits, (number,) * tokens, set() if request is None else {request})


def replace_lora(runner: Any, tensors: dict[str, torch.Tensor], *, version: int, rank: int, alpha: int) -> Any:
    """Retire the adapter that is there and add one of the given factors; returns what names it inside vLLM.

    Args:
        runner: model runner of an engine that was started with room for an adapter.
        tensors: factors by PEFT's names.
        version: of the weights; another number for every adapter.
        rank: of the factors.
        alpha: of their scale.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    manager = runner.lora_manager
    mapper = getattr(runner.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        _LORA_NUMBER + 1 + version,
        tensors,
        PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),
        device=str(runner.device),
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    manager.remove_all_adapters()
    manager._adapter_manager.add_adapter(adapter)
    return LoRARequest("windlass", adapter.id, "pushed")


CARD_SHARE = 0.92
"""Of a card that vLLM has to itself: what it wants to be free by default."""


def can_sleep() -> bool:
    """Whether vLLM can give memory back on this platform; on CPU it cannot."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_sleep_mode_available())


def fall_asleep(llm: Any, level: int) -> None:
    """Give the memory of weights and caches back: level 1 keeps a copy of the weights on the host, level 2 drops them.

    On CPU vLLM forgets its prefix cache and takes no requests until it is woken, and leaves its memory as it is.
    """
    llm.sleep(level=level)


def wake_up(llm: Any, tag: str) -> None:
    """Take memory for `weights` or `kv_cache`; with both, vLLM takes requests again."""
    llm.wake_up(tags=[tag])


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


def nccl_unique_id() -> bytes:
    """The id of a new group, which every rank must get."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def nccl_communicator(unique_id: bytes, rank: int, size: int, device: torch.device) -> Any:
    """The communicator of vLLM's own `nccl` weight transfer; all ranks must call at once.

    Raises:
        RequestError: it is switched off in this process.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    communicator = PyNcclCommunicator.from_unique_id_bytes(unique_id, rank=rank, world_size=size, device=device)
    if communicator.disabled:
        # Its broadcasts would return at once and leave every buffer as it was.
        legal = "nccl, or no VLLM_DISABLE_PYNCCL in the environment of learners and engines"
        raise RequestError("weights.mover", "vllm_nccl, which vLLM has switched off", legal)
    return communicator


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
