"""Fault points: places where a test lets the process die as a crash would.

`WINDLASS_FAULT=point:n` sends SIGKILL to the process that passes `point` for the n-th time (counted per process, from
1). The variable is checked by `check_fault_variable` when a command starts, so that a typo is not a test that never
kills. Outside tests a fault point costs one dictionary lookup.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum

from data.errors import RequestError

FAULT_VARIABLE = "WINDLASS_FAULT"


class FaultPoint(StrEnum):
    """The places that can be named."""

    ROLLOUT = "rollout"
    """An engine, before it answers a shard."""
    REWARD = "reward"
    """The driver, before it asks for rewards. (A replica that dies is replaced and asked again; the run goes on.)"""
    BACKWARD = "backward"
    """A learner rank, after a backward pass."""
    OPTIMISER_STEP = "optimiser_step"
    """A learner rank, after the backward passes and before the optimiser step."""
    PUSH = "push"
    """The learner that sends, before each bucket."""
    CHECKPOINT_WRITE = "checkpoint_write"
    """The driver: passed before the manifest is written, and again before the checkpoint gets its name."""
    STEP = "step"
    """The driver, at the end of a training step, before the checkpoint of that step."""
    MEASURE = "measure"
    """The service (`windlass continual`), between the two models that it measures."""
    DECIDED = "decided"
    """The service, once a decision is in its journal, before the registry follows it."""


_passed: dict[str, int] = {}


def parse_fault(value: str) -> tuple[FaultPoint, int]:
    """The point and the passing of `point:n`.

    Raises:
        RequestError: unknown point, or n is not a positive integer.
    """
    name, _, count = value.partition(":")
    legal = f"POINT:N with N from 1 and POINT one of {', '.join(FaultPoint)}"
    if name not in set(FaultPoint) or not count.isdecimal() or int(count) < 1:
        raise RequestError(FAULT_VARIABLE, value, legal)
    return FaultPoint(name), int(count)


def check_fault_variable() -> None:
    """Refuse a malformed `WINDLASS_FAULT` when a command starts."""
    value = os.environ.get(FAULT_VARIABLE)
    if value:
        parse_fault(value)


def fault_point(name: str) -> None:
    """Die here by SIGKILL when `WINDLASS_FAULT` names this passing.

    Raises:
        ValueError: `name` is no member of `FaultPoint`.
    """
    point = FaultPoint(name)
    value = os.environ.get(FAULT_VARIABLE)
    if not value:
        return
    wanted, passing = parse_fault(value)
    _passed[point] = _passed.get(point, 0) + 1
    if point is wanted and _passed[point] == passing:
        os.kill(os.getpid(), signal.SIGKILL)
