"""Contract: over random settings, the loss and gradient of all stages together equal a plain reference in float64 that
loops over prompts, members and tokens and shares no code with the stages.

Source of the reference: methods.md sections 0, 1, 2, 4 and 6, read anew. Not checked here: random negatives, ground
truths in the group, the GDPO order, own stages (their own files); how the learner gets log-probabilities.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.records import Kind
from trainer.gate import RankerScores
from trainer.losses import TokenInputs, token_loss
from trainer.members import KIND_CODE, PADDING, Members
from trainer.objective import objective_coefficients
from trainer.objective_settings import ObjectiveSettings
from trainer.signals import Signals

PROMPTS, ROLLOUTS, TOKENS, NEGATIVES = 4, 6, 3, 4
SLOTS = ROLLOUTS + 2
TRUTH, ANCHOR = ROLLOUTS, ROLLOUTS + 1
EPS, BETA, CLIP_LOW, CLIP_HIGH, PENALTY, FORMAT, FEEDBACK = 1e-4, 0.03, 0.2, 0.28, 0.7, 0.1, 1.5


def drawn_settings(rng: np.random.Generator) -> ObjectiveSettings:
    """Switches of every stage at random, of the combinations that are not refused."""

    def one_of(*names: str) -> str:
        return str(rng.choice(names))

    anchored, gated = rng.random() < 0.6, rng.random() < 0.5
    tempering = one_of("none", "soften_confident", "trust_confident", "additive") if anchored else "none"
    target = "reward" if tempering == "additive" else one_of("row", "matched", "reward")
    snips = one_of("none", "advantage", "reward") if anchored else "none"
    in_reward = snips == "reward" or (tempering != "none" and target == "reward")
    kinds = ("adagrpo", "hard", "head", "discriminability", "inverted")
    return ObjectiveSettings.model_validate(
        {
            "std_mode": "none" if in_reward else one_of("population", "sample", "none"),
            "eps": EPS,
            "aggregation": one_of("sequence_mean", "token_mean", "fixed_length"),
            "ratio": one_of("token", "item", "sequence"),
            "clip_low": CLIP_LOW,
            "clip_high": CLIP_HIGH,
            "beta": BETA,
            "nll_weight": 0.7 if gated else float(rng.choice([0.0, 0.7])),
            "policy_weight": 0.8,
            "entropy_weight": float(rng.choice([0.0, 0.01])),
            "window": {"kind": one_of("none", "soft"), "anchor_rank": 1, "mass": 1.0},
            "gate": {
                "kind": one_of(*kinds) if gated else "none",
                "norm": one_of("batch", "open"),
                "without_truth": one_of("open", "closed"),
            },
            "anchor": {
                "mode": one_of("append", "replace_last", "feedback_only") if anchored else "none",
                "snips": snips,
                "ratio": one_of("detached", "old"),
                "penalty": PENALTY,
                "format_weight": FORMAT,
            },
            "tempering": {"mode": tempering, "target": target},
            "truncation": {"level": one_of("none", "token", "sequence")},
        }
    )


class World:
    """Random groups: rollouts, a ground truth and an anchor, of which some are not there."""

    def __init__(self, rng: np.random.Generator, settings: ObjectiveSettings) -> None:
        def noise(*shape: int) -> Tensor:
            return torch.tensor(rng.normal(size=shape))

        self.settings = settings
        kind = [Kind.ROLLOUT] * ROLLOUTS + [Kind.GROUND_TRUTH, Kind.ANCHOR]
        self.responded = rng.random(PROMPTS) < 0.7
        self.valid = rng.random((PROMPTS, SLOTS)) > 0.12
        self.valid[:, TRUTH] = self.responded & (settings.nll_weight > 0)
        self.valid[:, ANCHOR] &= settings.anchor.mode != "none"
        self.length = rng.integers(1, TOKENS + 1, (PROMPTS, SLOTS))
        target = rng.integers(0, 5, PROMPTS)
        item = rng.integers(0, 5, (PROMPTS, SLOTS))
        item[:, TRUTH:] = target[:, None]
        self.matched = item == target[:, None]
        self.hit = self.matched & self.responded[:, None]
        self.reward = self.hit * (settings.anchor.mode == "none")
        self.logp = -2 * torch.tensor(rng.random((PROMPTS, SLOTS, TOKENS)))
        self.old, self.engine, self.ref = (self.logp + 0.3 * noise(PROMPTS, SLOTS, TOKENS) for _ in range(3))
        self.full = -3 * torch.tensor(rng.random((PROMPTS, SLOTS, TOKENS)))
        self.entropy = torch.tensor(rng.random((PROMPTS, SLOTS, TOKENS)))
        self.certainty = rng.random((PROMPTS, SLOTS, TOKENS))
        self.choices = rng.integers(1, 5, (PROMPTS, SLOTS, TOKENS))
        self.logp0 = -4 * rng.random(PROMPTS)
        self.truth_logp = -3 * rng.random(PROMPTS)
        there = torch.ones(PROMPTS, NEGATIVES, dtype=torch.bool)
        self.ranker = RankerScores(noise(PROMPTS, SLOTS), noise(PROMPTS) + 0.5, noise(PROMPTS, NEGATIVES) - 1, there)
        segment = np.where(np.arange(TOKENS) < self.length[..., None], 0, PADDING)
        self.members = Members(
            valid_PG=torch.tensor(self.valid),
            kind_PG=torch.tensor([[KIND_CODE[k] for k in kind]] * PROMPTS),
            segment_PGT=torch.tensor(segment),
        )

    def signals(self) -> Signals:
        return Signals(
            hit_PG=torch.tensor(self.hit),
            logp_PGT=self.old,
            engine_logp_PGT=self.engine,
            certainty_PGT=torch.tensor(self.certainty),
            choices_PGT=torch.tensor(self.choices),
            feedback_weight=FEEDBACK,
            ranker=self.ranker,
            truth_logp_P=torch.tensor(self.truth_logp),
            matched_PG=torch.tensor(self.matched) if self.settings.anchor.mode != "none" else None,
            formatted_PG=torch.ones(PROMPTS, SLOTS, dtype=torch.bool),
            responded_P=torch.tensor(self.responded),
            anchor_logp0_P=torch.tensor(self.logp0),
        )

    def has_anchor(self, p: int) -> bool:
        return bool(self.valid[p, ANCHOR])

    def rollouts(self, p: int) -> list[int]:
        return [g for g in range(ROLLOUTS) if self.valid[p, g]]

    def carriers(self, p: int) -> list[int]:
        joins = self.settings.anchor.mode in ("append", "replace_last") and self.has_anchor(p)
        return self.rollouts(p) + [ANCHOR] * joins

    def old_logp(self, p: int, g: int) -> float:
        return float(self.old[p, g, : self.length[p, g]].sum())


def staged_loss(world: World, leaves: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss by the stages and the learner's loss function; the leaves are logp, full logp and entropy."""
    reward_PG = torch.tensor(world.reward, dtype=torch.float64)
    found, _ = objective_coefficients(world.members, reward_PG, world.settings, TOKENS, signals=world.signals())

    def flat(value: Tensor) -> Tensor:
        return value.reshape(-1) if value.dtype == torch.bool else value.reshape(-1).double()

    inputs = TokenInputs(
        advantage_K=flat(found.advantage_PGT),
        old_logp_K=flat(world.old),
        ref_logp_K=flat(world.ref),
        policy_weight_K=flat(found.policy_weight_PGT),
        kl_weight_K=flat(found.kl_weight_PGT),
        nll_weight_K=flat(found.nll_weight_PGT),
        unit_K=torch.arange(PROMPTS * SLOTS).repeat_interleave(TOKENS),
        ratio=world.settings.ratio,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        entropy_weight_K=None if found.entropy_weight_PGT is None else flat(found.entropy_weight_PGT),
        detached_K=None if found.detached_PGT is None else flat(found.detached_PGT),
    )
    logp, full, entropy = (leaf.reshape(-1) for leaf in leaves)
    return token_loss(logp, full, inputs, entropy)[0]


