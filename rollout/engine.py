"""Engines: what a rollout engine is, and the one around vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.errors import RequestError, RunError
from data.faults import fault_point
from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout import vllm_internals as internals
from rollout.adapter_check import check_adapter
from rollout.receiving import PushMessage, Receipt, ReceivingEngine
from rollout.settings import EngineKind, RolloutSettings
from rollout.sleeping import Memory


class Engine(Protocol):
    """Generates completions under the constraints of its catalogue, and takes new weights."""

    engine_id: str
    weight_version: int

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec, *, exclude: bool | None = None) -> Groups:
        """Complete every prompt `spec.width` times.

        Args:
            prompts: any number, of any length up to `rollout.max_model_len` less the completion.
            spec: how to decode.
            exclude: whether the constraint is the one with exclusions; by default, whether a prompt has any. A fleet
                decides it for all shards of a request.

        Raises:
            RequestError: the prompts or the spec cannot be decoded; names which and what is legal.
            RunError: the weights are broken or in transit, or the constraint has a dead end.
        """
        ...

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probabilities of each completion token at temperature 1, float32."""
        ...

    def receive_weights(self, message: PushMessage, rank: int) -> Receipt:
        """Take one push; see `rollout.receiving.ReceivingEngine`."""
        ...

    def publish_weights(self, version: int) -> None:
        """Make the pushed version visible."""
        ...

    def fall_asleep(self) -> float:
        """Give memory back until the next push; see `rollout.sleeping`."""
        ...

    def describe(self) -> dict[str, str]:
        """Name and version of what generates, for reports."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


SERVED_SEQUENCES = 4
"""Sequences that vLLM's own cache holds, for requests past the beam loop."""


class VllmEngine(ReceivingEngine):
    """`Engine` around `vllm.LLM`, engine core and worker in this process, the beam loop inside the worker."""

    def __init__(self, settings: RolloutSettings, hf_dir: Path, *, engine_id: str = "vllm-0") -> None:
        """Start the engine: seconds for a small model.

        Raises:
            RequestError: a setting that the model cannot meet.
        """
        longest = longest_sequence(settings, Path(hf_dir))
        if settings.adapter is not None:
            check_adapter(settings.adapter, Path(hf_dir))
        os.environ.update(settings.process_environment())
        # vLLM's CPU worker forbids it afterwards.
        torch.set_num_threads(settings.compute_threads)
        from vllm import LLM

        from rollout.weight_transfer import BACKEND

        self._llm: Any = LLM(
            model=str(hf_dir),
            dtype=settings.dtype.value,
            max_model_len=longest,
            max_num_seqs=SERVED_SEQUENCES,
            max_num_batched_tokens=max(settings.tokens_per_forward, longest),
            kv_cache_memory_bytes=served_cache_bytes(settings, Path(hf_dir), longest),
            block_size=settings.block_size,
            tensor_parallel_size=settings.tensor_parallel,
            distributed_executor_backend="uni" if settings.tensor_parallel == 1 else "mp",
            enforce_eager=True,
            enable_prefix_caching=True,
            # Defaults of the model folder (temperature, top-k) must not leak into anything.
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            worker_extension_cls="rollout.worker.RolloutWorker",
            weight_transfer_config={"backend": BACKEND},
            **_sharing_arguments(settings),
            **_adapter_arguments(settings),
        )
        if settings.adapter is not None:
            internals.add_lora(self._llm, settings.adapter)
        self.engine_id = engine_id
        self.weight_version = 0
        # An adapter is pushed without the matrices below it, so those must outlive a sleep.
        self._sleep_level = 1 if settings.live_adapter.on else 2
        self._rpc("windlass_open", str(hf_dir), settings)

    def _rpc(self, method: str, *arguments: Any) -> list[Any]:
        """What every worker answers; all compute the same."""
        answers: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return answers

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec, *, exclude: bool | None = None) -> Groups:
        """See `Engine.generate`."""
        self.require_visible()
        fault_point("rollout")
        answers: list[Groups] = self._rpc(
            "windlass_generate", list(prompts), spec, exclude, self.weight_version, self.engine_id
        )
        first, *others = answers
        if any(not np.array_equal(first.token_PGT, other.token_PGT) for other in others):
            raise RunError("the workers of a tensor-parallel engine generated different completions")
        return first

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """See `Engine.score`."""
        self.require_awake()
        scores: list[FloatArray] = self._rpc("windlass_score", list(prompts), list(completions))[0]
        return scores

    def _take_push(self, message: PushMessage, rank: int) -> Receipt:
        from rollout.weight_transfer import take_push

        return take_push(self._llm, message, rank)

    def _give_memory(self) -> None:
        self._rpc("windlass_give_memory")
        internals.fall_asleep(self._llm, self._sleep_level)

    def _take_memory(self, memory: Memory) -> None:
        internals.wake_up(self._llm, memory.value)

    def describe(self) -> dict[str, str]:
        """See `Engine.describe`."""
        import vllm

        return {"name": EngineKind.VLLM.value, "version": vllm.__version__}

    def close(self) -> None:
        """Shut the engine core down."""
        internals.shutdown(self._llm)


