"""How cores are dealt to engines and learners. Not checked: that the processes obey (their own tests)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.small_world import recipe
from trainer.jobs import RlJob
from trainer.thread_plan import plan_threads, thread_plan

COUNTS = st.integers(1, 16)


def test_in_turn_each_kind_has_all_cores() -> None:
    plan = thread_plan(cores=8, engines=2, ranks=4, at_once=False)
    assert (plan.engine, plan.learner) == (4, 2)


def test_at_once_they_share() -> None:
    plan = thread_plan(cores=8, engines=2, ranks=1, at_once=True)
    assert (plan.engine, plan.learner) == (2, 4)


def test_what_was_asked_for_stays_and_the_others_take_the_rest() -> None:
    plan = thread_plan(cores=8, engines=1, ranks=1, at_once=True, learner_threads=6)
    assert (plan.engine, plan.learner) == (2, 6)
    plan = thread_plan(cores=8, engines=2, ranks=1, at_once=True, engine_threads=1)
    assert (plan.engine, plan.learner) == (1, 6)


@given(cores=COUNTS, engines=COUNTS, ranks=COUNTS)
def test_nobody_is_without_a_thread_and_cores_are_not_dealt_twice(cores: int, engines: int, ranks: int) -> None:
    plan = thread_plan(cores=cores, engines=engines, ranks=ranks, at_once=True)
    assert plan.engine >= 1
    assert plan.learner >= 1
    if cores >= 2 * max(engines, ranks):
        assert plan.engine * engines + plan.learner * ranks <= cores


def test_a_job_gets_its_numbers() -> None:
    content = recipe("no-dataset", "rl")
    content["rollout"]["threads"] = 3
    job, plan = plan_threads(RlJob.model_validate(content))
    assert (job.rollout.threads, plan.engine) == (3, 3)
    assert job.learner.threads == plan.learner >= 1