def anchor_weight_of(world: World) -> dict[int, float]:
    """min(pi / pi0, 10) over its mean, 1 without an anchor."""
    raw = {
        p: min(math.exp(world.old_logp(p, ANCHOR) - world.logp0[p]), 10.0)
        for p in range(PROMPTS)
        if world.has_anchor(p)
    }
    return {p: raw[p] / float(np.mean(list(raw.values()))) if p in raw else 1.0 for p in range(PROMPTS)}


def confidence_of(world: World) -> dict[int, float]:
    """1 - exp(-certainty / scale) in rows whose anchor had no response; the median confidence is one half."""
    certainty = {}
    for p in range(PROMPTS):
        if world.has_anchor(p) and not world.responded[p]:
            chosen = [t for t in range(world.length[p, ANCHOR]) if world.choices[p, ANCHOR, t] > 1]
            certainty[p] = np.mean([world.certainty[p, ANCHOR, t] for t in chosen]) if chosen else 0.0
    scale = np.median(list(certainty.values())) / math.log(2) if certainty else 1.0
    return {p: 1 - math.exp(-value / scale) if scale else 0.0 for p, value in certainty.items()}


def softened(world: World, confidence: dict[int, float], p: int) -> float:
    """q of a row."""
    mode = world.settings.tempering.mode
    if p not in confidence or mode not in ("soften_confident", "trust_confident"):
        return 1.0
    return 1 - confidence[p] if mode == "soften_confident" else confidence[p]


