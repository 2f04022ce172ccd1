"""The optimiser around the learner: learning-rate schedule, weight-decay groups, DeepSpeed's configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from trainer.settings import Device, LearnerSettings, Precision, Schedule

LARGEST_BUCKET = 500_000_000
"""Gradients that are reduced together at most: DeepSpeed's default."""


def learning_rate(settings: LearnerSettings, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up, then the schedule over what is left.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    span = max(total_steps - settings.warmup_steps, 1)
    done = min((step - settings.warmup_steps) / span, 1.0)
    match settings.schedule:
        case Schedule.CONSTANT:
            share = 1.0
        case Schedule.LINEAR:
            share = 1 - done
        case Schedule.COSINE:
            share = 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * (settings.min_lr_share + (1 - settings.min_lr_share) * share)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay, vectors (biases, norms) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, settings: LearnerSettings) -> torch.optim.AdamW:
    """AdamW over the decay groups. Its rate is 0 until the first step: DeepSpeed may take dummy steps at start."""
    return torch.optim.AdamW(
        decay_groups(module, settings.weight_decay), lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
    )


def _on_cpu(settings: LearnerSettings) -> bool:
    return settings.device is Device.CPU or not torch.cuda.is_available()


def clips_itself(settings: LearnerSettings) -> bool:
    """Whether the learner clips gradients itself: DeepSpeed hides the norm where it wraps no optimiser."""
    return settings.zero_stage == 0 and settings.dtype is Precision.FLOAT32


def deepspeed_config(settings: LearnerSettings, ranks: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: accumulation is ours, gradients are summed in float32 where a stage can.

    Stage 0 in bfloat16 sums its micro-batches in bfloat16, as DeepSpeed does; prefer stage 1 there.

    Args:
        trained: numbers that are trained, over all parameters. DeepSpeed allocates its whole bucket whatever it is
            filled with, 2 GB by default.
    """
    bfloat16 = settings.dtype is Precision.BFLOAT16
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": bfloat16},
        "gradient_clipping": 0.0 if clips_itself(settings) else settings.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": settings.zero_stage > 0,
            "reduce_scatter": True,
            "reduce_bucket_size": min(trained, LARGEST_BUCKET),
        },
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
    }
    if settings.offload_optimiser:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": not _on_cpu(settings)}
        config["zero_force_ds_cpu_optimizer"] = False
    if settings.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
