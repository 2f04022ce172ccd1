"""Stages of the user's own, by import path, and the contract they are held to.

An own stage is a function `(members, signals, advantage_PG) -> factor_PG` that joins the multipliers. `check_stage`
is its contract test; run it on yours:

    from trainer.own_stages import check_stage
    def test_mine(): check_stage("my_package.stages:my_stage")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from data.errors import RequestError, RunError
from data.import_path import load_by_path
from data.records import Kind
from reward.swap_credit import SwapForm
from trainer.gate import RankerScores
from trainer.list_signals import closed_form_lists
from trainer.members import KIND_CODE, PADDING, Members
from trainer.signals import Signals

OwnStage = Callable[[Members, Signals, Tensor], Tensor]
"""Factors `[P, G]` of the advantages: finite, at least 0, read for valid members only."""


def load_stage(path: str) -> OwnStage:
    """The function at `package.module:function`.

    Raises:
        RequestError: no such module or function, or one that does not take three arguments.
    """
    where, legal = "objective.stages", "package.module:function of a function (members, signals, advantage_PG)"
    stage: OwnStage = load_by_path(path, where, legal)
    if not callable(stage):
        raise RequestError(where, f"{path} is no function", legal)
    try:
        inspect.signature(stage).bind(None, None, None)
    except TypeError as error:
        raise RequestError(where, f"{path} ({error})", legal) from error
    return stage


def own_multipliers(path: str, members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """The stage's factors, 1 for invalid members, without gradient.

    Raises:
        RunError: no tensor, another shape, or factors of valid members that are negative or not finite.
    """
    with torch.no_grad():
        factor_PG = load_stage(path)(members, signals, advantage_PG.clone())
        if not isinstance(factor_PG, Tensor):
            raise RunError(f"stage {path} returned {type(factor_PG).__name__}, not a tensor")
        if factor_PG.shape != advantage_PG.shape:
            raise RunError(f"stage {path} returned the shape {tuple(factor_PG.shape)}, not {tuple(advantage_PG.shape)}")
        factor_PG = torch.where(members.valid_PG, factor_PG.to(advantage_PG.dtype), 1.0)
        if not bool((torch.isfinite(factor_PG) & (factor_PG >= 0)).all()):
            raise RunError(f"stage {path} returned a factor that is negative or not finite")
        return factor_PG


def check_stage(path: str, *, prompts: int = 4, group: int = 6, tokens: int = 3, seed: int = 0) -> None:
    """The contract of an own stage, on random groups.

    Raises:
        AssertionError: says which clause is broken.
    """
    torch.manual_seed(seed)
    stage = load_stage(path)
    members, signals, advantage_PG = _example(prompts, group, tokens)
    kept = advantage_PG.clone()
    factor_PG = stage(members, signals, advantage_PG)
    assert torch.equal(advantage_PG, kept), f"{path} changes its input"
    assert factor_PG.shape == advantage_PG.shape, f"{path} returns another shape than [P, G]"
    valid_PG = members.valid_PG
    own = factor_PG[valid_PG]
    assert bool(torch.isfinite(own).all()), f"{path} returns factors that are not finite"
    assert bool((own >= 0).all()), f"{path} returns negative factors"
    again = stage(members, signals, advantage_PG)[valid_PG]
    assert torch.equal(own, again), f"{path} returns something else the second time"
    order = torch.cat([torch.randperm(group), torch.tensor([group])])
    permuted = stage(_taken(members, order), signals.take_members(order), advantage_PG[:, order])
    same = torch.allclose(permuted[valid_PG[:, order]], factor_PG[:, order][valid_PG[:, order]], rtol=1e-5, atol=1e-6)
    assert same, f"{path} depends on the order of a group"
    noise_PG = torch.where(valid_PG, advantage_PG, torch.full_like(advantage_PG, 77.0))
    assert torch.equal(stage(members, signals, noise_PG)[valid_PG], own), f"{path} reads invalid members"
    grown = stage(members, signals, advantage_PG.clone().requires_grad_(True))
    assert not grown.requires_grad, f"{path} carries a gradient; detach its result"


def _example(prompts: int, group: int, tokens: int) -> tuple[Members, Signals, Tensor]:
    """Random groups with an invalid rollout and a ground truth as last member, and every signal."""
    valid_PG = torch.ones(prompts, group + 1, dtype=torch.bool)
    valid_PG[0, group - 1] = False
    kind_PG = torch.zeros(prompts, group + 1, dtype=torch.int64)
    kind_PG[:, -1] = KIND_CODE[Kind.GROUND_TRUTH]
    length_PG = torch.randint(1, tokens + 1, (prompts, group + 1))
    segment_PGT = torch.where(torch.arange(tokens) < length_PG.unsqueeze(-1), 0, PADDING)
    members = Members(valid_PG=valid_PG, kind_PG=kind_PG, segment_PGT=segment_PGT)
    hit_PG = torch.zeros_like(valid_PG)
    hit_PG[:, [1, -1]] = True
    logp_PGT = -torch.rand(prompts, group + 1, tokens) - 0.1
    advantage_PG = torch.randn(prompts, group + 1).masked_fill(~valid_PG, 0.0)
    signals = Signals(
        hit_PG=hit_PG,
        logp_PGT=logp_PGT,
        engine_logp_PGT=logp_PGT + 0.01 * torch.randn_like(logp_PGT),
        certainty_PGT=torch.rand_like(logp_PGT),
        choices_PGT=torch.randint(1, 9, logp_PGT.shape).float(),
        part_PG={"item_match": hit_PG.float()},
        part_weight={"item_match": 1.0},
        ranker=RankerScores(
            rollout_PG=torch.randn(prompts, group + 1),
            truth_P=torch.randn(prompts),
            cross_PM=torch.randn(prompts, 2),
            cross_valid_PM=torch.ones(prompts, 2, dtype=torch.bool),
        ),
        truth_logp_P=logp_PGT[:, -1].sum(-1),
        matched_PG=hit_PG,
        formatted_PG=torch.ones_like(hit_PG),
        responded_P=torch.arange(prompts) % 2 == 0,
        anchor_logp0_P=-torch.rand(prompts) - 0.1,
        lists=closed_form_lists(
            torch.rand(prompts, group + 1, 2),
            valid_PG,
            torch.full((prompts,), 2),
            SwapForm.CAUSAL,
            variance_PGK=torch.rand(prompts, group + 1, 2),
        ),
        gain_variance_PG=torch.rand(prompts, group + 1),
    )
    return members, signals, advantage_PG


def _taken(members: Members, order: Tensor) -> Members:
    return Members(
        valid_PG=members.valid_PG[:, order],
        kind_PG=members.kind_PG[:, order],
        segment_PGT=members.segment_PGT[:, order],
    )