def reward_of(world: World, weight: dict[int, float], confidence: dict[int, float], p: int, g: int) -> float:
    """Reward of a member, with that of the feedback."""
    settings, total = world.settings, float(world.reward[p, g])
    if not world.has_anchor(p):
        return total
    item = 0.0
    if world.matched[p, g]:
        item = 1.0 if world.responded[p] else -PENALTY
        if settings.tempering.mode == "additive":
            item += confidence.get(p, 0.0)
        elif settings.tempering.target == "reward":
            item *= softened(world, confidence, p)
    total += FEEDBACK * (item + FORMAT)
    return total * weight[p] if g == ANCHOR and settings.anchor.snips == "reward" else total


def advantages_of(world: World, weight: dict[int, float], confidence: dict[int, float], p: int) -> dict[int, float]:
    """Normalised rewards times all multipliers, by member."""
    settings, carriers = world.settings, world.carriers(p)
    reward = np.array([reward_of(world, weight, confidence, p, g) for g in carriers])
    if len(reward) == 0 or reward.max() == reward.min():
        return dict.fromkeys(carriers, 0.0)
    scale = {"none": 1.0, "population": reward.std() + EPS, "sample": reward.std(ddof=1) + EPS}[settings.std_mode]
    advantage = dict(zip(carriers, (reward - reward.mean()) / scale, strict=True))
    for g, factor in window_of(world, p).items():
        advantage[g] *= factor
    for g in carriers:
        target = settings.tempering.target
        if target == "row" or (target == "matched" and world.matched[p, g]):
            advantage[g] *= softened(world, confidence, p)
        if g == ANCHOR and settings.anchor.snips == "advantage":
            advantage[g] *= weight[p]
    return advantage


def window_of(world: World, p: int) -> dict[int, float]:
    """Weights of the negatives: with mass 1 the soft top-k is a softmax of -|rank - 1|."""
    anchored = world.settings.anchor.mode != "none"
    negatives = [g for g in world.rollouts(p) if not (world.hit[p, g] or (anchored and world.matched[p, g]))]
    if world.settings.window.kind == "none" or not negatives:
        return {}
    ranked = sorted(negatives, key=lambda g: -world.old_logp(p, g))
    distance = np.abs(np.arange(len(ranked)) - min(1, len(ranked) - 1))
    share = np.exp(-distance) / np.exp(-distance).sum()
    return dict(zip(ranked, len(ranked) * share, strict=True))


