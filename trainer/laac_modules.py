"""What the DeepSpeed engines of LAAC and its baselines wrap: modules whose forward pass is a loss over a rank's rows.

Every module returns its loss summed over its rows and divided by the counts of the whole batch, so that the sum over
ranks is the loss of the batch, and the same for its terms, without gradient. Where a policy's expectation is needed,
it is that of `trainer.policy_expectation`: no matrix of the batch times the catalogue.

Suffixes: `_B` row, `_D` width, `_N` item, `_R` answer of the reference, `_S` logged action and answers, `_E` row of one
critic after those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from reward.item_attention import item_rows
from reward.laac import ItemNetwork, LaacShape
from trainer.laac_batches import Batch, Counts
from trainer.laac_losses import Backup, actor_loss, backup_error, bounded_target, critic_loss, gap, grounding
from trainer.laac_settings import LaacSettings, Method
from trainer.policy_expectation import FixedPolicy, best_items, entropy, expectation

Terms = dict[str, Tensor]
"""Detached values by name; summed over the ranks they are those of the batch."""


class PolicyView(NamedTuple):
    """The policy as the critics see it."""

    now: FixedPolicy
    """In the states."""
    next: FixedPolicy
    """In the next states."""


class Critics(nn.Module):
    """Twin critics on one encoder: the second reads the states of the first with item rows of its own."""

    def __init__(self, shape: LaacShape, settings: LaacSettings) -> None:
        super().__init__()
        self.settings = settings
        self.networks = nn.ModuleList([ItemNetwork(shape), ItemNetwork(shape, own_encoder=False)])

    @property
    def twins(self) -> list[ItemNetwork]:
        """Both networks."""
        return [cast(ItemNetwork, network) for network in self.networks]

    def state(self, history_BH: Tensor) -> Tensor:
        """States of both."""
        return self.twins[0].state(history_BH)

    def policy_values(self, state_BD: Tensor, policy: FixedPolicy) -> list[Tensor]:
        """`f_j(s,pi)` of each critic."""
        return [(state_BD * mean_BD).sum(1) for mean_BD in policy.means(*(network.item_ND for network in self.twins))]

    def mean_policy_value(self, state_BD: Tensor, policy: FixedPolicy) -> Tensor:
        """The mean of `f_j(s,pi)` over the critics: half the work of both."""
        first, second = self.twins
        (mean_BD,) = policy.means(first.item_ND + second.item_ND)
        return 0.5 * (state_BD * mean_BD).sum(1)

    def forward(
        self, batch: Batch, counts: Counts, policy: PolicyView, target_B: Tensor, *, warm: bool
    ) -> tuple[Tensor, Terms]:
        """The loss of both critics: L + alpha * E_g + beta * E_td, or E_td alone while warm.

        Args:
            target_B: bounded targets of the target networks.
        """
        settings = self.settings
        state_BD = self.state(batch.history_BH)
        critics = len(self.twins)
        own_target_E = None
        if settings.backup is Backup.RESIDUAL:
            next_E = torch.cat(self.policy_values(self.state(batch.next_BH), policy.next))
            reward_E, done_E = batch.reward_B.repeat(critics), batch.done_B.repeat(critics)
            own_target_E = bounded_target(reward_E, done_E, next_E, settings.discount)
        item_BS = torch.cat([batch.action_B[:, None], batch.answer_BR], 1)
        value_ES = torch.cat([network.values(state_BD, item_BS) for network in self.twins])
        data_E, answer_ER = value_ES[:, 0], value_ES[:, 1:]
        td = backup_error(data_E, target_B.repeat(critics), own_target_E).sum() / counts.rows
        total, parts = td, {"td": td, "data_value": data_E.sum() / counts.rows}
        if not warm:
            # The critics are told apart in all terms but this, which is linear in their values on the policy's actions.
            policy_value_E = self.mean_policy_value(state_BD, policy.now).repeat(critics)
            weight_ER = batch.weight_BR.repeat(critics, 1)
            reference_E = (weight_ER * answer_ER).sum(1)
            gap_E = torch.where(weight_ER.sum(1) > 0, gap(policy_value_E, reference_E), 0.0)
            ground_E = grounding(data_E, answer_ER, weight_ER, settings.grounding)
            present = max(counts.referenced, 1)
            parts |= {"gap": gap_E.sum() / present, "grounding": ground_E.sum() / present}
            total = critic_loss(
                parts["gap"],
                parts["grounding"],
                td,
                alpha=settings.alpha,
                beta=settings.beta,
                normalized_sum=settings.normalized_sum,
            )
        means = {name: value.detach() / critics for name, value in parts.items()}
        return total, means | {"critic_loss": total.detach()}


class Actor(nn.Module):
    """The policy."""

    def __init__(self, shape: LaacShape, settings: LaacSettings) -> None:
        super().__init__()
        self.settings = settings
        self.network = ItemNetwork(shape, own_encoder=not settings.shared_encoder)

    def forward(
        self,
        batch: Batch,
        counts: Counts,
        policy: FixedPolicy,
        query_BD: Tensor,
        critic_BD: Tensor | None,
        critic_ND: Tensor | None,
    ) -> tuple[Tensor, Terms]:
        """The loss of the policy: -f1(s,pi) less the weighted entropy, or cloning where no critic is given.

        Args:
            policy: in the states, of `query_BD` and the present items.
            query_BD: the policy's own states, with their gradient, or those of the critics that it is lent.
            critic_BD: states of the first critic.
            critic_ND: its items.
        """
        key_ND = self.network.item_ND
        if critic_BD is None or critic_ND is None:
            return self._cloning(batch, counts, query_BD)
        value_B = policy.value(query_BD, key_ND, critic_BD, critic_ND)
        entropy_B = None
        if self.settings.entropy:
            lse_B, (mean_BD,) = expectation(query_BD, key_ND, (key_ND,), chunk=self.settings.chunk)
            entropy_B = entropy(query_BD, lse_B, mean_BD)
        loss = actor_loss(value_B, entropy_B, self.settings.entropy).sum() / counts.rows
        terms = {"policy_value": value_B.detach().sum() / counts.rows, "actor_loss": loss.detach()}
        if entropy_B is not None:
            terms["entropy"] = entropy_B.detach().sum() / counts.rows
        return loss, terms

    def _cloning(self, batch: Batch, counts: Counts, query_BD: Tensor) -> tuple[Tensor, Terms]:
        nll = cloning(self.network, query_BD, batch.action_B, self.settings.chunk).sum() / counts.rows
        return nll, {"nll": nll.detach()}


class Supervised(nn.Module):
    """The baselines: a policy that clones the log, with Q heads on its encoder (none, one or three).

    Source: Xin et al., "Self-Supervised Reinforcement Learning for Recommender Systems" (SQN); Stamenkovic et al.,
    "Choosing the Best of Both Worlds: Diverse and Novel Recommendations through Multi-Objective Reinforcement
    Learning" (SMORL), with the rewards of methods.md section 7.
    """

    novel_N: Tensor
    unit_ND: Tensor

    def __init__(self, shape: LaacShape, settings: LaacSettings, novel_N: Tensor, unit_ND: Tensor) -> None:
        """
        Args:
            novel_N: 1 for tail items, 0 for the others.
            unit_ND: vectors of the items, of length 1 or 0.
        """
        super().__init__()
        self.settings = settings
        self.network = ItemNetwork(shape)
        self.weights = {
            Method.SQN: (1.0,),
            Method.SMORL: (1.0, settings.diversity, settings.novelty),
        }.get(settings.method, ())
        self.heads = nn.ModuleList(ItemNetwork(shape, own_encoder=False) for _ in self.weights)
        self.register_buffer("novel_N", novel_N)
        self.register_buffer("unit_ND", unit_ND)

    @property
    def rows_of_heads(self) -> list[Tensor]:
        """Items of each head."""
        return [cast(ItemNetwork, head).item_ND for head in self.heads]

    def rewards(self, batch: Batch) -> list[Tensor]:
        """Reward of each head: the rating, the distance to the newest item, whether the action is a tail item."""
        if len(self.weights) < 2:
            return [batch.reward_B]
        known_B = batch.last_B < len(self.unit_ND)
        last_BD = self.unit_ND[batch.last_B.clamp(max=len(self.unit_ND) - 1)]
        distance_B = 1 - (last_BD * self.unit_ND[batch.action_B]).sum(1)
        return [batch.reward_B, torch.where(known_B, distance_B, 1.0), self.novel_N[batch.action_B]]

    @torch.no_grad()
    def targets(self, batch: Batch, target: Supervised) -> list[Tensor]:
        """Double Q-learning: the weighted heads choose the next action, the target networks value it."""
        if not self.weights:
            return []
        combined_ND = sum(w * rows for w, rows in zip(self.weights, self.rows_of_heads, strict=True))
        state_BD = self.network.state(batch.next_BH)
        next_B = best_items(state_BD, cast(Tensor, combined_ND), chunk=self.settings.chunk)
        target_BD = target.network.state(batch.next_BH)
        found = []
        for reward_B, rows_ND in zip(self.rewards(batch), target.rows_of_heads, strict=True):
            value_B = (target_BD * rows_ND[next_B]).sum(1)
            found.append(reward_B + self.settings.discount * torch.where(batch.done_B, 0.0, value_B))
        return found

    def forward(self, batch: Batch, counts: Counts, targets: Sequence[Tensor]) -> tuple[Tensor, Terms]:
        """Cloning plus beta times the weighted squared errors of the heads."""
        state_BD = self.network.state(batch.history_BH)
        nll = cloning(self.network, state_BD, batch.action_B, self.settings.chunk).sum() / counts.rows
        loss, terms = nll, {"nll": nll.detach()}
        for weight, target_B, rows_ND in zip(self.weights, targets, self.rows_of_heads, strict=True):
            value_B = (state_BD * item_rows(rows_ND, batch.action_B)).sum(1)
            td = backup_error(value_B, target_B).sum() / counts.rows
            terms["td"] = terms.get("td", 0.0) + weight * td.detach()
            loss = loss + self.settings.beta * weight * td
        return loss, terms


def cloning(network: ItemNetwork, query_BD: Tensor, action_B: Tensor, chunk: int) -> Tensor:
    """[B] negative log-likelihood of the logged actions."""
    lse_B, _ = expectation(query_BD, network.item_ND, chunk=chunk)
    nll_B: Tensor = lse_B - network.values(query_BD, action_B[:, None])[:, 0]
    return nll_B
