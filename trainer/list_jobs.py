"""What jobs of ranked lists have in place of single items' parts: their feeds, and what scores their groups."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from data.feed import Feed
from reward.scoring import RewardScorer
from reward.service import RewardService
from reward.swap_client import SwapClient
from trainer.data_checks import check_batch
from trainer.jobs import RlJob, SftJob
from trainer.list_data import ListData, PreparedPrompts
from trainer.list_scoring import ListScorer
from trainer.list_sft import IdealListFeed, teachable
from trainer.policy_data import PolicyData


class ListRows(NamedTuple):
    """What a job of lists trains on, and the prompts that are left out, by reason."""

    feed: Any
    left_out: dict[str, int]

    @property
    def told(self) -> str:
        """One line for the person who watches."""
        reasons = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in self.left_out.items() if count)
        return f"lists: {len(self.feed.prompts):,} training prompts; mended or left out: {reasons or 'none'}"

    def record(self) -> dict[str, Any]:
        """What a summary keeps."""
        return {"training": len(self.feed.prompts), "left_out": self.left_out}


class PromptFeed(Feed):
    """A feed of prompts that are made already."""

    def __init__(self, prompts: PreparedPrompts, batch_size: int, seed: int, *, fingerprint: str) -> None:
        self.prompts = prompts
        super().__init__(prompts, prompts, batch_size, seed, fingerprint=fingerprint)


def ideal_rows(job: SftJob, data: PolicyData) -> ListRows:
    """Training prompts with their ideal lists, for supervised training.

    Raises:
        RequestError: no prompt has a gain that is seen.
    """
    training = lists_of(data).training()
    prompts, unseen = teachable(training.prompts)
    feed = IdealListFeed(
        prompts=prompts,
        catalogue=data.catalogue,
        lists=job.lists,
        batch_rows=job.batch_rows,
        seed=job.seed,
        fingerprint=fingerprint(job, data),
    )
    return ListRows(feed, training.counts | unseen)


def prompt_rows(job: RlJob, data: PolicyData) -> ListRows:
    """Training prompts, for rollouts.

    Raises:
        RequestError: fewer prompts than a batch.
    """
    training = lists_of(data).training(latest_rows=job.data.latest_rows)
    check_batch(job, len(training.prompts))
    prompts = PreparedPrompts(prompts=training.prompts)
    feed = PromptFeed(prompts, job.batch_prompts, job.seed, fingerprint=fingerprint(job, data))
    return ListRows(feed, training.counts)


def list_scorer(job: RlJob, rewards: RewardScorer, swaps: SwapClient | None) -> ListScorer:
    """What scores the groups of a job; `swaps` reaches its list-wise ranker."""
    return ListScorer(rewards, job.objective.credit.form, swaps=swaps, seed=job.seed)


def swap_client(job: RlJob, service: RewardService | None) -> SwapClient | None:
    """What reaches the list-wise ranker of a job, None where it has none."""
    return None if service is None or job.reward.list_ranker is None else service.swap_client()


def lists_of(data: PolicyData) -> ListData:
    """The ranking prompts of a job that has them."""
    if data.lists is None:
        raise ValueError("the job ranks no lists")
    return data.lists


def fingerprint(job: SftJob | RlJob, data: PolicyData) -> str:
    """Of what the feed draws from: the dataset and the section `lists`."""
    digest = hashlib.sha256(job.lists.model_dump_json().encode()).hexdigest()
    return f"{data.dataset.fingerprint}+lists-{digest[:12]}"
