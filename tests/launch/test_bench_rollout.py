"""Contract: `windlass bench rollout` times what it says and finds out when beams are wrong. The processor that
constrains transformers gives exactly the constrained policy; beams that differ in a path or in a score do not pass; the
limit is that of counting tokens. With the reference engine it needs no vLLM, Ray or DeepSpeed.

Not checked here: the figures; the beams of the engines themselves (tests/rollout).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from launch import cli
from launch.bench.beams import Beams, agreement
from launch.bench.models import bench_model, random_catalogue
from launch.bench.rollout import RolloutBench, limit_tokens, work
from launch.bench.settings import BenchSettings
from launch.bench.transformers_way import TrieProcessor
from rollout.settings import EngineDtype
from tests.requirements import require

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "import sys\nsys.modules.update(dict.fromkeys(('vllm', 'ray', 'deepspeed')))\n"
"""Run at the start of every interpreter (as sitecustomize) it makes the three look absent, in competitors too."""


def test_the_processor_gives_the_constrained_policy() -> None:
    catalogue = random_catalogue(BenchSettings(model="tiny", threads=1))
    trie = catalogue.trie()
    paths = [catalogue.tokens(item).tolist() for item in range(catalogue.n_items)]
    prompt = [7, 9, 11]
    prefixes = [[], paths[0][:1], paths[17][:2], [0]]
    for length in range(3):
        rows = [prefix for prefix in prefixes if len(prefix) == length]
        logits_NV = torch.randn(len(rows), catalogue.vocabulary.size)
        found_NV = TrieProcessor(trie, len(prompt))(torch.tensor([prompt + row for row in rows]), logits_NV)
        for row, logits_V, found_V in zip(rows, logits_NV, found_NV, strict=True):
            legal = sorted({path[length] for path in paths if path[:length] == row})
            wanted_V = torch.full_like(logits_V, -torch.inf)
            wanted_V[legal] = logits_V[legal].log_softmax(0) if legal else torch.zeros(0)
            torch.testing.assert_close(found_V, wanted_V)


def beams(*scores: float) -> Beams:
    return [[([4, 8 + rank], score) for rank, score in enumerate(scores)]]


def test_agreement_sees_other_paths_scores_and_numbers() -> None:
    ours = beams(-1.0, -2.0, -3.0)
    exact = EngineDtype.FLOAT32
    assert agreement(ours, ours, exact).passed
    assert agreement(ours, beams(-1.0, -2.0, -3.00005), exact).passed
    assert not agreement(ours, beams(-1.0, -2.0, -3.001), exact).passed
    assert not agreement(ours, beams(-1.0, -2.0), exact).passed
    other = beams(-1.0, -2.0)
    other[0].append(([5, 9], -3.0))
    assert not agreement(ours, other, exact).passed
    assert agreement(ours, other, exact).shared == pytest.approx(2 / 3)


def test_a_score_that_is_no_number_does_not_agree() -> None:
    assert not agreement(beams(-1.0, float("nan"), -3.0), beams(-1.0, -2.0, -3.0), EngineDtype.BFLOAT16).passed


def test_agreement_in_bfloat16_allows_neighbours_to_change_places() -> None:
    ours = [[([4, rank], -1.0 - rank / 100) for rank in range(16)]]
    theirs = [[*ours[0][:15], ([5, 1], -1.155)]]
    assert agreement(ours, theirs, EngineDtype.BFLOAT16).passed
    assert not agreement(ours, [[*ours[0][:12], *[([6, r], -1.2) for r in range(4)]]], EngineDtype.BFLOAT16).passed
    assert not agreement(ours, [[(path, score - 0.2) for path, score in ours[0]]], EngineDtype.BFLOAT16).passed


def test_the_limit_counts_tokens() -> None:
    settings = RolloutBench(model="tiny", prompts=3, prompt_len=250, width=16, threads=1)
    with bench_model(settings) as model:
        assert limit_tokens(settings, model) == 250 + 16 * 2
        tokens, flops = work(settings, model, beams=True)
        prefill_tokens, prefill_flops = work(settings, model, beams=False)
        assert (tokens, prefill_tokens) == (3 * 282, 3 * 250)
        arithmetic = model.arithmetic
        pairs = 16 * (251 + 252)
        extra = 2 * arithmetic.products * 32 + 4 * arithmetic.attention * pairs + 2 * arithmetic.head * 32
        assert flops - prefill_flops == 3 * extra


def test_ways_follow_the_engine() -> None:
    assert RolloutBench(threads=1).chosen_ways()[0] == "ours"
    assert RolloutBench(threads=1, ways="floor").chosen_ways() == ("ours", "prefill", "vllm_prefill")
    reference = RolloutBench.model_validate({"engine": "reference", "ways": "", "threads": 1})
    assert reference.chosen_ways() == ("ours", "prefill", "transformers")
    assert reference.model_copy(update={"ways": "floor"}).chosen_ways() == ("ours", "prefill")


def bench(tmp_path: Path, *arguments: str, blocked: bool) -> dict[str, object]:
    """A benchmark as a command, with vLLM, Ray and DeepSpeed absent where `blocked`."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK if blocked else "")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "launch.cli", "bench", *arguments, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    check_answer(arguments[0], answer)
    return answer


def check_answer(benchmark: str, answer: dict[str, object]) -> None:
    """Check an answer against the schema of all benchmarks and that of its own."""
    for name in ("bench", f"bench-{benchmark}"):
        schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("benchmark", ["rollout", "learner", "step", "stages", "sync", "reward", "data"])
def test_recorded_answers_match_their_schema(benchmark: str) -> None:
    table = json.loads((ROOT / "docs" / "results" / f"bench_{benchmark}.json").read_text())
    answers = [row["result"] for row in table["rows"] if row["result"] is not None]
    assert answers
    for answer in answers:
        check_answer(benchmark, answer)


SMALL = ("--model", "tiny", "--prompts", "3", "--prompt-len", "20", "--width", "5", "--repeats", "1", "--threads", "1")


def test_the_reference_engine_needs_no_vllm_ray_or_deepspeed(tmp_path: Path) -> None:
    answer = bench(tmp_path, "rollout", "--engine", "reference", *SMALL, "--dtype", "float32", blocked=True)
    assert answer["checked"] is True
    assert answer["fraction_of_limit"] > 0  # type: ignore[operator]
    assert answer["speedup_vs_transformers"] > 0  # type: ignore[operator]
    assert answer["speedup_vs_vllm_beam_search"] is None
    assert answer["limit_over_floor"] == pytest.approx((20 + 5 * 2) / 20)
    assert answer["check"]["shared_beams"] == 1.0  # type: ignore[index]


def test_an_engine_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.run(["bench", "rollout", "--model", "tiny"]) == 2
    assert "--engine: vllm, which is not installed; legal: reference" in capsys.readouterr().err


@pytest.mark.long
def test_all_ways_with_vllm(tmp_path: Path) -> None:
    require("vllm")
    answer = bench(tmp_path, "rollout", *SMALL, "--dtype", "float32", blocked=False)
    assert answer["checked"] is True
    ways = answer["ways"]
    assert set(ways) == {"ours", "prefill", "vllm_prefill", "vllm_one_token", "vllm_beam_search", "transformers"}  # type: ignore[call-overload]
