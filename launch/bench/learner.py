"""`windlass bench learner`: forward and backward over trees against the same over rows, and the arithmetic limit.

Rows are the usual way: every completion behind a copy of its prompt, head on the completion positions only. They run
in both ways of `ROWS`, and the faster is what trees are compared with. Of G completions of R tokens behind a
prompt of P, rows compute G (P + R) tokens and trees P + G R: the limit of the speed-up is their ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Annotated, Any, Final, Protocol

import numpy as np
import torch
import tyro
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.errors import RequestError
from launch.bench.ceiling import causal_pairs, matmul_ceiling_tflops
from launch.bench.child import Child, Functions
from launch.bench.frame import Way, answer, paired
from launch.bench.models import BenchModel, bench_model, bench_prompts
from launch.bench.settings import BenchSettings
from rollout.settings import EngineDtype
from trainer.micro_batches import micro_batches
from trainer.policy import Policy, full_log_probabilities, load_language_model
from trainer.trees import Completions, Piece, completion_pieces, sequence_pieces

ROWS: Final = ("rows_sdpa", "rows_packed")
"""transformers with SDPA, a group at a time; and rows packed and attended to as the learner does it with trees."""
CHECKED_PROMPTS: Final = 2
"""Prompts whose gradients are compared, in float32."""
ROW_REPEATS: Final = 2
TOLERANCE: Final = 1e-4
"""Largest difference of a parameter's gradient, relative to its norm, and of a log-probability."""


class LearnerBench(BenchSettings):
    """Arguments of `windlass bench learner`; of the common ones, `--width` changes nothing."""

    prompts: int = Field(4, ge=1)
    """Prompts of one batch."""
    levels: int = Field(4, ge=1, le=8)
    """Tokens of a completion; a model folder brings its own."""
    token_budget: int = Field(4096, ge=16)
    """Tokens of a micro-batch of trees."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, in every way."""


class Work(Protocol):
    """One way to fill the gradients of the mean negative log-probability."""

    lm: Any

    def __call__(self) -> Tensor:
        """Log-probability of every completion token, `[P * G * T]`."""
        ...


