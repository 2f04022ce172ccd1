"""`windlass bench rollout`: constrained beams of this engine against vLLM's, transformers' and prefill alone.

The floor is the time of the prompts and nothing else, the faster of two prefills. Beams need
`(P + W (L - 1)) / P` times the tokens of P-token prompts, so the limit is the floor times that.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Self

import torch
import tyro
from pydantic import model_validator

from data.errors import RequestError
from data.records import Decode, DecodeSpec, IntArray, Prompt
from launch.bench import transformers_way, vllm_ways
from launch.bench.beams import Beams, agreement
from launch.bench.ceiling import causal_pairs, matmul_ceiling_tflops
from launch.bench.child import Child, Functions
from launch.bench.frame import Way, answer, paired, ratio
from launch.bench.models import BenchModel, bench_model, bench_prompts
from launch.bench.settings import BenchSettings, Device
from rollout import vllm_internals as internals
from rollout.settings import EngineKind, RolloutSettings

PREFILLS: Final = ("prefill", "vllm_prefill")
VLLM_WAYS: Final = ("vllm_prefill", "vllm_one_token", "vllm_beam_search")
WAYS: Final = ("ours", "prefill", *VLLM_WAYS, "transformers")
SLOW_REPEATS: Final = {"vllm_one_token": 3, "vllm_beam_search": 2, "transformers": 1}
"""Repetitions of the ways that take many times as long as ours."""
WARM_UP_PROMPTS: Final = 8
"""Prompts with which the slow ways warm up."""
CHECKED_PROMPTS: Final = 4
"""Prompts whose beams are compared with transformers' where that way is not timed."""
DECIDED: Final = {
    "engine": "--engine",
    "dtype": "--dtype",
    "width": "--width",
    "threads": "--threads",
    "max_model_len": "--prompt-len",
    "gpus": "--device",
    "decode": "beam",
}
"""Settings of this engine, and what decides them here."""
SWEEP_LENGTHS: Final = (129, 250, 511)
SWEEP_WIDTHS: Final = (4, 16, 50)


class RolloutBench(BenchSettings):
    """Arguments of `windlass bench rollout`."""

    engine: EngineKind = EngineKind.VLLM
    """The engine that is measured: vllm, or reference (plain transformers, needs no vLLM)."""
    ways: str = ""
    """Comma-separated ways to time, of ours, floor, prefill, vllm_prefill, vllm_one_token, vllm_beam_search and
    transformers; all that the engine allows by default."""
    sweep: bool = False
    """Also time every combination of prompt lengths 129, 250, 511 and widths 4, 16, 50."""
    rollout: RolloutSettings = RolloutSettings()
    """Settings of this engine that the other options do not decide."""

    @model_validator(mode="after")
    def _decided_once(self) -> Self:
        plain = RolloutSettings()
        for name, instead in DECIDED.items():
            if getattr(self.rollout, name) != getattr(plain, name):
                raise RequestError(f"--rollout.{name}".replace("_", "-"), getattr(self.rollout, name), instead)
        return self

    def own_settings(self, longest: int) -> RolloutSettings:
        """The settings of this engine, for sequences of up to `longest` tokens."""
        decided = {
            "engine": self.engine,
            "dtype": self.dtype,
            "width": self.width,
            "threads": self.threads,
            "max_model_len": longest,
            "gpus": 1.0 if self.device is Device.CUDA else 0.0,
        }
        return self.rollout.model_copy(update=decided)

    def chosen_ways(self) -> tuple[str, ...]:
        """The ways to time, in the order of `WAYS`.

        Raises:
            RequestError: an unknown way, or one that the engine does not allow.
        """
        possible = WAYS if self.engine is EngineKind.VLLM else tuple(way for way in WAYS if way not in VLLM_WAYS)
        named = [way.strip() for way in self.ways.split(",") if way.strip()]
        for way in named:
            if way != "floor" and way not in possible:
                raise RequestError("--ways", way, ", ".join((*possible, "floor")))
        wanted = {*named, "ours", *(PREFILLS if "floor" in named else ())} if named else set(possible)
        return tuple(way for way in possible if way in wanted)


