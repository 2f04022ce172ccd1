"""Every recipe is a sound job with a header, an ablation differs from its parent in what it names, and objectives that
their job cannot feed are refused with the reason. Does not run them.
"""

from __future__ import annotations

from typing import Any

import pytest

from data.errors import RequestError
from launch.config import load_job, recipe_header, recipe_names, recipe_path, to_mapping
from trainer.jobs import CriticJob, RlJob

METHODS = ("grpo", "dapo", "dr_grpo", "gspo", "rere", "tawin", "adagrpo", "abpo", "flexrec", "unified")


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differences(one: str, two: str) -> dict[str, tuple[Any, Any]]:
    first, second = flat(to_mapping(load_job(one))), flat(to_mapping(load_job(two)))
    return {key: (first.get(key), second.get(key)) for key in first | second if first.get(key) != second.get(key)}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_is(name: str) -> None:
    load_job(name)
    assert len(recipe_header(recipe_path(name))) > 20


def test_the_methods_are_there() -> None:
    assert set(METHODS) <= set(recipe_names())


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "gspo"])
def test_clipping_methods_take_several_minibatches(name: str) -> None:
    job = load_job(name)
    assert isinstance(job, RlJob)
    assert job.objective.updates * job.objective.minibatches > 1


@pytest.mark.parametrize("kind", ["hard", "discriminability", "head", "random", "inverted"])
def test_ablations_of_the_gate_change_its_kind_alone(kind: str) -> None:
    assert differences("adagrpo", f"adagrpo-{kind}") == {"objective.gate.kind": ("adagrpo", kind)}


def test_biased_recipes_change_the_log_and_the_ranker_alone() -> None:
    assert differences("demo-ranker", "demo-ranker-biased") == {"ranker.bias.keep": (1.0, 0.3)}
    assert set(differences("adagrpo", "adagrpo-biased")) == {"reward.ranker"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("abpo-no-anchor", {"objective.anchor.mode": ("append", "feedback_only")}),
        ("abpo-no-snips", {"objective.anchor.snips": ("advantage", "none")}),
        ("abpo-no-tempering", {"objective.tempering.mode": ("soften_confident", "none")}),
    ],
)
def test_ablations_of_abpo_change_one_key(name: str, changes: dict[str, tuple[str, str]]) -> None:
    assert differences("abpo", name) == changes


def test_alternatives_of_abpo_differ_in_the_objective_alone() -> None:
    changed = set(differences("abpo", "grpo-feedback"))
    assert {key.split(".")[0] for key in changed} == {"objective", "reward"}
    for key in ("feedback", "init", "data.dataset", "limits.max_steps", "learner.lr"):
        assert key not in differences("abpo", "sft-feedback")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("flexrec", {"lists.train_needs"}),
        ("flexrec-sequence", {"objective.credit.kind", "objective.credit.ndcg_weight", "objective.ratio"}),
        ("flexrec-suffix", {"objective.credit.form"}),
        ("flexrec-all_pairs", {"objective.credit.form"}),
        ("flexrec-independent", {"objective.credit.form"}),
        ("flexrec-mean", {"lists.feedback", "reward.ranker"}),
    ],
)
def test_ablations_of_flexrec_change_what_they_name(name: str, changed: set[str]) -> None:
    assert set(differences("flexrec_universal", name)) == changed


def test_uncertainty_is_what_the_last_recipe_of_lists_adds() -> None:
    changed = differences("flexrec-mean", "flexrec-uncertain")
    assert changed == {"objective.credit.uncertainty.variance": ("off", "propagated")}


def test_recipes_of_lists_name_the_same_lists() -> None:
    whole = to_mapping(load_job("flexrec_universal"))["lists"]
    for name in recipe_names():
        if name.startswith("flexrec"):
            lists = to_mapping(load_job(name))["lists"]
            assert lists | {"train_needs": [], "feedback": 1.0} == whole, name


@pytest.mark.parametrize("name", ["flexrec-mean", "flexrec-uncertain"])
def test_the_critic_knows_what_its_policies_rank(name: str) -> None:
    job, critic = load_job(name), load_job("flexrec-critic")
    assert isinstance(job, RlJob)
    assert isinstance(critic, CriticJob)
    assert critic.lists == job.lists
    assert (critic.data.history, critic.data.codes, critic.data.exclude_seen) == (
        job.data.history,
        job.data.codes,
        job.data.exclude_seen,
    )
    assert job.reward.ranker == "runs/flexrec-critic/ranker"


def test_mixtures_are_adagrpo_without_a_gate() -> None:
    for name in ("mixture-low", "mixture-even", "mixture-high"):
        changed = set(differences("adagrpo", name))
        assert changed == {"objective.gate.kind", "objective.nll_weight", "objective.policy_weight"}


def test_the_window_is_what_tawin_adds_to_grpo_on_beams() -> None:
    changed = set(differences("grpo", "tawin"))
    assert changed == {"rollout.decode", "objective.window.kind", "objective.window.anchor_rank"}


@pytest.mark.parametrize(
    ("recipe", "arguments", "where", "why"),
    [
        ("tawin", ["--objective.window.anchor_rank", "15"], "objective.window.anchor_rank", "at most 14: a group of"),
        (
            "tawin",
            ["--rollout.decode", "sample"],
            "objective.window.negatives",
            "sample or random, because rollout.decode",
        ),
        ("tawin", ["--objective.truncation.level", "sequence"], "objective.truncation.level", "beams are not drawn"),
        ("grpo", ["--rollout.decode", "sample_without_replacement"], "rollout.decode", "weights of their own"),
        ("grpo", ["--objective.reward_order", "gdpo"], "objective.reward_order", "only one reward"),
        ("grpo", ["--objective.stages", "[nowhere:f]"], "objective.stages", "nowhere"),
        ("grpo", ["--objective.anchor.mode", "append"], "feedback", "needs logged exposures"),
        ("grpo", ["--reward.feedback", "1"], "reward.feedback", "0 without objective.anchor"),
        ("abpo", ["--reward.item_match", "1"], "reward.feedback", "the only weight"),
        ("demo-ranker", ["--evaluation.scores.rows", "5"], "evaluation.scores.rows", "scores no paths"),
        ("demo-ranker", ["--evaluation.feedback", "d"], "evaluation.feedback", "measures no exposure bias"),
        ("abpo", ["--train_only", "d"], "feedback", "dumps hold no log"),
        (
            "unified",
            ["--objective.anchor.mode", "replace_last", "--objective.window.anchor_rank", "14"],
            "objective.window.anchor_rank",
            "at most 13",
        ),
        (
            "adagrpo",
            ["--reward.ranker", "null", "--reward.ranker_score", "0", "--reward.item_match", "1"],
            "reward.ranker",
            "compares its scores",
        ),
    ],
)
def test_objectives_their_job_cannot_feed_are_refused(recipe: str, arguments: list[str], where: str, why: str) -> None:
    with pytest.raises(RequestError) as error:
        load_job(recipe, arguments)
    assert error.value.where == where
    assert why in str(error.value)
