"""What a job asks of the cluster against what is there, before anything is started.

Every part asks for a number of actors; each actor needs its CPUs and GPUs on one node. The check deals the actors out
to the nodes, the largest first, and names what is missing. Pure but for `check_cluster`.

| waits           | for                          | unblocked by                                                    |
|-----------------|------------------------------|-----------------------------------------------------------------|
| `check_cluster` | nodes that are still to come | enough nodes, or `cluster.preflight_deadline_s`: a RequestError |

A cluster that was started by this process gets no more nodes, so nothing is waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import RequestError
from rollout.movers import CARD_TO_CARD, ON_CARDS
from rollout.placement import SLIVER
from trainer.jobs import RlJob, SftJob
from trainer.settings import Device

POLL_S = 0.5
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The actors of one part."""

    part: str
    """Key of the configuration that says how many."""
    count: int
    cpus: float
    """Of each."""
    gpus: float
    """Of each."""
    node: str | None = None
    """Ray resource that its nodes must have."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster."""

    address: str
    cpus: float
    gpus: float
    marks: frozenset[str] = frozenset()
    """Ray resources besides CPUs and GPUs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which part fits where."""

    asks: tuple[Ask, ...]
    nodes: tuple[Node, ...]
    placed: dict[str, list[str]]
    """Part → addresses, one for each actor that fits."""

    @property
    def fits(self) -> bool:
        """Whether every actor has its room."""
        return all(len(self.placed[ask.part]) == ask.count for ask in self.asks)

    def table(self) -> str:
        """What is asked against what is there, for the person who watches."""
        lines = [f"cluster: {_words(self.nodes)}"]
        for ask in self.asks:
            where = sorted(set(self.placed[ask.part]))
            lines.append(
                f"  {ask.part}: {ask.count} x ({ask.cpus:g} CPUs, {ask.gpus:g} GPUs) on {', '.join(where) or 'no node'}"
            )
        return "\n".join(lines)


def learns_on_cards(job: SftJob | RlJob, *, on_gpus: bool) -> bool:
    """Whether a learner takes a GPU: where there are enough (`on_gpus`), unless it is set to the CPU."""
    return job.learner.device is Device.CUDA or (job.learner.device is Device.AUTO and on_gpus)


def check_mover(job: SftJob | RlJob, *, on_gpus: bool) -> None:
    """Refuse a mover of weights that engines and learners cannot use where they are.

    Raises:
        RequestError: names those that they can.
    """
    mover, rollout = job.weights.mover, job.rollout
    on_cpu = "shared_memory, file or gloo"
    if mover in ON_CARDS and not (rollout.gpus and learns_on_cards(job, on_gpus=on_gpus)):
        legal = f"{on_cpu}, unless both learners and engines (rollout.gpus) have GPUs"
        raise RequestError("weights.mover", mover.value, legal)
    if mover in CARD_TO_CARD and (job.cluster.colocated or rollout.gpus < 1 or job.learner.gpus < 1):
        legal = f"cuda_ipc, {on_cpu} where processes share a GPU: NCCL wants one for each"
        raise RequestError("weights.mover", mover.value, legal)


def asks(job: SftJob | RlJob, *, with_fleet: bool, on_gpus: bool) -> list[Ask]:
    """What the parts of a job ask for."""
    learner_gpus = job.learner.gpus * learns_on_cards(job, on_gpus=on_gpus)
    engines, cluster = job.rollout.engines * with_fleet, job.cluster
    wanted: list[Ask] = []
    if cluster.colocated and with_fleet:
        gpus = job.rollout.gpus + learner_gpus
        wanted.append(Ask(part="rollout.engines", count=engines, cpus=2.0, gpus=gpus, node=cluster.engine_node))
    else:
        wanted.append(
            Ask(part="learner.ranks", count=job.learner.ranks, cpus=1.0, gpus=learner_gpus, node=cluster.learner_node)
        )
        wanted.append(
            Ask(part="rollout.engines", count=engines, cpus=1.0, gpus=job.rollout.gpus, node=cluster.engine_node)
        )
    if isinstance(job, RlJob) and job.reward.ranker is not None:
        reward = job.reward
        wanted.append(Ask(part="reward.replicas", count=reward.replicas, cpus=reward.num_cpus, gpus=reward.num_gpus))
    return [ask for ask in wanted if ask.count]


