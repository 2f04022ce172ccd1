"""What both ways of `windlass bench step` share: settings, the job, prompts and targets."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Samples
from data.prompts import PromptBuilder
from launch.bench.settings import BenchSettings, Device
from trainer.jobs import RlJob

BATCHES: Final = 64
"""Batches of prompts before they repeat."""


class StepBench(BenchSettings):
    """Arguments of `windlass bench step`; `--group` is the number of completions, `--width` changes nothing."""

    prompts: int = Field(8, ge=1)
    """Prompts of a step."""
    token_budget: int = Field(4096, ge=16)
    """Tokens of a micro-batch of ours."""
    lr: float = Field(1e-6, gt=0)
    """Learning rate of both."""

    def job(self, levels: int, max_positions: int, **sections: Any) -> RlJob:
        """The job of which our way takes steps.

        Args:
            sections: put over those of the job, one level deep.
        """
        content: dict[str, Any] = {
            "job": "rl",
            "seed": self.seed,
            "data": {
                "dataset": "bench",
                "history": -(-self.prompt_len // levels),
                "max_prompt_tokens": self.prompt_len,
                "exclude_seen": False,
            },
            "batch_prompts": self.prompts,
            "limits": {"max_steps": 1_000_000},
            "learner": {
                "zero_stage": 1,
                "dtype": self.dtype.value,
                "device": self.device.value,
                "row_tokens": -(-(self.prompt_len + levels) // 16) * 16,
                "token_budget": max(self.token_budget, -(-(self.prompt_len + levels) // 16) * 16),
                "threads": self.threads,
                "lr": self.lr,
            },
            "rollout": {
                "dtype": self.dtype.value,
                "width": self.group,
                "shard_size": self.prompts,
                "max_model_len": min(self.prompt_len + levels, max_positions),
                "threads": self.threads,
                "gpus": 1.0 if self.device is Device.CUDA else 0.0,
            },
            "objective": {"beta": 0.0},
        }
        for name, value in sections.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return RlJob.model_validate(content)


def random_samples(settings: StepBench, catalogue: Catalogue) -> Samples:
    """Histories and targets at random."""
    random = np.random.default_rng(settings.seed)
    rows, history = settings.prompts * BATCHES, settings.prompt_len
    return Samples(
        user_id_N=np.arange(rows, dtype=np.int32),
        target_N=random.integers(0, catalogue.n_items, rows).astype(np.int32),
        timestamp_N=np.zeros(rows, dtype=np.int64),
        sample_id_N=np.arange(rows, dtype=np.int64),
        values=random.integers(0, catalogue.n_items, rows * history).astype(np.int32),
        start_N=np.arange(rows, dtype=np.int64) * history,
        end_N=np.arange(1, rows + 1, dtype=np.int64) * history,
    )


def prompt_builder(job: RlJob, catalogue: Catalogue) -> PromptBuilder:
    """Prompts of the job."""
    return PromptBuilder(catalogue, job.data.history, job.data.exclude_seen, job.data.max_prompt_tokens)
