"""Settings of the learner: ranks, sharding, precision, packing, optimiser."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from data.settings import Settings


class Schedule(StrEnum):
    """Course of the learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Precision(StrEnum):
    """Data type of the weights in the forward pass; the optimiser keeps float32 masters in both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Device(StrEnum):
    """Where the learner computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class AdapterPush(StrEnum):
    """What of a model with adapters travels to the engines."""

    MERGED = "merged"
    """The whole weights, with the adapter merged."""
    ADAPTER = "adapter"
    """The adapter alone: factors and rows of code tokens; the engines apply it to the initial model (vllm only)."""


class LoraSettings(Settings):
    """Low-rank adapters in place of full training; `rank` turns them on."""

    rank: int = Field(0, ge=0, le=512)
    """Rank of the two factors of each adapted matrix; 0 trains all weights."""
    alpha: int = Field(32, ge=1)
    """The product of the factors is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear modules that are adapted."""
    train_new_rows: bool = True
    """Train the rows of the code tokens in embedding and head too; their other rows stay as they are."""

    push: AdapterPush = AdapterPush.MERGED
    """What engines get: merged (whole weights) or adapter (only what is trained; tied embeddings, or items as titles,
    or GPUs)."""

    @property
    def alone(self) -> bool:
        """Whether the adapter travels by itself."""
        return self.on and self.push is AdapterPush.ADAPTER

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0


class LearnerSettings(Settings):
    """The DeepSpeed learner."""

    ranks: int = Field(1, ge=1)
    """Learner processes; each is a Ray actor (one per GPU on CUDA)."""
    zero_stage: int = Field(2, ge=0, le=3)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimiser, 2 the gradients too, 3 the weights too."""
    dtype: Precision = Precision.BFLOAT16
    """Data type of the forward and backward pass, and of the exported weights."""
    device: Device = Device.AUTO
    """`auto` takes CUDA when the machine has it."""
    gpus: float = Field(1.0, gt=0, le=1)
    """GPUs per rank on CUDA; below 1 shares a card with engines (rollout.gpus)."""
    row_tokens: int = Field(512, ge=16, multiple_of=16)
    """Longest row: a prompt with one completion, or a training sequence."""
    token_budget: int = Field(4096, ge=16)
    """Tokens of a micro-batch, `row_tokens` or more. Prompts with their completions are packed into it; a group that
    is larger is split and pays for its prompt again."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up."""
    schedule: Schedule = Schedule.CONSTANT
    """Course after the warm-up, over the total number of steps of the job."""
    min_lr_share: float = Field(0.0, ge=0, le=1)
    """The linear and the cosine schedule end at this share of the peak."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW decay rates of the moments, each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    threads: int = Field(0, ge=0)
    """CPU threads per rank; 0 shares the machine's cores among the ranks."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout behind embeddings, attention and MLP in supervised steps; scores and RL updates never have any."""
    head_positions: int = Field(0, ge=0)
    """Tokens whose logits exist at once in an update; they are computed again in the backward pass. For vocabularies
    of pretrained models; 0 keeps the logits of a whole micro-batch."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    offload_optimiser: bool = False
    """Keep float32 masters and moments in the host's memory and step there (ZeRO 1 to 3)."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters in place of full training; off by default."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of a collective between ranks, and of a call to the learner group."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; legal: two numbers in [0, 1)")
        if self.token_budget < self.row_tokens:
            raise ValueError(
                f"token_budget: {self.token_budget} is below row_tokens {self.row_tokens}; "
                f"legal: {self.row_tokens} or more"
            )
        if self.offload_optimiser and self.zero_stage == 0:
            raise ValueError("offload_optimiser: true with zero_stage 0; legal: zero_stage 1 to 3")
        return self
