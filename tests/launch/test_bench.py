"""Contract: the frame of the benchmarks. Ways take turns; ratios are of medians; the arithmetic of the limit is that of
counting by hand; models, catalogues and prompts are functions of the seed; a process of a competitor answers, times
itself and hands its errors on; a wrong request is one line and exit code 2; nothing tells the name of the machine.

Not checked here: how long anything takes, and the benchmarks themselves (test_bench_rollout.py and its neighbours).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from data.errors import RequestError, RunError
from launch import cli, commands
from launch.bench.ceiling import Arithmetic, causal_pairs, matmul_ceiling_tflops
from launch.bench.child import Child, Functions
from launch.bench.frame import Local, Way, answer, paired, ratio
from launch.bench.machine import describe_machine, machine_kind
from launch.bench.models import bench_model, bench_prompts, random_catalogue
from launch.bench.settings import BenchSettings, Device


def way(order: list[str], name: str, seconds: float, **more: Any) -> Way:
    """A way that takes the same time whenever it is asked, and notes that it was."""

    def time() -> float:
        order.append(name)
        return seconds

    return Way(time=time, tokens=100, flops=2e12, **more)


def test_ways_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    ways = {"a": way(order, "a", 1.0), "b": way(order, "b", 2.0), "slow": way(order, "slow", 8.0, repeats=1)}
    seconds = paired(ways, 3)
    assert order == ["a", "b", "slow", *("a", "b", "slow"), *("b", "a"), *("a", "b")]
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "slow": [8.0]}
    assert ratio(seconds, "slow", "a") == 8.0
    assert ratio(seconds, "absent", "a") is None


def test_a_slow_way_warms_up_with_less() -> None:
    order: list[str] = []
    paired({"slow": way(order, "slow", 1.0, warm_up=lambda: order.append("little"))}, 1)
    assert order == ["little", "slow"]


def test_the_answer_has_the_common_fields() -> None:
    order: list[str] = []
    ways = {"ours": way(order, "ours", 2.0), "copy": Way(time=lambda: 1.0)}
    seconds = {"ours": [1.0, 2.0, 9.0], "copy": [1.0]}
    found = answer(BenchSettings(threads=1), ways, seconds, ceiling_tflops=4.0, checked=True, speedup=3.0)
    assert found["seconds"] == {"median": 2.0, "all": [1.0, 2.0, 9.0]}
    assert found["tokens_per_s"] == 50
    assert found["mfu"] == 0.25
    assert found["ceiling_tflops"] == 4.0
    assert found["speedup"] == 3.0
    assert found["checked"] is True
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["ways"]["copy"]["mfu"] is None
    assert set(found) >= {"machine", "settings", "seconds", "tokens_per_s", "mfu", "ceiling_tflops", "peak_mib"}
    json.dumps(found, allow_nan=False)


def test_the_machine_has_no_name() -> None:
    machine = describe_machine()
    assert machine["kind"]["cpu"]
    assert platform.node() not in json.dumps(machine)
    parts = {"processor": "AMD EPYC 9B14 96-Core Processor", "cards": ["NVIDIA H200, 143771 MiB"]}
    cores = len(os.sched_getaffinity(0))
    assert machine_kind(parts, Device.CPU) == f"amd-epyc-{cores}-cores"
    assert machine_kind(parts, Device.CUDA) == "nvidia-h200"
    parts["processor"] = "Intel(R) Xeon(R) Platinum 8488C @ 2.40GHz"
    assert machine_kind(parts, Device.CPU) == f"intel-xeon-{cores}-cores"


def test_operations_are_those_of_counting_by_hand() -> None:
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    found = Arithmetic.of(config)
    # Queries and output of 2 heads, keys and values of 1, gate, up and down.
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20
    assert found.products == 3 * layer
    assert found.attention == 3 * 2 * 4
    assert found.head == 8 * 11
    assert found.parameters == 3 * layer + 8 * 11 + 3 * (2 * 8 + 2 * 4) + 8
    pairs = sum(1 for row in range(5) for column in range(7 + 5) if column <= 7 + row)
    assert causal_pairs(5, 7) == pairs
    wanted = 2 * 3 * layer * 5 + 4 * found.attention * pairs + 2 * 8 * 11 * 2
    assert found.forward_flops(tokens=5, pairs=pairs, head_rows=2) == wanted


def test_the_ceiling_is_a_speed() -> None:
    before = torch.get_num_threads()
    try:
        assert matmul_ceiling_tflops(torch.float32, threads=1, device=Device.CPU, edges=(64, 128)) > 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_catalogues_branch_at_every_level(levels: int) -> None:
    settings = BenchSettings(model="tiny", levels=levels, threads=1)
    catalogue = random_catalogue(settings)
    paths = [tuple(catalogue.tokens(item)) for item in range(catalogue.n_items)]
    assert len(set(paths)) == len(paths)
    assert {len(path) for path in paths} == {levels}
    for level in range(1, levels):
        children: dict[tuple[int, ...], set[int]] = {}
        for path in paths:
            children.setdefault(path[:level], set()).add(path[level])
        assert {len(tokens) for tokens in children.values()} == {max(map(len, children.values()))}
        assert len(children[paths[0][:level]]) > 1
    assert catalogue.digest == random_catalogue(settings).digest
    if levels > 1:  # with one level all codes are items
        assert catalogue.digest != random_catalogue(settings.model_copy(update={"seed": 1})).digest


def test_small_is_the_model_of_the_issue() -> None:
    with bench_model(BenchSettings(threads=1)) as model:
        record = model.record()
        assert (record["layers"], record["width"], record["vocabulary"]) == (6, 384, 1031)
        assert 10.55e6 < record["parameters_without_embedding"] < 10.65e6
        prompts = bench_prompts(BenchSettings(prompts=3, prompt_len=7, threads=1), model)
        again = bench_prompts(BenchSettings(prompts=3, prompt_len=7, threads=1), model)
        other = bench_prompts(BenchSettings(prompts=3, prompt_len=7, threads=1), model, draw=1)
    assert [prompt.token_ids.tolist() for prompt in prompts] == [prompt.token_ids.tolist() for prompt in again]
    assert [prompt.token_ids.tolist() for prompt in prompts] != [prompt.token_ids.tolist() for prompt in other]
    assert {len(prompt.token_ids) for prompt in prompts} == {7}


def build(base: int) -> Functions:
    """Functions of a competitor for the test below."""

    def wrong() -> None:
        raise RequestError("width", base, "less")

    def strange() -> None:
        raise LookupError("lost")

    def hold() -> int:
        return int(np.ones(64 * 2**20, np.uint8).sum())

    return {
        "add": lambda more: base + more,
        "variable": lambda: os.environ.get("WINDLASS_BENCH_TEST"),
        "wrong": wrong,
        "strange": strange,
        "hold": hold,
        "close": lambda: None,
    }


def test_a_competitor_lives_in_a_process_of_its_own() -> None:
    with Child(build, 40, environment={"WINDLASS_BENCH_TEST": "theirs"}) as child:
        assert child.call("add", 2) == 42
        assert child.call("variable") == "theirs"
        assert "WINDLASS_BENCH_TEST" not in os.environ
        assert child.timer("add", 1)() >= 0
        assert child.timer("hold")() > 0
        assert child.peak_mib("hold") > child.peak_mib("add") + 32
        with pytest.raises(RequestError, match="width: 40; legal: less"):
            child.call("wrong")
        with pytest.raises(RunError, match="LookupError: lost"):
            child.call("strange")
        assert child.call("add", 3) == 43


def test_local_work_reports_its_peak() -> None:
    local = Local(lambda: np.ones(64 * 2**20, np.uint8).sum())
    assert local.time() > 0
    assert local.peak_mib() > 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("rollout --model tiny --prompts 0", "prompts"),
        ("rollout --model tiny --width 501 --engine reference", "--width: 501; legal: 1 to 500"),
        ("rollout --model tiny --prompt-len 4094 --engine reference", "--prompt-len: 4094; legal: 1 to 4093"),
        ("rollout --model nowhere --engine reference", "--model: nowhere; legal: tiny, small"),
        ("rollout --model tiny --ways theirs", "--ways: theirs"),
        ("rollout --model tiny --engine reference --ways vllm_prefill", "--ways: vllm_prefill"),
        ("rollout --model tiny --repeats 0", "repeats"),
        ("rollout --model tiny --rollout.max-model-len 99", "--rollout.max-model-len: 99; legal: --prompt-len"),
        ("reward --model tiny --group 501", "--group: 501; legal: 2 to 500"),
        ("sync --model tiny --movers pigeon", "--movers: pigeon"),
        ("sync --model tiny --movers nccl", "--movers: nccl"),
        ("data --rows 10", "rows"),
        ("speed", "'bench speed'"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments.split()]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    line = [text for text in told if text.startswith("windlass: ")]
    assert len(line) == 1
    assert words in line[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "reward", "--device", "cuda"]) == 2
    assert "--device: cuda" in capsys.readouterr().err


def test_every_benchmark_takes_the_common_options() -> None:
    wanted = set(BenchSettings.model_fields)
    for name, command in commands.COMMANDS.items():
        if name.startswith("bench ") and name != "bench suite":
            body: Callable[..., Any] = cli.load(name, command)
            settings = next(iter(body.__annotations__.values()))
            assert wanted <= set(_settings_class(body).model_fields), f"{name} {settings}"
            assert command.answers


def _settings_class(body: Callable[..., Any]) -> type[BenchSettings]:
    import typing

    hints = typing.get_type_hints(body)
    return next(hint for name, hint in hints.items() if name != "return")
