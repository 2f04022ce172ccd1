"""Contract: what killed an actor is said in one line, the error of its constructor before Ray's own words.

Not checked here: failures of real engines (test_fleet.py).
"""

from __future__ import annotations

from rollout.engine_calls import cause_of_death

CREATION = """The actor died because of an error raised in its creation task, ray::LearnerActor.__init__() (pid=1, ip=…)
  File "trainer/learner_group.py", line 24, in <module>
    from trainer.learner import Learner
ImportError: cannot import name 'Learner'
"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: LearnerActor
\tactor_id: 01
"""


def test_the_error_of_the_constructor_is_named() -> None:
    assert cause_of_death(RuntimeError(CREATION)) == "ImportError: cannot import name 'Learner'"


def test_otherwise_the_first_line_says_it() -> None:
    assert cause_of_death(RuntimeError(KILLED)) == "The actor died unexpectedly before finishing this task."
