"""What a job's processes need of memory, from its recipe and the shape of its model alone.

Weights, gradients and optimiser states are counted to the parameter, on a model without storage; activations by a
count of what the backward pass keeps of a layer per token; caches and logits from the settings. Libraries' own buffers
and fragments come on top: `OVERHEAD_GIB` per process on a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from data.settings import Settings
from launch.model_shapes import model_config
from rollout.engine import SERVED_SEQUENCES
from rollout.settings import EngineDtype, RolloutSettings
from trainer.jobs import RlJob, SftJob
from trainer.policy import Policy
from trainer.settings import LearnerSettings, Precision

GIB: Final = 2**30
CARDS: Final[Mapping[str, int]] = {"24 GiB": 24, "40 GiB": 40, "48 GiB": 48, "80 GiB": 80, "141 GiB": 141}
"""Memory of common cards."""
OVERHEAD_GIB: Final = 1.5
"""CUDA context, communication buffers and fragments of a process."""
CODES: Final = 1024
"""Code tokens, where the dataset's codes are not looked at."""


class PlanSettings(Settings):
    """What a plan assumes beside the recipe."""

    codes: int = CODES
    """Tokens of semantic IDs that are added."""
    head_share: float = 0.25
    """Tokens of a micro-batch whose logits are computed: those of completions and of the prompt's end."""


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """The memory of one process, in bytes by part."""

    name: str
    count: int
    """Processes of this kind."""
    device: Mapping[str, int]
    """Where it computes: a card, or this machine's memory."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Beside it, in the host's memory."""

    @property
    def device_bytes(self) -> int:
        """Sum."""
        return sum(self.device.values())

    def record(self) -> dict[str, Any]:
        """For an answer, in GiB."""
        total = self.device_bytes / GIB + OVERHEAD_GIB
        return {
            "process": self.name,
            "count": self.count,
            "device_gib": {part: round(size / GIB, 3) for part, size in self.device.items()},
            "host_gib": {part: round(size / GIB, 3) for part, size in self.host.items()},
            "total_gib": round(total, 2),
            "fits": [card for card, room in CARDS.items() if total <= room],
        }


def memory_plan(job: SftJob | RlJob, assumed: PlanSettings | None = None) -> list[ProcessPlan]:
    """The plan of a job: its learner ranks, then its engines.

    Raises:
        RequestError: the shape of the model is not known here.
    """
    assumed = assumed or PlanSettings()
    codes = 0 if job.text.items == "titles" else assumed.codes
    config = model_config(job.init, codes)
    size = model_size(config, job.learner, codes)
    frozen_copy = isinstance(job, RlJob) and job.objective.beta > 0 and not job.learner.lora.on
    return [
        learner_plan(job.learner, config, size, reference=frozen_copy, head_share=assumed.head_share),
        engine_plan(job.rollout, config, size),
    ]


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of parameters."""

    whole: int
    trained: int
    head_norms: bool
    """Whether queries and keys are normalised, as in Qwen3 and Gemma 3."""


def model_size(config: Any, settings: LearnerSettings, new_rows: int) -> ModelSize:
    """Count a model's parameters, tied ones once, and those that a learner trains."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    whole = sum(parameter.numel() for parameter in Policy(lm).parameters())
    head_norms = any(name.endswith("q_norm") for name, _ in lm.named_modules())
    if not settings.lora.on:
        return ModelSize(whole=whole, trained=whole, head_norms=head_norms)
    linears = [m for n, m in lm.named_modules() if n.rpartition(".")[2] in settings.lora.targets]
    trained = sum(settings.lora.rank * (m.in_features + m.out_features) for m in linears)
    if settings.lora.train_new_rows:
        matrices = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
        trained += len(matrices) * new_rows * config.get_text_config().hidden_size
    return ModelSize(whole=whole + trained, trained=trained, head_norms=head_norms)


def learner_plan(
    settings: LearnerSettings, config: Any, size: ModelSize, *, reference: bool, head_share: float
) -> ProcessPlan:
    """Memory of one learner rank.

    Args:
        settings: of the learner.
        config: of the model.
        size: its parameters.
        reference: whether a frozen copy of the model is held.
        head_share: see `PlanSettings`.
    """
    width = 2 if settings.dtype is Precision.BFLOAT16 else 4
    stage, ranks = settings.zero_stage, settings.ranks
    states = 8 * size.trained + (4 * size.trained if width == 2 else 0)
    states //= ranks if stage >= 1 else 1
    # From stage 1 on gradients are accumulated in float32; stage 2 keeps a rank's share of them.
    gradients = size.trained * (4 if stage >= 1 else width) // (ranks if stage >= 2 else 1)
    per_layer = layer_activations(config, width, head_norms=size.head_norms)
    layers = config.get_text_config().num_hidden_layers
    tokens = settings.token_budget
    kept = tokens * per_layer * layers
    if settings.activation_checkpointing:
        kept = tokens * (per_layer + layers * config.get_text_config().hidden_size * width)
    graded = int(tokens * head_share)
    head = min(graded, settings.head_positions or graded) * config.get_text_config().vocab_size * (2 * width + 8)
    device = {
        "weights": size.whole * width // (ranks if stage == 3 else 1),
        "gradients": gradients,
        "activations": kept,
        "logits": head,
    }
    if reference:
        device["reference"] = size.whole * width
    device["twin in a wider type (noise)"] = size.whole * 2 * width
    host = {"optimiser states": states} if settings.offload_optimiser else {}
    if not settings.offload_optimiser:
        device["optimiser states"] = states
    return ProcessPlan(name="learner rank", count=ranks, device=device, host=host)


def layer_activations(config: Any, width: int, *, head_norms: bool) -> int:
    """Bytes per token that the backward pass of one layer needs, without checkpointing.

    Two normalisations keep their input in float32 and their scaled output, those of queries and keys the same;
    attention its projections before and after the rotation, and its result; the MLP gate, its activation, the up
    projection and their product. Scores are not kept (on CPU they are, a few percent).
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or hidden // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    norms = 2 * (hidden * 4 + 2 * hidden * width)
    attention = (3 * heads + 3 * kv_heads) * head * width
    if head_norms:
        attention += (heads + kv_heads) * head * (4 + width)
    mlp = 4 * text.intermediate_size * width
    return int(norms + attention + mlp)


def engine_plan(settings: RolloutSettings, config: Any, size: ModelSize) -> ProcessPlan:
    """Memory of one engine's worker."""
    text = config.get_text_config()
    width = 2 if settings.dtype is EngineDtype.BFLOAT16 else 4
    parallel = settings.tensor_parallel
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * max(1, kv_heads // parallel) * head * width
    longest = settings.max_model_len or text.max_position_embeddings
    tokens = settings.tokens_per_forward
    device = {
        # Merged weights have as many parameters as the model without its adapter.
        "weights": (size.whole - (size.trained if size.trained < size.whole else 0)) * width // parallel,
        "prompt cache": int(settings.kv_cache_gib * GIB),
        "served cache": SERVED_SEQUENCES * longest * per_token,
        "forward pass": tokens * (4 * text.hidden_size + 2 * text.intermediate_size) * width + tokens * per_token,
        "logits": min(GIB, settings.shard_size * settings.width * text.vocab_size * 4),
    }
    return ProcessPlan(name="engine worker", count=settings.engines * parallel, device=device)
