"""Contract: a plan places every actor on a node that has its CPUs, GPUs and mark, and never more than a node has; what
does not fit is refused with the missing amount; colocated pairs and head counts are checked before anything starts.

Pure. Reserving room with Ray is checked in tests/rollout/test_fleet.py, whole jobs in tests/launch/test_bad_input.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RequestError
from tests.small_world import recipe
from trainer import policy_run
from trainer.jobs import RlJob
from trainer.preflight import Ask, Node, asks, check_heads, check_mover, deal, missing

GPU_NODE = Node(address="gpu", cpus=16, gpus=4, marks=frozenset({"fast"}))
CPU_NODE = Node(address="cpu", cpus=8, gpus=0)


def job(**sections: Any) -> RlJob:
    return RlJob.model_validate(recipe(Path("nowhere"), "rl", **sections))


def test_what_a_job_asks_for() -> None:
    wanted = asks(job(rollout={"engines": 3, "gpus": 2.0}, learner={"ranks": 4}), with_fleet=True, on_gpus=True)
    assert wanted == [
        Ask(part="learner.ranks", count=4, cpus=1, gpus=1),
        Ask(part="rollout.engines", count=3, cpus=1, gpus=2),
    ]
    assert [ask.part for ask in asks(job(), with_fleet=False, on_gpus=False)] == ["learner.ranks"]
    halves = {"learner": {"ranks": 2, "gpus": 0.5}, "cluster": {"colocated": True}}
    pairs = job(rollout={"engines": 2, "gpus": 0.25}, **halves)
    assert asks(pairs, with_fleet=True, on_gpus=True) == [Ask(part="rollout.engines", count=2, cpus=2, gpus=0.75)]


def test_pairs_are_reserved_for_engines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A colocated job that trains from a dump starts no engine: its ranks need the GPUs that the pairs would have."""
    reserved: list[tuple[int, float]] = []

    def pairs(count: int, *, gpus: float, **_: Any) -> str:
        reserved.append((count, gpus))
        return "pairs"

    monkeypatch.setattr(policy_run, "pairs", pairs)
    halves = {"learner": {"ranks": 2, "gpus": 0.5}, "cluster": {"colocated": True}}
    both = job(rollout={"engines": 2, "gpus": 0.25}, **halves)

    def placed(*, with_fleet: bool) -> list[Any]:
        plan = deal(asks(both, with_fleet=with_fleet, on_gpus=True), [GPU_NODE])
        assert plan.fits
        return [place.shared for place in policy_run.placements(both, plan)]

    assert placed(with_fleet=True) == ["pairs", "pairs"]
    assert placed(with_fleet=False) == [None, None]
    assert reserved == [(2, 0.75)]
    with pytest.raises(RequestError, match=r"cluster\.learner_node: far; legal: none, or cluster\.engine_node"):
        job(rollout={"engines": 2}, learner={"ranks": 2}, cluster={"colocated": True, "learner_node": "far"})


def test_parts_without_gpus_leave_the_gpu_nodes_alone() -> None:
    wanted = [Ask(part="rewards", count=2, cpus=4, gpus=0), Ask(part="engines", count=2, cpus=1, gpus=2)]
    plan = deal(wanted, [GPU_NODE, CPU_NODE])
    assert plan.fits
    assert plan.placed == {"rewards": ["cpu", "cpu"], "engines": ["gpu", "gpu"]}
    assert plan.table().splitlines()[1:] == [
        "  rewards: 2 x (4 CPUs, 0 GPUs) on cpu",
        "  engines: 2 x (1 CPUs, 2 GPUs) on gpu",
    ]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Ask(part="engines", count=3, cpus=1, gpus=2), "cluster: 4 GPUs; legal: at least 6 (engines 3 x 2), 2 more"),
        (Ask(part="ranks", count=25, cpus=1, gpus=0), "cluster.num_cpus: 24 logical CPUs; legal: at least 25"),
        # Enough in all, but a node for each is wanted.
        (Ask(part="replicas", count=2, cpus=9, gpus=0), "replicas: room for 1 of 2; legal: a node with 9 CPUs"),
        (Ask(part="e", count=1, cpus=1, gpus=0, node="far"), "e: room for 0 of 1; legal: a node with the Ray resource"),
    ],
)
def test_what_is_missing_is_named(wanted: Ask, told: str) -> None:
    plan = deal([wanted], [GPU_NODE, CPU_NODE])
    assert not plan.fits
    assert told in str(missing(plan))