def learner_command(
    settings: Annotated[LearnerBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time forward and backward over packed trees and over rows, and compare their gradients."""
    with bench_model(settings) as model, ExitStack() as stack:
        random_completions(settings, model)  # refuses a group that is too large before anything starts
        ceiling = matmul_ceiling_tflops(
            getattr(torch, settings.dtype.value), threads=settings.threads, device=settings.device
        )
        with _child(build_check, settings, model) as child:
            check = child.call("check")
        children = {name: stack.enter_context(_child(build_alone, settings, model, name)) for name in ("ours", *ROWS)}
        logp_X = {name: child.call("logp") for name, child in children.items()}
        ways = {name: _way(name, child, settings, model) for name, child in children.items()}
        seconds = paired(ways, settings.repeats)
        filled = _answer(settings, model, ways, seconds, ceiling, check)
    gap_X = np.stack([np.abs(logp_X["ours"] - logp_X[name]) for name in ROWS]).max(0)
    return {**filled, "logp_gap": {"mean": float(gap_X.mean()), "max": float(gap_X.max())}}


def _child(build: Callable[..., Functions], settings: LearnerBench, model: BenchModel, *arguments: Any) -> Child:
    """A process whose threads do not spin while they wait: on a busy machine they would wait for each other."""
    environment = {"OMP_NUM_THREADS": str(settings.threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    return Child(build, settings, model, *arguments, environment=environment, device=settings.device)


def build_alone(settings: LearnerBench, model: BenchModel, name: str) -> Functions:
    """One way in this process."""
    torch.set_num_threads(settings.threads)
    work = build_way(name, settings, model, random_completions(settings, model))

    def run() -> None:
        work()

    return {"work": run, "logp": lambda: work().numpy(), "close": lambda: None}


def build_check(settings: LearnerBench, model: BenchModel) -> Functions:
    """The comparison of gradients."""
    torch.set_num_threads(settings.threads)
    few = random_completions(settings, model).take(np.arange(min(CHECKED_PROMPTS, settings.prompts)))
    return {"check": lambda: compare_gradients(settings, model, few), "close": lambda: None}


def _answer(
    settings: LearnerBench,
    model: BenchModel,
    ways: Mapping[str, Way],
    seconds: Mapping[str, list[float]],
    ceiling: float,
    check: Mapping[str, float],
) -> dict[str, Any]:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    fastest = min(ROWS, key=lambda name: median[name])
    speedup, limit = median[fastest] / median["ours"], row_limit(settings, model.levels)
    return answer(
        settings,
        ways,
        seconds,
        ceiling_tflops=ceiling,
        checked=check["gradient_gap"] <= TOLERANCE and check["logp_gap"] <= TOLERANCE,
        fraction_of_limit=speedup / limit,
        limit=limit,
        speedup_vs_rows=speedup,
        fastest_rows=fastest,
        speedups={name: median[name] / median["ours"] for name in ROWS},
        check={**check, "tolerance": TOLERANCE, "prompts": min(CHECKED_PROMPTS, settings.prompts)},
        model=model.record(),
    )


def row_limit(settings: BenchSettings, tokens: int) -> float:
    """Tokens of rows by those of trees: G (P + R) / (P + G R)."""
    prompt, group = settings.prompt_len, settings.group
    return group * (prompt + tokens) / (prompt + group * tokens)


def random_completions(settings: BenchSettings, model: BenchModel) -> Completions:
    """Random prompts, each with a group of distinct items.

    Raises:
        RequestError: the group is larger than the catalogue.
    """
    catalogue = model.catalogue
    if settings.group > catalogue.n_items:
        raise RequestError("--group", settings.group, f"2 to {catalogue.n_items}, the items of the catalogue")
    random = np.random.default_rng(settings.seed)
    item_PG = np.stack(
        [random.choice(catalogue.n_items, settings.group, replace=False) for _ in range(settings.prompts)]
    )
    token_PGT, length_PG = catalogue.padded_tokens(item_PG)
    prompts = bench_prompts(settings, model)
    return Completions(
        prompt_tokens=[prompt.token_ids for prompt in prompts],
        token_PGT=token_PGT,
        length_PG=length_PG,
        valid_PG=np.ones(item_PG.shape, dtype=np.bool_),
        exclusions=[prompt.exclusions for prompt in prompts],
    )


def build_way(
    name: str, settings: LearnerBench, model: BenchModel, completions: Completions, dtype: EngineDtype | None = None
) -> Work:
    """A way with a model of its own, in another type than that of the settings if asked."""
    weights = getattr(torch, (dtype or settings.dtype).value)
    if name in ("ours", "rows_packed"):
        lm: Any = load_language_model(model.hf_dir, weights)
    else:
        lm = AutoModelForCausalLM.from_pretrained(model.hf_dir, dtype=weights, attn_implementation="sdpa")
    lm.to(settings.device.value).train()
    if settings.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == "ours":
        pieces = completion_pieces(completions, settings.token_budget, settings.token_budget)
        return _Packed(lm, pieces, settings, completions.token_PGT.size)
    if name == "rows_packed":
        return _Packed(lm, _row_pieces(completions), settings, completions.token_PGT.size)
    return _Rows(lm, completions, settings)


class _Packed:
    """Packed micro-batches, as the learner computes them."""

    def __init__(self, lm: Any, pieces: list[Piece], settings: LearnerBench, count: int) -> None:
        self.lm = lm
        self._policy = Policy(lm)
        self._pieces = pieces
        self._budget = settings.token_budget
        self._device = torch.device(settings.device.value)
        self._count = count

    def __call__(self) -> Tensor:
        self.lm.zero_grad()
        scores = []
        for batch in micro_batches(self._pieces, token_budget=self._budget, rank=0, ranks=1):
            moved = batch.to(self._device)
            logp_K = full_log_probabilities(self._policy(moved), moved)
            torch.autograd.backward(-logp_K.sum() / self._count)
            scores.append((moved.slot_K, logp_K.detach()))
        slot_K, logp_K = (torch.cat(parts) for parts in zip(*scores, strict=True))
        return logp_K[slot_K.argsort()].cpu()


def _row_pieces(completions: Completions) -> list[Piece]:
    """Every completion behind its prompt, as sequences."""
    rows = [
        (np.concatenate([prompt_N, token_T]), np.arange(len(prompt_N) + len(token_T)) >= len(prompt_N))
        for prompt_N, token_GT in zip(completions.prompt_tokens, completions.token_PGT, strict=True)
        for token_T in token_GT
    ]
    return sequence_pieces(rows, max(len(tokens) for tokens, _ in rows))


class _Rows:
    """Plain transformers, a prompt's group at a time."""

    def __init__(self, lm: Any, completions: Completions, settings: LearnerBench) -> None:
        self.lm = lm
        self._completions = completions
        self._device = torch.device(settings.device.value)

    def __call__(self) -> Tensor:
        self.lm.zero_grad()
        scores = []
        completions = self._completions
        _, members, width = completions.shape
        for prompt_N, token_GT in zip(completions.prompt_tokens, completions.token_PGT, strict=True):
            target_GT = torch.from_numpy(token_GT).long().to(self._device)
            prompt_GN = torch.from_numpy(prompt_N).long().to(self._device).expand(members, -1)
            row_GN = torch.cat([prompt_GN, target_GT[:, :-1]], 1)  # nothing is predicted from the last token
            logits_GTV = self.lm(input_ids=row_GN, use_cache=False, logits_to_keep=width).logits.float()
            logp_GT = logits_GTV.log_softmax(-1).gather(2, target_GT[..., None])[..., 0]
            torch.autograd.backward(-logp_GT.sum() / completions.token_PGT.size)
            scores.append(logp_GT.detach().reshape(-1))
        return torch.cat(scores).cpu()


def compare_gradients(settings: LearnerBench, model: BenchModel, completions: Completions) -> dict[str, float]:
    """Largest differences between trees and rows in float32: gradients relative to their norm, log-probabilities."""
    trees = build_way("ours", settings, model, completions, EngineDtype.FLOAT32)
    rows = build_way("rows_sdpa", settings, model, completions, EngineDtype.FLOAT32)
    logp_gap = float((trees() - rows()).abs().max())
    exact = dict(rows.lm.named_parameters())
    gaps = [
        float((parameter.grad - exact[name].grad).norm() / exact[name].grad.norm())
        for name, parameter in trees.lm.named_parameters()
    ]
    # The maximum of numpy is NaN where a gap is; that of Python may drop it.
    return {"gradient_gap": float(np.max(gaps)), "logp_gap": logp_gap}


def _way(name: str, child: Child, settings: LearnerBench, model: BenchModel) -> Way:
    tokens, flops = learner_work(settings, model, trees=name == "ours")
    plain = name == "rows_sdpa"
    return Way(
        time=child.timer("work"),
        peak_mib=lambda: child.peak_mib("work"),
        tokens=tokens,
        flops=flops,
        repeats=ROW_REPEATS if name in ROWS else None,
        warm_up=lambda: None,  # it has computed its scores
        settings={
            "attention": "sdpa" if plain else "trees",
            "tokens_per_pass": tokens // settings.prompts if plain else settings.token_budget,
            "activation_checkpointing": settings.activation_checkpointing,
            "threads": settings.threads,
            "repeats": settings.repeats if name == "ours" else min(ROW_REPEATS, settings.repeats),
        },
    )


def learner_work(settings: BenchSettings, model: BenchModel, *, trees: bool) -> tuple[int, float]:
    """Inputs, and operations of forward and backward pass, of a batch."""
    prompt, group, steps = settings.prompt_len, settings.group, model.levels - 1
    if trees:
        tokens = prompt + group * steps
        pairs, head_rows = causal_pairs(prompt) + group * causal_pairs(steps, prompt), 1 + group * steps
    else:
        tokens = group * (prompt + steps)
        pairs, head_rows = group * causal_pairs(prompt + steps), group * model.levels
    flops = 3 * model.arithmetic.forward_flops(tokens=tokens, pairs=pairs, head_rows=head_rows)
    return settings.prompts * tokens, settings.prompts * flops
