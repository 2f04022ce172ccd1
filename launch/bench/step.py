"""`windlass bench step`: the whole RL step of this system against that of TRL's `GRPOTrainer`.

A step is rollout, reward, objective, update, and the new weights with what generates next. Ours is the loop of a job
(`trainer.loop.RlLoop`) with its engine, a learner and the weight channel in one process, all checks on. TRL generates
with transformers in the trained model itself, so it pushes nothing; it samples without a constraint, which is cheaper.
Same model, prompts, type, threads and number of completions; no reference model on either side.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import tyro

from data.catalogue import Catalogue
from data.errors import RequestError
from launch.bench.ceiling import causal_pairs, matmul_ceiling_tflops
from launch.bench.child import Child, Functions
from launch.bench.frame import Way, answer, paired
from launch.bench.models import BenchModel, bench_model
from launch.bench.settings import BenchSettings
from launch.bench.step_job import StepBench, random_samples
from launch.bench.trl_way import TrlOptions, build_trl
from rollout import vllm_internals
from trainer.initial_model import CATALOGUE

ROWS_PER_PASS: Final = (16,)
"""Rows of a forward pass of TRL that are tried, beside all in one; the fastest options are what we compare with."""
ATTENTIONS: Final = ("sdpa", "eager")


def step_command(
    settings: Annotated[StepBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time whole RL steps of this system and of TRL's GRPOTrainer, in turns."""
    dtype = getattr(torch, settings.dtype.value)
    with bench_model(settings) as model, ExitStack() as stack:
        if settings.group > model.catalogue.n_items:
            raise RequestError("--group", settings.group, f"2 to {model.catalogue.n_items}, the items of the catalogue")
        ceiling = matmul_ceiling_tflops(dtype, threads=settings.threads, device=settings.device)
        environment = vllm_internals.environment(threads=settings.threads)
        rows = settings.prompts * settings.group
        passes = sorted({count for count in ROWS_PER_PASS if rows % count == 0} | {rows})
        options = [TrlOptions(attention, count) for attention in ATTENTIONS for count in passes]
        trials = [trial(settings, model, option, environment) for option in options]
        fastest = options[trials.index(min(trials))]
        children = {
            "ours": stack.enter_context(Child(build_ours, settings, model.hf_dir, environment=environment)),
            "trl": stack.enter_context(Child(build_trl, settings, model.hf_dir, fastest, environment=environment)),
        }
        ways = {name: _way(child, settings, model) for name, child in children.items()}
        seconds = paired(ways, settings.repeats)
        facts = {name: child.call("facts") for name, child in children.items()}
    expected = {"steps": 1 + settings.repeats, "rows": rows, "tokens_per_row": float(model.levels)}
    pairs = zip(seconds["trl"], seconds["ours"], strict=True)
    return answer(
        settings,
        ways,
        seconds,
        ceiling_tflops=ceiling,
        checked=all(fact[name] == value for fact in facts.values() for name, value in expected.items()),
        speedup_vs_trl=statistics.median(theirs / own for theirs, own in pairs),
        trl_trials=[{**option._asdict(), "seconds": spent} for option, spent in zip(options, trials, strict=True)],
        check=facts,
        model=model.record(),
    )


def trial(settings: StepBench, model: BenchModel, options: TrlOptions, environment: Mapping[str, str]) -> float:
    """Seconds of the first step of TRL with these options."""
    with Child(build_trl, settings, model.hf_dir, options, environment=environment) as child:
        return child.timer("step")()


def _way(child: Child, settings: StepBench, model: BenchModel) -> Way:
    tokens, flops = step_work(settings, model)
    return Way(
        time=child.timer("step"),
        tokens=tokens,
        flops=flops,
        peak_mib=lambda: child.peak_mib("step"),
        settings=child.call("settings"),
    )


def step_work(settings: BenchSettings, model: BenchModel) -> tuple[int, float]:
    """Tokens that a step has to compute and its operations: beams once, then trees forward, forward and backward."""
    prompt, group, steps = settings.prompt_len, settings.group, model.levels - 1
    tokens = prompt + group * steps
    forward = model.arithmetic.forward_flops(
        tokens=tokens,
        pairs=causal_pairs(prompt) + group * causal_pairs(steps, prompt),
        head_rows=1 + group * steps,
    )
    return settings.prompts * tokens, settings.prompts * forward * 4


def build_ours(settings: StepBench, hf_dir: Path) -> Functions:
    """The loop of a job, with everything in this process."""
    from transformers import AutoConfig

    from launch.bench.local_loop import local_loop

    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    job = settings.job(catalogue.trie().depth, AutoConfig.from_pretrained(hf_dir).max_position_embeddings)
    stack = ExitStack()
    loop, engine = stack.enter_context(local_loop(job, hf_dir, catalogue, random_samples(settings, catalogue)))
    learners = loop.learners
    last: dict[str, float] = {}

    def step() -> None:
        last.update(loop.step())

    def facts() -> dict[str, Any]:
        rows = settings.prompts * settings.group
        return {
            "steps": learners.step if engine.weight_version == learners.step else -1,
            "rows": rows,
            "tokens_per_row": last["tokens/policy"] / rows,
            "policy_gap_mean": last["policy_gap/mean"],
            "phase_seconds": {
                name.removeprefix("time/"): spent / learners.step
                for name, spent in loop.timer.take().items()
                if name != "time/step"
            },
        }

    def told() -> dict[str, Any]:
        return job.model_dump(mode="json", include={"learner", "rollout", "objective", "weights", "policy_gap"})

    return {"step": step, "facts": facts, "settings": told, "close": stack.close}