AMOUNT = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0])
NODES = st.lists(
    st.builds(
        Node, address=st.just("same"), cpus=AMOUNT, gpus=AMOUNT, marks=st.sampled_from([frozenset[str](), {"a"}])
    ),
    max_size=4,
)
ASKS = st.lists(
    st.builds(
        Ask,
        part=st.text("xyz", min_size=1, max_size=3),
        count=st.integers(1, 4),
        cpus=AMOUNT,
        gpus=AMOUNT,
        node=st.sampled_from([None, "a"]),
    ),
    max_size=3,
    unique_by=lambda ask: ask.part,
)


@given(wanted=ASKS, nodes=NODES)
def test_no_node_gets_more_than_it_has(wanted: list[Ask], nodes: list[Node]) -> None:
    named = [Node(address=str(i), cpus=n.cpus, gpus=n.gpus, marks=n.marks) for i, n in enumerate(nodes)]
    plan = deal(wanted, named)
    used: Counter[tuple[str, str]] = Counter()
    for ask in wanted:
        assert len(plan.placed[ask.part]) <= ask.count
        for address in plan.placed[ask.part]:
            used[address, "cpus"] += ask.cpus  # type: ignore[assignment]
            used[address, "gpus"] += ask.gpus  # type: ignore[assignment]
            assert ask.node is None or ask.node in named[int(address)].marks
    for index, node in enumerate(named):
        assert used[str(index), "cpus"] <= node.cpus + 1e-5
        assert used[str(index), "gpus"] <= node.gpus + 1e-5
    # One address for several nodes changes nothing.
    assert {part: len(on) for part, on in deal(wanted, nodes).placed.items()} == {
        part: len(on) for part, on in plan.placed.items()
    }
    if not plan.fits:
        assert missing(plan).where


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"rollout": {"engines": 2}}, "rollout.engines: 2; legal: 1 like learner.ranks"),
        ({"rollout": {"gpus": 0.6}, "learner": {"gpus": 0.5}}, "rollout.gpus: 0.6; legal: 0, or at most 0.5"),
        ({"rollout": {"tensor_parallel": 2}}, "rollout.tensor_parallel: 2; legal: 1"),
        ({"max_staleness": 1, "objective": {"truncation": {"level": "token"}}}, "max_staleness: 1; legal: 0"),
    ],
)
def test_pairs_that_cannot_be(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told.replace(".", r"\.")):
        job(**sections, cluster={"colocated": True})


@pytest.mark.parametrize("mover", ["nccl", "vllm_nccl", "cuda_ipc"])
def test_movers_of_cards_need_cards(mover: str) -> None:
    weights, cards = {"weights": {"mover": mover}}, {"rollout": {"gpus": 1}}
    check_mover(job(**weights, **cards), on_gpus=True)
    for refused, on_gpus in ((job(**weights), True), (job(**weights, **cards), False)):
        with pytest.raises(RequestError, match=rf"weights\.mover: {mover}; legal: shared_memory, file or gloo, unless"):
            check_mover(refused, on_gpus=on_gpus)
    shared = job(**weights, rollout={"gpus": 0.5}, learner={"gpus": 0.5}, cluster={"colocated": True})
    if mover == "cuda_ipc":
        check_mover(shared, on_gpus=True)
    else:
        with pytest.raises(RequestError, match=r"legal: cuda_ipc, .*NCCL wants one for each"):
            check_mover(shared, on_gpus=True)
    check_mover(job(), on_gpus=False)


def test_workers_must_divide_the_heads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    check_heads(job(rollout={"tensor_parallel": 3}), tmp_path)
    with pytest.raises(RequestError, match="a divisor of the model's 6 attention heads"):
        check_heads(job(rollout={"tensor_parallel": 4}), tmp_path)
