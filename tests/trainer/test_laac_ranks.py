"""Contract of LAAC's learner across processes and sizes: two ranks (Ray actors, DeepSpeed over gloo) take the steps of
one, within rounding, and continue from its checkpoint; a step over a million items fits where one matrix of the batch
times the catalogue would not.

Not checked: that anything is learned (test_laac_job.py), CUDA.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reward.laac import LaacShape
from tests.requirements import require
from trainer.laac_batches import TransitionTable
from trainer.laac_group import LaacGroup
from trainer.laac_settings import LaacSettings

pytestmark = pytest.mark.long
ITEMS, ROWS, HISTORY = 30, 60, 4


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A small cluster of this machine."""
    for part in ("ray", "deepspeed"):
        require(part)
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def arguments(settings: LaacSettings) -> dict[str, Any]:
    """Of a learner over random transitions, a fifth of them without a reference."""
    random = np.random.default_rng(0)
    weight_NR = np.full((ROWS, 2), 0.5, np.float32)
    weight_NR[:: ROWS // 12] = 0
    table = TransitionTable(
        history_NH=random.integers(0, ITEMS + 1, (ROWS, HISTORY)).astype(np.int32),
        action_N=random.integers(0, ITEMS, ROWS).astype(np.int32),
        reward_N=random.random(ROWS).astype(np.float32),
        done_N=random.random(ROWS) < 0.2,
        answer_NR=random.integers(0, ITEMS, (ROWS, 2)).astype(np.int32),
        weight_NR=weight_NR,
    )
    return {
        "settings": settings,
        "shape": LaacShape(n_items=ITEMS, width=8, history=HISTORY),
        "table": table,
        "seed": 3,
        "novel_I": np.zeros(ITEMS, np.bool_),
        "unit_ID": np.zeros((ITEMS, 2), np.float32),
    }


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("method", ["laac", "smorl"])
def test_two_ranks_take_the_steps_of_one(method: str, tmp_path: Path) -> None:
    player = "actor" if method == "laac" else "supervised"
    found = {}
    for ranks in (1, 2):
        settings = LaacSettings(method=method, ranks=ranks, batch=24, width=8, threads=1, discount=0.5)
        with closing(LaacGroup.open(settings, arguments(settings))) as group:
            terms = [group.run(4)]
            group.save(tmp_path / str(ranks))
            terms.append(group.run(4))
            found[ranks] = terms, group.weights(player)
    assert found[1][0][0].keys() == found[2][0][0].keys()
    for one, two in zip(found[1][0], found[2][0], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for name, value in found[1][1].items():
        np.testing.assert_allclose(found[2][1][name], value, rtol=1e-2, atol=1e-4, err_msg=name)
    # A state of one rank goes on with two.
    settings = LaacSettings(method=method, ranks=2, batch=24, width=8, threads=1, discount=0.5)
    with closing(LaacGroup.open(settings, arguments(settings))) as group:
        group.load(tmp_path / "1")
        assert group.step == 4
        again = group.run(4)
    for name, value in found[1][0][1].items():
        assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


MILLION = """
import resource
import numpy as np
from reward.laac import LaacShape
from trainer.laac_batches import TransitionTable
from trainer.laac_learner import LaacLearner
from trainer.laac_settings import LaacSettings

items, rows = 1_000_000, 256
random = np.random.default_rng(0)
table = TransitionTable(
    history_NH=random.integers(0, items, (rows, 4)).astype(np.int32),
    action_N=random.integers(0, items, rows).astype(np.int32),
    reward_N=random.random(rows).astype(np.float32),
    done_N=np.zeros(rows, bool),
    answer_NR=random.integers(0, items, (rows, 2)).astype(np.int32),
    weight_NR=np.full((rows, 2), 0.5, np.float32),
)
settings = LaacSettings(batch=rows, width=8, threads=1)
learner = LaacLearner(
    settings,
    LaacShape(n_items=items, width=8, history=4),
    table,
    seed=0,
    novel_I=np.zeros(items, bool),
    unit_ID=np.zeros((items, 2), np.float32),
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
terms = learner.run(2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, terms["td"], terms["policy_value"])
"""


def test_a_million_items_fit() -> None:
    """A matrix of 256 rows and a million items has 977 MiB; all gradients of the three tables have 92 MiB."""
    require("deepspeed")
    found = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    mib, *terms = found.stdout.splitlines()[-1].split()
    assert int(mib) < 700
    assert np.isfinite([float(term) for term in terms]).all()
