"""GRPO's advantages, loss and gradient against TRL 1.16.0, on the same tensors, within float32 rounding.

TRL's side is its own `GRPOTrainer`: `_generate_and_score_completions` makes the advantages, the old and the reference
log-probabilities of given completions, the weights of the model are moved, and `compute_loss` gives loss and gradient.
Our side takes those log-probabilities and rewards through the objective's stages and the learner's token loss, on the
same model.

What is compared, as TRL names it and as we do:
- loss type: `grpo` is `sequence_mean`, `dapo` and `bnpo` are `token_mean` (equal here, where the batch is one
  micro-batch of one process), `dr_grpo` is `fixed_length`;
- degrees of freedom: TRL's deviation has n - 1 (`nanstd`), our `sample`; `scale_rewards="none"` is our `none`. TRL has
  no population deviation (our `population`);
- eps: 1e-4 on the deviation, which TRL fixes;
- clip low and high, KL k3 with beta (without the ratio that TRL multiplies it by unless `use_bias_correction_kl` is
  off), ratio per token or sequence (GSPO), temperature, several rewards (summed, and in GDPO's order), the entropy
  bonus (a token mean in TRL, so with `token_mean`), truncated importance sampling.

Does not check: legal sets (the whole vocabulary is legal here), ratio per item, which TRL lacks, and packing (whose
equality with padded rows tests/trainer/test_learner.py checks).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.requirements import require
from tests.tiny_model import tiny_catalogue, write_tiny_model
from trainer.losses import UpdateInputs, token_inputs, token_loss, update_metrics
from trainer.members import PADDING, Members
from trainer.objective import objective_coefficients
from trainer.objective_settings import ObjectiveSettings
from trainer.signals import Signals

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")

PROMPTS, GROUP, LONGEST = 4, 4, 7
ROWS = PROMPTS * GROUP
EPS = 1e-4


@dataclass(frozen=True)
class Case:
    """One setting of both."""

    trl: dict[str, Any]
    ours: dict[str, Any]
    engine: bool = False
    """The rollouts carry log-probabilities of an engine that differs from the learner."""


@dataclass
class Batch:
    """Completions of random length with rewards from two sources; the second group has no variance."""

    seed: int
    prompt: list[list[int]] = field(default_factory=list)
    completion: list[list[int]] = field(default_factory=list)
    engine_logp: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def tokens(count: int) -> list[int]:
            return torch.randint(3, 15, (count,), generator=generator).tolist()

        lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=generator).tolist()
        self.prompt = [tokens(count) for count in (2, 4, 3, 4)]
        self.completion = [tokens(count) for count in lengths]
        self.engine_logp = [(-3 * torch.rand(count, generator=generator)).tolist() for count in lengths]
        self.reward_PG = {
            "match": torch.randint(0, 2, (PROMPTS, GROUP), generator=generator).float(),
            "dense": torch.randn(PROMPTS, GROUP, generator=generator),
        }
        for reward_PG in self.reward_PG.values():
            reward_PG[1] = 0.5


WEIGHT = {"match": 1.0, "dense": 0.25}

CASES = {
    "grpo": Case({}, {}),
    "grpo-no-deviation": Case({"scale_rewards": "none"}, {"std_mode": "none"}),
    "grpo-kl": Case({"beta": 0.04}, {"beta": 0.04}),
    "grpo-temperature": Case({"temperature": 0.7, "beta": 0.01}, {"beta": 0.01}),
    "bnpo": Case({"loss_type": "bnpo"}, {"aggregation": "token_mean"}),
    "dapo-clip-higher": Case(
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
        {"aggregation": "token_mean", "clip_low": 0.1, "clip_high": 0.28},
    ),
    "dapo-entropy": Case(
        {"loss_type": "dapo", "entropy_coef": 0.05}, {"aggregation": "token_mean", "entropy_weight": 0.05}
    ),
    "dr_grpo": Case(
        {"loss_type": "dr_grpo", "scale_rewards": "none"}, {"aggregation": "fixed_length", "std_mode": "none"}
    ),
    "gspo": Case(
        {"importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
        {"ratio": "sequence", "clip_low": 0.01, "clip_high": 0.02},
    ),
    "gspo-dapo-kl": Case(
        {"importance_sampling_level": "sequence", "loss_type": "dapo", "beta": 0.1, "epsilon": 0.01},
        {"ratio": "sequence", "aggregation": "token_mean", "beta": 0.1, "clip_low": 0.01, "clip_high": 0.01},
    ),
    "gdpo": Case({"multi_objective_aggregation": "normalize_then_sum"}, {"reward_order": "gdpo"}),
    "truncated-tokens": Case(
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.5},
        {"truncation": {"level": "token", "limit": 1.5}},
        engine=True,
    ),
    "truncated-sequences": Case(
        {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 2.0},
        {"truncation": {"level": "sequence", "limit": 2.0}},
        engine=True,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("trl"), tiny_catalogue(), hidden=32, layers=1, spread=2.0)


def grpo_trainer(folder: Path, batch: Batch, case: Case, workspace: Path) -> Any:
    """TRL's trainer over the given completions, as its own training loop would have it before a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def source(name: str) -> Any:
        def reward(prompts: list[str], completions: list[str], **rest: object) -> list[float]:
            return batch.reward_PG[name].flatten().tolist()

        reward.__name__ = name
        return reward

    def rollouts(prompts: list[str], trainer: object) -> dict[str, object]:
        return {
            "prompt_ids": [batch.prompt[row // GROUP] for row in range(ROWS)],
            "completion_ids": batch.completion,
            "logprobs": batch.engine_logp if case.engine else None,
        }

    arguments = GRPOConfig(
        output_dir=str(workspace),
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        num_iterations=2,  # so that old log-probabilities are kept, as with several updates per rollout batch
        max_completion_length=LONGEST,
        reward_weights=list(WEIGHT.values()),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_bias_correction_kl=False,
        report_to=[],
        **{"loss_type": "grpo", "temperature": 1.0, "beta": 0.0, **case.trl},
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=[source(name) for name in WEIGHT],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        rollout_func=rollouts,
    )
    trainer.current_gradient_accumulation_steps = 1
    if case.engine:  # the correction reads these; no engine is asked, because the rollouts are given
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.model.train()
    return trainer


def moved(model: torch.nn.Module, seed: int) -> None:
    """Move the weights, as updates before this one would, so that ratios and clips act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def our_loss(
    model: torch.nn.Module, inputs: dict[str, Tensor], batch: Batch, case: Case
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages, loss with gradient and metrics of the update, from TRL's padded tensors."""
    width = inputs["completion_ids"].shape[1]
    mask = inputs["completion_mask"].bool()

    def grouped(value: Tensor) -> Tensor:
        return value.reshape(PROMPTS, GROUP, width)

    logits = model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    ).logits[:, -width - 1 : -1]
    log_p = torch.log_softmax(logits / case.trl.get("temperature", 1.0), -1)
    logp = log_p.gather(-1, inputs["completion_ids"].unsqueeze(-1))[..., 0]
    entropy_K = -(log_p.exp() * log_p).sum(-1).reshape(-1)
    objective = ObjectiveSettings.model_validate({"eps": EPS, "std_mode": "sample", **case.ours})
    members = Members(
        valid_PG=torch.ones(PROMPTS, GROUP, dtype=torch.bool),
        kind_PG=torch.zeros(PROMPTS, GROUP, dtype=torch.int64),
        segment_PGT=grouped(torch.where(mask, 0, PADDING)),
    )
    signals = Signals(part_PG=batch.reward_PG, part_weight=WEIGHT, logp_PGT=grouped(inputs["old_per_token_logps"]))
    if case.engine:
        signals = Signals(**{**vars(signals), "engine_logp_PGT": grouped(inputs["sampling_per_token_logps"])})
    reward_PG = torch.stack([WEIGHT[name] * batch.reward_PG[name] for name in WEIGHT]).sum(0)
    found, _ = objective_coefficients(members, reward_PG, objective, LONGEST, signals=signals)
    reference = inputs.get("ref_per_token_logps")
    update = UpdateInputs(
        advantage_PGT=found.advantage_PGT.numpy(),
        old_logp_PGT=grouped(inputs["old_per_token_logps"]).numpy(),
        ref_logp_PGT=None if reference is None else grouped(reference).numpy(),
        policy_weight_PGT=found.policy_weight_PGT.numpy(),
        kl_weight_PGT=found.kl_weight_PGT.numpy(),
        nll_weight_PGT=found.nll_weight_PGT.numpy(),
        ratio=objective.ratio,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        entropy_weight_PGT=None if found.entropy_weight_PGT is None else found.entropy_weight_PGT.numpy(),
    )
    slot_K = torch.arange(ROWS * width)
    logp_K = logp.reshape(-1)
    loss, sums = token_loss(logp_K, logp_K, token_inputs(update, slot_K, slot_K // width), entropy_K)
    return found.advantage_PGT[:, :, 0], loss, update_metrics(sums)


@pytest.mark.parametrize("name", CASES)
def test_advantages_loss_and_gradient_equal_trl(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for rank in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # as a launcher of processes would set them
        monkeypatch.delenv(rank, raising=False)
    case, batch = CASES[name], Batch(1)
    trainer = grpo_trainer(folder, batch, case, tmp_path)
    model = trainer.model
    inputs = trainer._generate_and_score_completions([{"prompt": str(row // GROUP)} for row in range(ROWS)])
    moved(model, 1)
    theirs = trainer.compute_loss(model, inputs)
    their_gradient = gradients(model, theirs)
    advantage_PG, ours, metrics = our_loss(model, inputs, batch, case)
    our_gradient = gradients(model, ours)

    torch.testing.assert_close(advantage_PG.flatten(), inputs["advantages"], rtol=2e-6, atol=2e-6)
    assert not advantage_PG[1].any()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    assert our_gradient.keys() == their_gradient.keys()
    for parameter, expected in their_gradient.items():
        # A sum over tokens in another order: rounding relative to the largest entry.
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(our_gradient[parameter], expected, rtol=0, atol=5e-6 * scale, msg=parameter)
    shares = [metrics[f"ratio/clip_{side}_share"] for side in ("high", "low")]
    assert sum(shares) > 0
    # TRL counts sequences where the ratio is theirs, and in GDPO's order the rounding it leaves of equal rewards.
    if name not in ("gspo", "gspo-dapo-kl", "gdpo"):
        assert shares == pytest.approx([trainer._metrics["train"][f"clip_ratio/{s}_mean"][0] for s in ("high", "low")])