def _adapter_arguments(settings: RolloutSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the adapter of a folder, or for one that is pushed."""
    if settings.live_adapter.on:
        return internals.lora_arguments(settings.live_adapter.rank)
    return {} if settings.adapter is None else internals.lora_arguments(adapter_rank(settings.adapter))


def _sharing_arguments(settings: RolloutSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that shares its card; none on CPU."""
    arguments: dict[str, Any] = {}
    if 0 < settings.gpus < 1:
        # vLLM wants this share of the card to be free when it starts, whatever it takes of it.
        arguments["gpu_memory_utilization"] = internals.CARD_SHARE * settings.gpus
    if settings.sleeps and internals.can_sleep():
        arguments["enable_sleep_mode"] = True
    return arguments


def engine_class(settings: RolloutSettings) -> type[Any]:
    """The class of `settings.engine`; constructed with (settings, hf_dir, engine_id=…)."""
    if settings.engine is EngineKind.VLLM:
        return VllmEngine
    from rollout.reference_engine import ReferenceEngine

    return ReferenceEngine


def build_engine(settings: RolloutSettings, hf_dir: Path, *, engine_id: str = "engine-0") -> Engine:
    """An engine in this process, with the model and catalogue of `hf_dir`, at weight version 0."""
    engine: Engine = engine_class(settings)(settings, Path(hf_dir), engine_id=engine_id)
    return engine


def longest_sequence(settings: RolloutSettings, hf_dir: Path) -> int:
    """Tokens of the longest prompt plus completion.

    Raises:
        RequestError: no model in the folder, or `rollout.max_model_len` is more than the model was made for.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise RequestError(str(hf_dir), "no config.json", "a folder with a Hugging Face model")
    limit = int(json.loads(path.read_text())["max_position_embeddings"])
    longest = settings.max_model_len or limit
    if longest > limit:
        raise RequestError("rollout.max_model_len", longest, f"at most {limit}, the model's own limit")
    return longest


def adapter_rank(adapter: Path) -> int:
    """The largest rank of a LoRA adapter.

    Raises:
        RequestError: the folder holds no such adapter.
    """
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        return max(int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError("rollout.adapter", f"{path}: {error!r}", "a LoRA adapter in PEFT's layout") from error


def served_cache_bytes(settings: RolloutSettings, hf_dir: Path, longest: int) -> int:
    """Bytes of vLLM's own cache, which rollouts do not use.

    Raises:
        RequestError: the model's heads cannot be shared by the workers.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf_dir).get_text_config()
    if config.num_attention_heads % settings.tensor_parallel:
        raise RequestError(
            "rollout.tensor_parallel",
            settings.tensor_parallel,
            f"a divisor of the model's {config.num_attention_heads} attention heads",
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head * getattr(torch, settings.dtype.value).itemsize
    # One block of slack per sequence, and vLLM's null block.
    blocks = SERVED_SEQUENCES * (2 + longest // settings.block_size) + 1
    return int(blocks * settings.block_size * per_token)
