"""Contract: `windlass bench reward`, `sync` and `data` check what they timed: rewards of a batch are those of its
lists, the receiver of a push holds the sender's bits whatever the mover, every row of an import is kept or counted.

Not checked here: the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launch.bench import reward, swaps, sync
from launch.bench.data import DataBench, data_command
from launch.bench.reward import RewardBench, ranker_flops, reward_command
from launch.bench.sync import SyncBench, sync_command
from reward.batch_scoring import BatchScores
from reward.sasrec import SASRec, SASRecShape
from reward.swap_credit import SwapForm, swap_credit
from tests.launch.test_bench_rollout import bench, check_answer


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rewards_need_no_vllm_ray_or_deepspeed(tmp_path: Path) -> None:
    few = ("--model", "tiny", "--prompts", "7", "--history", "9", "--repeats", "1", "--threads", "1")
    answer = bench(tmp_path, "reward", *few, "--swap-lists", "500", "--swap-items", "6", blocked=True)
    assert answer["checked"] is True
    credit: Any = answer["swaps"]
    assert (credit["lists"], credit["items"], credit["threads"], credit["checked"]) == (500, 6, 1, True)
    assert credit["lists_per_s"] > 0
    assert credit["speedup_vs_loop"] > 0
    assert answer["lists_per_s"] > 0  # type: ignore[operator]
    assert answer["speedup_vs_loop"] > 0  # type: ignore[operator]


def test_rewards_that_depend_on_the_batch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RewardBench(model="tiny", prompts=5, history=4, repeats=1, threads=1, swap_lists=40)
    right = reward.score_batch

    def wrong(*arguments: Any, chunk: int) -> BatchScores:
        found = right(*arguments, chunk=chunk)
        if chunk > 1:
            found.scores[3] = found.scores[3] + 0.01
        return found

    monkeypatch.setattr(reward, "score_batch", wrong)
    assert reward_command(settings)["checked"] is False


def test_wrong_swap_credit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert swaps.swap_figures(40, 5, 1, 0)["checked"] is True
    monkeypatch.setattr(swaps, "swap_credit", lambda gains, form: swap_credit(gains, SwapForm.ALL_PAIRS))
    assert swaps.swap_figures(40, 5, 1, 0)["checked"] is False
    assert swaps.real_swaps(np.zeros(3, np.float32)) == [0.0, 0.0, 0.0]


def test_operations_of_a_ranker() -> None:
    shape = SASRecShape(n_items=10, width=8, layers=3)
    network = SASRec(shape)
    products = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    assert ranker_flops(shape, 1) == 2 * products + 4 * 3 * 8


def push(movers: str) -> dict[str, Any]:
    return sync_command(SyncBench(model="tiny", repeats=2, threads=1, movers=movers))


def test_a_push_arrives() -> None:
    answer = push("shared_memory")
    check_answer("sync", answer)
    assert answer["checked"] is True
    assert answer["bytes"] >= 2 * 648_256
    assert answer["calls"] == 2
    assert answer["link_fraction"] > 0


@pytest.mark.long
def test_a_push_arrives_by_every_mover() -> None:
    answer = push("")
    assert answer["checked"] is True
    assert set(answer["movers"]) == {"shared_memory", "file", "gloo"}


@pytest.mark.long
def test_a_push_that_loses_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync.Push, "time", lambda push: 1.0)
    assert push("shared_memory")["checked"] is False


def test_an_import_counts_every_row() -> None:
    answer = data_command(DataBench(rows=5_000, items=300, repeats=1, threads=1))
    check_answer("data", answer)
    assert answer["checked"] is True
    assert answer["rows_per_s"] > 0
    assert answer["counts"]["counts"]["rows_read"] == 5_000
    assert answer["trie"]["items"] == 300