def deal(wanted: Sequence[Ask], nodes: Sequence[Node]) -> Plan:
    """Deal the actors out to the nodes: the largest first, each to the node with the least room that has enough."""
    # Several nodes of one machine have one address, so they are told apart by their place in the list.
    left = [(node.gpus, node.cpus) for node in nodes]
    placed: dict[str, list[str]] = {ask.part: [] for ask in wanted}
    for ask in sorted(wanted, key=lambda one: (one.gpus, one.cpus), reverse=True):
        for _ in range(ask.count):
            possible = [
                index
                for index, (gpus, cpus) in enumerate(left)
                if (ask.node is None or ask.node in nodes[index].marks)
                and gpus + ROUNDING >= ask.gpus
                and cpus + ROUNDING >= ask.cpus
            ]
            if not possible:
                break
            # A node without GPUs first for who needs none, so that the others stay free for who does.
            chosen = min(possible, key=left.__getitem__)
            left[chosen] = left[chosen][0] - ask.gpus, left[chosen][1] - ask.cpus
            placed[ask.part].append(nodes[chosen].address)
    return Plan(asks=tuple(wanted), nodes=tuple(nodes), placed=placed)


def missing(plan: Plan) -> RequestError:
    """What a plan that does not fit lacks: GPUs or CPUs in all, nodes with a mark, or room on any one node."""
    parts = ", ".join(f"{ask.part} {ask.count} x {{}}" for ask in plan.asks)
    for kind in ("gpus", "cpus"):
        there = sum(getattr(node, kind) for node in plan.nodes)
        needed = sum(ask.count * getattr(ask, kind) for ask in plan.asks)
        if needed > there + ROUNDING:
            each = parts.format(*(f"{getattr(ask, kind):g}" for ask in plan.asks))
            legal = f"at least {needed:g} ({each}), {needed - there:g} more, or fewer parts"
            where, what = ("cluster", "GPUs") if kind == "gpus" else ("cluster.num_cpus", "logical CPUs")
            return RequestError(where, f"{there:g} {what}", legal)
    short = next(ask for ask in plan.asks if len(plan.placed[ask.part]) < ask.count)
    found = f"room for {len(plan.placed[short.part])} of {short.count}"
    on = "" if short.node is None else f" with the Ray resource {short.node!r}"
    legal = f"a node{on} with {short.cpus:g} CPUs and {short.gpus:g} GPUs for each; there are {_words(plan.nodes)}"
    return RequestError(short.part, found, legal)


def check_heads(job: SftJob | RlJob, hf_dir: Path) -> None:
    """Refuse workers that could not share the attention heads of the model.

    Raises:
        RequestError: `rollout.tensor_parallel` does not divide them.
    """
    config = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads")
    if heads is not None and int(heads) % job.rollout.tensor_parallel:
        legal = f"a divisor of the model's {heads} attention heads"
        raise RequestError("rollout.tensor_parallel", job.rollout.tensor_parallel, legal)


def check_cluster(job: SftJob | RlJob, *, with_fleet: bool) -> Plan:
    """Wait until the connected cluster has what the job asks for; at most `cluster.preflight_deadline_s`.

    Raises:
        RequestError: names the missing amount, or a mover that does not fit.
    """
    deadline = time.monotonic() + (job.cluster.preflight_deadline_s if job.cluster.joins else 0.0)
    while True:
        nodes = alive_nodes()
        on_gpus = sum(node.gpus for node in nodes) >= job.learner.ranks * job.learner.gpus
        plan = deal(asks(job, with_fleet=with_fleet, on_gpus=on_gpus), nodes)
        if plan.fits:
            if with_fleet:
                check_mover(job, on_gpus=on_gpus)
            return plan
        if time.monotonic() >= deadline:
            raise missing(plan)
        time.sleep(POLL_S)


def alive_nodes() -> list[Node]:
    """The nodes of the connected Ray cluster."""
    import ray

    return [
        Node(
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            marks=frozenset(name for name, amount in node["Resources"].items() if amount >= SLIVER),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _words(nodes: Sequence[Node]) -> str:
    told = [f"{node.address} ({node.cpus:g} CPUs, {node.gpus:g} GPUs)" for node in nodes]
    return f"{len(nodes)} nodes: {', '.join(told[:8])}{', ...' if len(told) > 8 else ''}" if nodes else "no nodes"
