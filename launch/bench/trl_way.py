"""TRL's `GRPOTrainer`, one optimiser step per call: the peer of `windlass bench step`."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import IntArray
from launch.bench.child import Functions
from launch.bench.settings import Device
from launch.bench.step_job import StepBench, prompt_builder, random_samples
from trainer.initial_model import CATALOGUE


class TrlOptions(NamedTuple):
    """What is tried to make it fast."""

    attention: str
    rows_per_pass: int
    """Of forward and backward; all rows are generated at once."""


def build_trl(settings: StepBench, hf_dir: Path, options: TrlOptions) -> Functions:
    """TRL's trainer, in a thread that takes one optimiser step per call."""
    torch.set_num_threads(settings.threads)
    driver = _TrlDriver(settings, hf_dir, options)
    return {"step": driver.step, "facts": driver.facts, "settings": driver.settings, "close": driver.close}


class _TrlDriver:
    """Lets `GRPOTrainer.train` run for one step at a time."""

    def __init__(self, settings: StepBench, hf_dir: Path, options: TrlOptions) -> None:
        from transformers import AutoTokenizer

        catalogue = Catalogue.load(hf_dir / CATALOGUE)
        self._tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        self._levels = catalogue.trie().depth
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ending = False
        self._error: BaseException | None = None
        self._rows = 0
        self._options = options
        self._trainer = self._build(settings, hf_dir, catalogue)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def _build(self, settings: StepBench, hf_dir: Path, catalogue: Catalogue) -> Any:
        from transformers import AutoModelForCausalLM, TrainerCallback

        datasets: Any = importlib.import_module("datasets")
        trl: Any = importlib.import_module("trl")

        rows = settings.prompts * settings.group
        self._arguments: dict[str, Any] = {
            "per_device_train_batch_size": self._options.rows_per_pass,
            "gradient_accumulation_steps": rows // self._options.rows_per_pass,
            "generation_batch_size": rows,
            "num_generations": settings.group,
            "max_completion_length": self._levels,
            "generation_kwargs": {"min_new_tokens": self._levels},
            "beta": 0.0,
            "learning_rate": settings.lr,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": settings.device is Device.CPU,
            "seed": settings.seed,
            "max_steps": 1_000_000,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        driver = self

        class Pace(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                driver._pause(control)

            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                driver._pause(control)

        job = settings.job(self._levels, settings.prompt_len + self._levels)
        prompts = prompt_builder(job, catalogue).build(random_samples(settings, catalogue)).prompts
        return trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                hf_dir, dtype=getattr(torch, settings.dtype.value), attn_implementation=self._options.attention
            ),
            reward_funcs=self._reward,
            args=trl.GRPOConfig(output_dir=str(hf_dir / "trl"), **self._arguments),
            train_dataset=datasets.Dataset.from_dict(
                {
                    "prompt": [self._text(prompt.token_ids) for prompt in prompts],
                    "target": [catalogue.tokens(prompt.target).tolist() for prompt in prompts],
                }
            ),
            processing_class=self._tokenizer,
            callbacks=[Pace()],
        )

    def _text(self, tokens: IntArray) -> str:
        text = "".join(self._tokenizer.convert_ids_to_tokens(tokens.tolist()))
        if self._tokenizer(text)["input_ids"] != tokens.tolist():
            raise RequestError("--model", "a tokenizer that does not give a prompt's tokens back", "one that does")
        return text

    def _reward(self, completion_ids: list[list[int]], target: list[list[int]], **rest: Any) -> list[float]:
        self._rows = len(completion_ids)
        self._tokens = sum(len(tokens) for tokens in completion_ids)
        return [float(tokens == wanted) for tokens, wanted in zip(completion_ids, target, strict=True)]

    def _pause(self, control: Any) -> None:
        self._done.release()
        self._go.acquire()
        control.should_training_stop = self._ending

    def _run(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def step(self) -> None:
        """One optimiser step, with the generation before it."""
        self._go.release()
        self._wait()

    def facts(self) -> dict[str, Any]:
        """What was done."""
        return {
            "steps": self._trainer.state.global_step,
            "rows": self._rows,
            "tokens_per_row": self._tokens / self._rows,
        }

    def settings(self) -> dict[str, Any]:
        """How the trainer was set."""
        return {
            "attention": self._options.attention,
            "generation": "transformers, unconstrained sampling",
            **self._arguments,
        }

    def close(self) -> None:
        """End the training."""
        self._ending = True
        self._go.release()
        self._thread.join()
