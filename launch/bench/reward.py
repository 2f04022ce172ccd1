"""`windlass bench reward`: the rewards of a batch as one call, against the same path list by list.

A list is a prompt's group of completions with its history. The ranker is a SASRec with random weights; items matched,
ranks and ranker scores are weighted together as in a job. Neither Ray nor a server is involved. `swaps` in the answer
is the credit of ranked lists by swaps (`launch.bench.swaps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

import numpy as np
import torch
import tyro
from pydantic import Field

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import Decode, DecodeSpec, Finish, Groups, IntArray, Prompt, ScoredGroups
from launch.bench.ceiling import causal_pairs, matmul_ceiling_tflops
from launch.bench.frame import Local, Way, answer, paired, ratio
from launch.bench.models import bench_catalogue
from launch.bench.settings import BenchSettings, Device
from launch.bench.swaps import swap_figures
from reward.batch_scoring import BatchScores, score_batch
from reward.client import RewardClient
from reward.ranker import Ranker
from reward.sasrec import SASRec, SASRecRanker, SASRecShape
from reward.scoring import RewardScorer
from reward.settings import RankerTransform, RewardSettings
from reward.wire import ScoreCall

TOLERANCE: Final = 1e-4
"""Largest difference between a reward of the batch and the same alone; the rows of a product round by their number."""


class RewardBench(BenchSettings):
    """Arguments of `windlass bench reward`; of the common ones, `--prompt-len`, `--width` and `--dtype` change nothing
    (the ranker is float32)."""

    prompts: int = Field(256, ge=1)
    """Lists of one batch."""
    history: int = Field(50, ge=1, le=4096)
    """Items of each history."""
    ranker_width: int = Field(64, ge=4, le=4096)
    """Width of the ranker."""
    swap_lists: int = Field(1_000_000, ge=1)
    """Ranked lists whose swap credit is timed, on one core whatever `--threads` says."""
    swap_items: int = Field(30, ge=2, le=1000)
    """Items of each of them."""
    reward: RewardSettings = RewardSettings(ranker="sasrec", ranker_score=1.0, ranker_transform=RankerTransform.SIGMOID)
    """Sources, weights, and samples per call of the ranker (`chunk`)."""


def reward_command(
    settings: Annotated[RewardBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time the rewards of a batch of groups, at once and list by list."""
    settings.check_device(Device.CPU)
    catalogue = bench_catalogue(settings)
    prompts, groups = random_groups(settings, catalogue)
    ceiling = matmul_ceiling_tflops(torch.float32, threads=settings.threads, device=Device.CPU)
    network = random_ranker(settings, catalogue.n_items)
    whole = scorer(settings.reward, SASRecRanker(network, chunk=settings.reward.chunk), settings.reward.chunk)
    # Alone a list would pay for the padding of a chunk; the loop gets a ranker that does not pad.
    single = scorer(settings.reward, SASRecRanker(network, chunk=1), 1)

    def batch() -> ScoredGroups:
        return whole.score(prompts, groups)[0]

    def loop() -> list[ScoredGroups]:
        return [single.score([prompt], groups.take(np.array([row])))[0] for row, prompt in enumerate(prompts)]

    steps = min(settings.history, network.shape.max_history) + 1

    def way(work: Callable[[], object], chunk: int) -> Way:
        local = Local(work)
        return Way(
            time=local.time,
            peak_mib=local.peak_mib,
            tokens=len(prompts) * steps,
            flops=len(prompts) * ranker_flops(network.shape, steps),
            settings={"chunk": chunk, "threads": settings.threads},
        )

    ways = {"ours": way(batch, settings.reward.chunk), "loop": way(loop, 1)}
    seconds = paired(ways, settings.repeats)
    swaps = swap_figures(settings.swap_lists, settings.swap_items, settings.repeats, settings.seed)
    gap = float(np.abs(batch().reward_PG - np.concatenate([one.reward_PG for one in loop()])).max())
    filled = answer(
        settings,
        ways,
        seconds,
        ceiling_tflops=ceiling,
        checked=gap <= TOLERANCE and bool(batch().usable_P.all()) and swaps["checked"],
        speedup_vs_loop=ratio(seconds, "loop", "ours"),
        check={"reward_gap_max": gap, "tolerance": TOLERANCE},
        swaps=swaps,
    )
    return {"lists_per_s": settings.prompts / filled["seconds"]["median"], **filled}


def scorer(settings: RewardSettings, ranker: Ranker, chunk: int) -> RewardScorer:
    """The reward path of a job around a ranker in this process."""

    def attempt(call: ScoreCall, deadline_s: float) -> BatchScores:
        return score_batch(ranker, call.histories(), call.candidates(), chunk=chunk)

    return RewardScorer(settings, RewardClient(attempt, settings))


def random_ranker(settings: RewardBench, n_items: int) -> SASRec:
    """A SASRec with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        shape = SASRecShape(n_items=n_items, width=settings.ranker_width, max_history=settings.history)
        return SASRec(shape)


def random_groups(settings: RewardBench, catalogue: Catalogue) -> tuple[list[Prompt], Groups]:
    """Prompts with random histories, and groups of distinct items of which every second holds the target.

    Raises:
        RequestError: the group is larger than the catalogue.
    """
    if settings.group > catalogue.n_items:
        raise RequestError("--group", settings.group, f"2 to {catalogue.n_items}, the items of the catalogue")
    random = np.random.default_rng(settings.seed)
    count, members = settings.prompts, settings.group
    item_PG = np.stack([random.choice(catalogue.n_items, members, replace=False) for _ in range(count)])
    target_P = np.where(np.arange(count) % 2, random.integers(0, catalogue.n_items, count), item_PG[:, members // 2])
    none: IntArray = np.zeros(0, dtype=np.int32)
    prompts = [
        Prompt(
            prompt_id=row,
            token_ids=none,
            user_id=row,
            history=random.integers(0, catalogue.n_items, settings.history).astype(np.int32),
            exclusions=none,
            target=int(target_P[row]),
        )
        for row in range(count)
    ]
    tokens, length = catalogue.tokens_of(item_PG.ravel())
    width = int(length.max())
    token_XT = np.full((item_PG.size, width), -1, np.int32)
    token_XT[np.arange(width) < length[:, None]] = tokens
    shape = (count, members)
    return prompts, Groups(
        prompt_id_P=np.arange(count, dtype=np.int64),
        valid_PG=np.ones(shape, np.bool_),
        token_PGT=token_XT.reshape(*shape, width),
        length_PG=length.reshape(shape),
        item_PG=item_PG.astype(np.int32),
        logp_PGT=np.zeros((*shape, width), np.float32),
        finish_PG=np.full(shape, Finish.ITEM.value),
        weight_version_P=np.zeros(count, np.int64),
        engine_id_P=np.full(count, "bench"),
        spec=DecodeSpec(decode=Decode.BEAM, width=members),
        constraint="item_trie",
        catalogue_digest=catalogue.digest,
    )


def ranker_flops(shape: SASRecShape, steps: int) -> float:
    """Operations of the states of one history: 12 width^2 weights per block, and causal attention."""
    return shape.layers * (2.0 * 12 * shape.width**2 * steps + 4.0 * shape.width * causal_pairs(steps))