def gate_of(world: World) -> np.ndarray:
    """Factor of each prompt."""
    gate = world.settings.gate
    if gate.kind == "none":
        return np.ones(PROMPTS)
    is_open = np.zeros(PROMPTS)
    for p in range(PROMPTS):
        rollouts = world.rollouts(p)
        rivals = [g for g in rollouts if not world.hit[p, g]]
        truth = float(world.ranker.truth_P[p])
        others = [float(world.ranker.rollout_PG[p, g]) for g in rivals] + [truth]
        cross = world.ranker.cross_PM[p].tolist()
        policy_rank = 1 + sum(world.old_logp(p, g) > world.truth_logp[p] for g in rivals)
        ranker_rank = 1 + sum(score >= truth for score in others[:-1])
        hard, head = policy_rank > gate.tau * len(rollouts), ranker_rank <= gate.tau * len(rollouts)
        everybody = others + cross
        tail = all(1 + sum(one > score for one in everybody) > (1 - gate.rho) * len(everybody) for score in cross)
        both = hard and head and tail
        decided = {"adagrpo": both, "hard": hard, "head": head, "discriminability": head and tail, "inverted": not both}
        known = bool(world.valid[p, TRUTH])
        is_open[p] = (decided[gate.kind] and len(rollouts) > 0) if known else gate.without_truth == "open"
    return is_open * PROMPTS / max(is_open.sum(), 1) if gate.norm == "open" else is_open


def surrogate(world: World, logp: Tensor, advantage: float, p: int, g: int) -> list[Tensor]:
    """The truncated, clipped surrogate of each token of a member."""
    settings, length = world.settings, int(world.length[p, g])
    detached = g == ANCHOR and settings.anchor.ratio == "detached"
    log_ratio = (logp[p, g] - (logp[p, g].detach() if detached else world.old[p, g]))[:length]
    if settings.ratio != "token":
        log_ratio = log_ratio.mean().expand(length)
    engine = (world.old - world.engine)[p, g, :length]
    drift = {"none": 0 * engine, "token": engine, "sequence": engine.sum().expand(length)}[settings.truncation.level]
    terms = []
    for t in range(length):
        ratio = log_ratio[t].exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        factor = 1.0 if g == ANCHOR else min(math.exp(float(drift[t])), 2.0)
        terms.append(factor * torch.minimum(ratio * advantage, clipped * advantage))
    return terms


def reference_loss(world: World, leaves: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss as methods.md section 6 writes it."""
    settings, (logp, full, entropy) = world.settings, leaves
    weight, confidence = anchor_weight_of(world), confidence_of(world)
    gate = gate_of(world)
    tokens = sum(int(world.length[p, g]) for p in range(PROMPTS) for g in world.carriers(p))
    loss = 0.0 * logp.sum()
    for p in range(PROMPTS):
        if world.valid[p, TRUTH]:
            loss = loss - settings.nll_weight / PROMPTS * full[p, TRUTH, : world.length[p, TRUTH]].mean()
        advantage = advantages_of(world, weight, confidence, p)
        for g in world.carriers(p):
            length, group = int(world.length[p, g]), len(world.carriers(p))
            share = {
                "sequence_mean": 1 / (PROMPTS * group * length),
                "token_mean": 1 / tokens,
                "fixed_length": 1 / (PROMPTS * group * TOKENS),
            }[settings.aggregation]
            for t, term in enumerate(surrogate(world, logp, advantage[g], p, g)):
                gap = world.ref[p, g, t] - logp[p, g, t]
                penalty = BETA * (gap.exp() - gap - 1) - settings.entropy_weight * entropy[p, g, t]
                loss = loss + gate[p] * share * (penalty - settings.policy_weight * term)
    return loss


@pytest.mark.parametrize("seed", range(6))
def test_all_stages_together_are_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        settings = drawn_settings(rng)
        world = World(rng, settings)
        results = []
        for compute in (staged_loss, reference_loss):
            leaves = tuple(value.clone().requires_grad_(True) for value in (world.logp, world.full, world.entropy))
            assert len(leaves) == 3
            loss = compute(world, leaves)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            results.append((loss.detach(), *gradients))
        for staged, reference in zip(*results, strict=True):
            # The weights of aggregation are float32.
            torch.testing.assert_close(staged, reference, rtol=1e-5, atol=1e-7)
