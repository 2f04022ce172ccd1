"""Section `rollout` of the configuration: which engine generates, how it decodes, and how much it may use."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.records import Decode
from data.settings import Settings
from rollout.live_adapter import LiveAdapter


class EngineKind(StrEnum):
    """Which engine generates."""

    VLLM = "vllm"
    """vLLM with the beam loop inside its worker."""
    REFERENCE = "reference"
    """Plain transformers, one prompt at a time: for tests and for machines without vLLM."""


class EngineDtype(StrEnum):
    """Type of the engine's weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class HeadRows(StrEnum):
    """For which tokens the head of the model is computed under the constraint."""

    AUTO = "auto"
    """`level` where the vocabulary is at least eight times as large as the tokens that can follow anywhere."""
    ALL = "all"
    """The whole vocabulary."""
    LEVEL = "level"
    """The tokens that can follow at the depth at hand."""


class RolloutSettings(Settings):
    """The rollout fleet: engines, decoding, memory, deadlines."""

    engine: EngineKind = EngineKind.VLLM
    """`vllm`, or `reference` (plain transformers, slower, needs no vLLM)."""
    engines: int = Field(1, ge=1, le=4096)
    """Engine processes; each holds a copy of the model."""
    dtype: EngineDtype = EngineDtype.BFLOAT16
    """Type of weights and activations in the engine: float32 or bfloat16."""
    decode: Decode = Decode.BEAM
    """`beam` (the most probable completions), `sample` (independent draws), or `sample_without_replacement` (stochastic
    beam search: draws that differ, with weights that make up for it)."""
    width: int = Field(16, ge=1, le=1024)
    """Group size: beams or samples per prompt."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Divides the logits before the softmax over the legal continuations."""
    adapter: Path | None = None
    """Folder with a LoRA adapter in PEFT's layout that is applied to the model. For engines that generate only: the
    learners push whole matrices."""
    live_adapter: LiveAdapter = LiveAdapter()
    """The adapter that learners push by itself; a job sets it (learner.lora.push)."""
    head: HeadRows = HeadRows.AUTO
    """Rows of the head that are multiplied under the constraint (vllm only): `all`, `level` (the tokens that can follow
    at a depth; the same log-probabilities for less work), or `auto` (`level` for large vocabularies)."""
    shard_size: int = Field(32, ge=1)
    """Prompts an engine is handed at once; the free engine takes the next shard, and while more than one is left for
    each, an engine that is not slower than the others has one ahead."""
    prompts_per_forward: int = Field(64, ge=1)
    """Most prompts computed in one forward pass; fewer where `tokens_per_forward` demands it."""
    tokens_per_forward: int = Field(4096, ge=32)
    """Most prompt tokens computed in one forward pass; a single longer prompt still goes alone."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt plus completion, in tokens; none takes the model's own limit."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """Memory per worker, in GiB, for the keys and values of the prompts whose beams grow together (vllm only). A
    forward pass over prompts, and four sequences of vLLM's own, come on top."""
    block_size: int = Field(32, ge=16, multiple_of=16)
    """Tokens per block of the KV cache; on CPU a multiple of 32."""
    threads: int = Field(0, ge=0)
    """Computing threads per engine (CPU); 0 shares the host's cores among the engines, and with the learners where both
    work at once."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """Worker processes that share the matrices of one engine (vllm only); must divide the model's attention heads. On
    GPUs `gpus` has to be as many."""
    gpus: float = Field(0.0, ge=0)
    """GPUs per engine: 0 on CPU; below 1 shares a GPU between engines."""
    batch_invariant: bool = False
    """On GPUs: vLLM's batch-invariant kernels, so that a prompt's completions are the same bits whichever engine they
    come from; slower, and only on NVIDIA cards of compute capability 9.0 or more. On CPU they are so without it."""
    sleeps: bool = False
    """Engines give their memory back while the learners work, for those that share cards with them; a job sets it
    (cluster.colocated)."""
    start_deadline_s: float = Field(300.0, gt=0)
    """Seconds an engine may take to come up."""
    deadline_s: float = Field(300.0, gt=0)
    """Seconds a shard may take, from when its engine comes to it, before the engine counts as lost."""

    @model_validator(mode="after")
    def _invariant_where_it_exists(self) -> Self:
        if self.batch_invariant and (self.gpus == 0 or self.engine is not EngineKind.VLLM):
            raise ValueError("batch_invariant is true; legal: false without GPUs of vLLM's (engine vllm, gpus above 0)")
        return self

    @property
    def compute_threads(self) -> int:
        """Threads of an engine, at least one."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.engines)

    def process_environment(self) -> dict[str, str]:
        """Environment of a process that holds an engine."""
        from rollout.vllm_internals import environment

        return environment(threads=self.compute_threads, batch_invariant=self.batch_invariant)
