"""Jobs of ranked lists that make no sense: what lists ask of rollouts, rewards, objective and evaluation.

Each refusal says why. Checks within the section `lists` are in `trainer.list_settings`.
"""

from __future__ import annotations

from typing import Protocol

from data.errors import RequestError
from data.text_settings import TextSettings
from reward.names import RankingMetric
from reward.settings import RewardSettings
from reward.swap_credit import SwapForm
from rollout.settings import RolloutSettings
from trainer.credit_settings import Credit
from trainer.group_settings import GroundTruth, GroupSettings, Refill
from trainer.list_settings import ListSettings
from trainer.objective_settings import ObjectiveSettings
from trainer.run_settings import EvaluationSettings
from trainer.uncertainty import VarianceKind

MEASURED = (RankingMetric.NDCG, RankingMetric.RECALL, RankingMetric.MRR, RankingMetric.HR)
"""Metrics of lists."""


class ListJob(Protocol):
    """What is checked of an `rl` job."""

    @property
    def lists(self) -> ListSettings: ...
    @property
    def objective(self) -> ObjectiveSettings: ...
    @property
    def rollout(self) -> RolloutSettings: ...
    @property
    def reward(self) -> RewardSettings: ...
    @property
    def group(self) -> GroupSettings: ...


def check_language_lists(lists: ListSettings, text: TextSettings) -> None:
    """Refuse what a language model's prompts would not show.

    Raises:
        RequestError: words for a need that there is not, or tasks beside the lists.
    """
    names = [need.name for need in lists.needs]
    unknown = [name for name in text.needs if name not in names]
    if unknown:
        raise RequestError("text.needs", unknown[0], f"among {', '.join(names) or 'none'}, the needs of lists.needs")
    if lists.on and text.on and text.tasks.align:
        raise RequestError("text.tasks", "a task of single items", "next_item alone with lists.needs")


def check_list_evaluation(lists: ListSettings, evaluation: EvaluationSettings, *, logged: bool) -> None:
    """Refuse rows and measurements that lists do not have.

    Args:
        logged: the rows come from a feedback log.

    Raises:
        RequestError: names the field and the reason.
    """
    lists.loaded_needs()
    if logged:
        raise RequestError("lists.needs", len(lists.needs), "none with feedback: logs are of single items")
    metric = evaluation.metric.partition("@")[0]
    if metric not in MEASURED:
        legal = ", ".join(f"{name.value}@K" for name in MEASURED)
        raise RequestError("evaluation.metric", evaluation.metric, f"{legal} with lists.needs")
    if max(evaluation.k) > lists.spec.width:
        raise RequestError("evaluation.k", list(evaluation.k), f"at most {lists.spec.width}, the items of a list")
    for name, value in (
        ("scores.rows", evaluation.scores.rows),
        ("unconstrained_rows", evaluation.unconstrained_rows),
        ("feedback", evaluation.feedback),
    ):
        if value:
            legal = f"{'none' if name == 'feedback' else 0} with lists.needs: it is measured for single items"
            raise RequestError(f"evaluation.{name}", value, legal)


def check_list_objective(job: ListJob, *, dumps: bool) -> None:
    """Refuse an `rl` job whose lists nothing could be learned from, or that wants single items as well.

    Args:
        dumps: the groups go to a dump or come from one.

    Raises:
        RequestError: names the field and the reason.
    """
    credit, reward = job.objective.credit, job.reward
    if not credit.of_lists:
        raise RequestError("objective.credit.kind", credit.kind.value, "sequence or items with lists.needs")
    # The sums of single-item sources would be added to rewards of lists.
    for name, weight in {**reward.part_weights(), "feedback": reward.feedback}.items():
        if weight:
            raise RequestError(f"reward.{name}", weight, "0 with lists.needs: lists are rewarded for their gains")
    _check_gains(credit, reward)
    _check_groups(job.group)
    if dumps:
        raise RequestError(
            "lists.needs", len(job.lists.needs), "none with rollout_only or train_only: dumps hold no credit"
        )


def _check_gains(credit: Credit, reward: RewardSettings) -> None:
    """What credit is made of, and its variance."""
    uncertain = credit.uncertainty.variance is not VarianceKind.OFF
    if reward.list_ranker is not None:
        # It scores lists as they are: there are no swaps in the other forms, and it has no variances.
        if credit.form not in (SwapForm.CAUSAL, SwapForm.ALL_PAIRS):
            legal = "causal or all_pairs with reward.list_ranker, which is asked for swaps"
            raise RequestError("objective.credit.form", credit.form.value, legal)
        if uncertain:
            legal = "off with reward.list_ranker, whose scores have no variance"
            raise RequestError("objective.credit.uncertainty.variance", credit.uncertainty.variance.value, legal)
    if uncertain and not reward.asks_ranker:
        where = "objective.credit.uncertainty.variance"
        raise RequestError(where, credit.uncertainty.variance.value, "off, or a critic as reward.ranker")


def _check_groups(group: GroupSettings) -> None:
    """What joins groups of single items only."""
    if group.refill is not Refill.NONE:
        legal = "none with lists.needs: whether lists differ shows in the objective only"
        raise RequestError("group.refill", group.refill.value, legal)
    if group.ground_truth is not GroundTruth.NONE:
        legal = "none with lists.needs: the ground truth is an item, not a list"
        raise RequestError("group.ground_truth", group.ground_truth.value, legal)
