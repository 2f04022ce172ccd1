"""Own stages for the contract test: one that keeps it, and one per clause that breaks it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trainer.members import Members
from trainer.signals import Signals


def steady(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Halves the hits of rollouts."""
    assert signals.hit_PG is not None
    return torch.where(signals.hit_PG & members.rollout_PG, 0.5, 1.0)


def curious(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Reads every signal there is."""
    values = [getattr(signals, field.name) for field in dataclasses.fields(signals)]
    assert all(value is not None and value != {} for value in values if not isinstance(value, Tensor))
    return torch.ones(members.valid_PG.shape)


def member_by_member(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """A loop in Python over the members of a group: right, but slow."""
    return torch.stack([torch.ones_like(advantage_G) for advantage_G in advantage_PG.unbind(1)], 1)


def negative(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """A wrong sign."""
    return -torch.ones(members.valid_PG.shape)


def endless(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """A division by zero."""
    return torch.ones(members.valid_PG.shape) / 0


def flat(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """One factor per prompt."""
    return torch.ones(len(members.valid_PG))


def first(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Favours a place in the group."""
    return 1.0 / (1 + torch.arange(members.valid_PG.shape[1])).expand(members.valid_PG.shape)


def greedy(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Looks at invalid members."""
    return advantage_PG.abs().mean(1, keepdim=True).expand_as(advantage_PG)


def spoiling(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Writes into its input."""
    return advantage_PG.abs_()


def dice(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Random."""
    return torch.rand(members.valid_PG.shape)


def attached(members: Members, signals: Signals, advantage_PG: Tensor) -> Tensor:
    """Carries a gradient."""
    return advantage_PG.abs()


def toneless(members: Members, signals: Signals, advantage_PG: Tensor) -> list[list[float]]:
    """No tensor."""
    return torch.ones(members.valid_PG.shape).tolist()


def lonely(members: Members) -> Tensor:
    """Takes too few arguments."""
    return torch.ones(members.valid_PG.shape)


BROKEN = {
    "negative": "negative factors",
    "endless": "not finite",
    "flat": "another shape",
    "first": "order of a group",
    "greedy": "reads invalid members",
    "spoiling": "changes its input",
    "dice": "second time",
    "attached": "carries a gradient",
}