def rollout_command(
    settings: Annotated[RolloutBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time constrained beams of this engine, of vLLM's own ways and of transformers, beside prefill alone."""
    ways = settings.chosen_ways()
    if settings.engine is EngineKind.VLLM and importlib.util.find_spec("vllm") is None:
        raise RequestError("--engine", "vllm, which is not installed", EngineKind.REFERENCE)
    shapes = [(settings.prompt_len, settings.width)]
    if settings.sweep:
        shapes += [(length, width) for length in SWEEP_LENGTHS for width in SWEEP_WIDTHS]
    largest = settings.model_copy(update={"prompt_len": max(s[0] for s in shapes), "width": max(s[1] for s in shapes)})
    with bench_model(largest) as model:
        ceiling = matmul_ceiling_tflops(
            getattr(torch, settings.dtype.value), threads=settings.threads, device=settings.device
        )
        with competitors(largest, model, ways) as children:
            points = [
                measure(
                    settings.model_copy(update={"prompt_len": length, "width": width}), model, ways, children, ceiling
                )
                for length, width in dict.fromkeys(shapes)
            ]
    main, *others = points
    return {**main, "sweep": dict(map(_short, points))} if others else main


def _short(point: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A point of the sweep by its shape (`250x16`): its ratios, and the medians."""
    ratios = {name: value for name, value in point.items() if name.startswith(("fraction", "speedup", "checked"))}
    medians = {name: way["seconds"]["median"] for name, way in point["ways"].items()}
    shape = {name: point["settings"][name] for name in ("prompt_len", "width")}
    return "{prompt_len}x{width}".format(**shape), {**shape, **ratios, "seconds": medians}


@contextmanager
def competitors(settings: RolloutBench, model: BenchModel, ways: Sequence[str]) -> Iterator[dict[str, Child]]:
    """The processes that the ways need, by name: ours, vllm, transformers (always, for the check)."""
    longest = settings.prompt_len + model.levels
    environment = internals.environment(threads=settings.threads)
    with ExitStack() as stack:

        def start(*arguments: Any) -> Child:
            return stack.enter_context(Child(*arguments, environment=environment, device=settings.device))

        children = {"ours": start(build_ours, settings.own_settings(longest), model.hf_dir, settings.device)}
        if set(ways) & set(VLLM_WAYS):
            arguments = vllm_ways.engine_settings(
                dtype=settings.dtype.value,
                longest=longest,
                width=settings.width,
            )
            children["vllm"] = start(vllm_ways.build, model.hf_dir, settings.threads, arguments)
        children["transformers"] = start(
            transformers_way.build, model.hf_dir, settings.threads, settings.dtype.value, settings.device
        )
        for child in children.values():
            child.wait()
        yield children


def build_ours(settings: RolloutSettings, hf_dir: Path, device: Device) -> Functions:
    """This engine: its beams, and its prefill by scoring one token after each prompt."""
    from rollout.engine import build_engine

    torch.set_num_threads(settings.threads)
    if settings.engine is EngineKind.REFERENCE:
        from rollout.reference_engine import ReferenceEngine

        engine: Any = ReferenceEngine(settings, hf_dir, device=device.value)
    else:
        engine = build_engine(settings, hf_dir)

    def beams(prompts: list[Prompt], width: int) -> Beams:
        groups = engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=width))
        rows = zip(groups.valid_PG, groups.token_PGT, groups.sequence_logp_PG, strict=True)
        return [
            [(tokens.tolist(), float(score)) for tokens, score in zip(token_GT[valid_G], logp_G[valid_G], strict=True)]
            for valid_G, token_GT, logp_G in rows
        ]

    def generate(prompts: list[Prompt], width: int) -> None:
        engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=width))

    def prefill(prompts: list[IntArray], token: IntArray) -> None:
        engine.score(prompts, [token] * len(prompts))

    return {"beams": beams, "generate": generate, "prefill": prefill, "close": engine.close}


def measure(
    settings: RolloutBench, model: BenchModel, ways: Sequence[str], children: Mapping[str, Child], ceiling: float
) -> dict[str, Any]:
    """One prompt length and width: time the ways and check the beams."""
    prompts = bench_prompts(settings, model)
    plain = [prompt.token_ids.tolist() for prompt in prompts]
    timed = {name: _way(name, settings, model, prompts, children) for name in ways}
    seconds = paired(timed, settings.repeats)
    checked = len(plain) if "transformers" in timed else min(CHECKED_PROMPTS, len(plain))
    found = children["ours"].call("beams", prompts[:checked], settings.width)
    reference = children["transformers"].call("beams", plain[:checked], settings.width)
    compared = agreement(found, reference, settings.dtype)
    floors = [statistics.median(seconds[name]) for name in PREFILLS if name in seconds]
    grown = limit_tokens(settings, model) / settings.prompt_len
    ours = statistics.median(seconds["ours"])
    return answer(
        settings,
        timed,
        seconds,
        ceiling_tflops=ceiling,
        checked=compared.passed,
        fraction_of_limit=min(floors) * grown / ours if floors else None,
        floor_seconds=min(floors) if floors else None,
        limit_seconds=min(floors) * grown if floors else None,
        limit_over_floor=grown,
        speedup_vs_vllm_beam_search=ratio(seconds, "vllm_beam_search", "ours"),
        speedup_vs_one_token_requests=ratio(seconds, "vllm_one_token", "ours"),
        speedup_vs_transformers=ratio(seconds, "transformers", "ours"),
        check={"prompts": checked, **compared.record()},
        model=model.record(),
    )


def _way(
    name: str, settings: RolloutBench, model: BenchModel, prompts: Sequence[Prompt], children: Mapping[str, Child]
) -> Way:
    """How one way is called, and what it has to compute."""
    plain = [prompt.token_ids.tolist() for prompt in prompts]
    width = settings.width
    owner, function, arguments = {
        "ours": ("ours", "generate", (list(prompts), width)),
        "prefill": ("ours", "prefill", ([p.token_ids for p in prompts], prompts[0].token_ids[:1])),
        "vllm_prefill": ("vllm", "prefill", (plain,)),
        "vllm_one_token": ("vllm", "one_token", (plain, width)),
        "vllm_beam_search": ("vllm", "beam_search", (plain, width)),
        "transformers": ("transformers", "beams", (plain, width)),
    }[name]
    child = children[owner]
    few = plain[:WARM_UP_PROMPTS]
    tokens, flops = work(settings, model, beams=name not in PREFILLS)
    return Way(
        time=child.timer(function, *arguments),
        tokens=tokens,
        flops=flops,
        repeats=SLOW_REPEATS.get(name),
        warm_up=child.timer(function, few, width) if name in SLOW_REPEATS else None,
        peak_mib=lambda: child.peak_mib(function),
        settings=_recorded(name, settings, settings.prompt_len + model.levels),
    )


def _recorded(name: str, settings: RolloutBench, longest: int) -> dict[str, Any]:
    """The settings of a way, for the answer."""
    if name in ("ours", "prefill"):
        return {"constrained": True, **settings.own_settings(longest).model_dump(mode="json")}
    if name == "transformers":
        return {
            "constrained": True,
            "prompts_per_call": transformers_way.PROMPTS_PER_CALL,
            "attention": "sdpa",
            "repeats": min(SLOW_REPEATS[name], settings.repeats),
        }
    arguments = vllm_ways.engine_settings(dtype=settings.dtype.value, longest=longest, width=settings.width)
    repeats = min(SLOW_REPEATS.get(name, settings.repeats), settings.repeats)
    return {"constrained": name == "vllm_one_token", "repeats": repeats, **arguments}


def work(settings: BenchSettings, model: BenchModel, *, beams: bool) -> tuple[int, float]:
    """Tokens and operations that no way can do without: the prompts, and with `beams` what the beams add."""
    prompt, width, steps = settings.prompt_len, settings.width if beams else 0, model.levels - 1
    pairs = causal_pairs(prompt) + width * causal_pairs(steps, prompt)
    tokens = prompt + width * steps
    flops = model.arithmetic.forward_flops(tokens=tokens, pairs=pairs, head_rows=1 + width * steps)
    return settings.prompts * tokens, settings.prompts * flops


def limit_tokens(settings: BenchSettings, model: BenchModel) -> int:
    """Tokens per prompt that beams cannot do without: the prompt, and every beam's tokens but the last."""
    return settings.prompt_len + settings.width * (model.levels - 1)
