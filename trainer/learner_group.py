"""The learner as the driver sees it: one object, whatever the number of ranks.

Ranks are Ray actors (`LearnerGroup.start`), or one learner inside this process (`LearnerGroup.local`). Every call goes
to all ranks with the whole batch; the answers for the ranks' shares are joined here. The first rank that fails ends
the call: the others may wait for it in a collective until their own deadline, so a group that failed is closed.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.constraint import Constraint
from data.errors import RequestError, RunError
from data.records import FloatArray
from data.trie import ItemTrie
from data.trie_constraint import TrieConstraint
from rollout.movers import Endpoint, MoverRequest
from rollout.peers import LocalPeer, Peer, RayPeer
from rollout.probe import Probe, ProbeAnswer
from rollout.receiving import PushMessage, Receipt
from trainer.learner import Learner, ScoreOutputs, SequenceRows
from trainer.losses import UpdateInputs, join_statistics, update_metrics
from trainer.ranks import RankPlace
from trainer.settings import Device, LearnerSettings
from trainer.trees import Completions

__all__ = ["LearnerGroup", "LearnerLost", "ScoreOutputs"]


class LearnerLost(RunError):
    """A rank died or fell silent; the group cannot go on, but may begin again from a checkpoint."""


class HasTrie(Protocol):
    """What is needed of a `data.catalogue.Catalogue`."""

    def trie(self) -> ItemTrie:
        """The trie of the active items."""
        ...


class LearnerActor:
    """A rank in a process of its own."""

    def __init__(self) -> None:
        self._learner: Learner | None = None

    def address(self) -> tuple[str, str, int]:
        """(node id, address of the node, a free port)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address()), port

    def build(self, arguments: dict[str, Any], place: RankPlace) -> None:
        """Start the learner; returns when all ranks have met."""
        self._learner = Learner(**arguments, place=place)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the learner."""
        return getattr(self._built, method)(*arguments)

    @property
    def _built(self) -> Learner:
        if self._learner is None:
            raise RunError("the learner rank was not started")
        return self._learner

    def describe_weights(self) -> Any:
        """See `Learner`."""
        return self._built.describe_weights()

    def open_push(self, request: MoverRequest) -> Endpoint | None:
        """See `Learner`."""
        return self._built.open_push(request)

    def send_push(self, message: PushMessage) -> Receipt | None:
        """See `Learner`."""
        return self._built.send_push(message)

    def answer_probe(self, probe: Probe) -> ProbeAnswer:
        """See `Learner`."""
        return self._built.answer_probe(probe)


class LearnerGroup:
    """All ranks of the learner."""

    def __init__(self, settings: LearnerSettings, local: Learner | None, actors: list[Any]) -> None:
        self.settings = settings
        self._local = local
        self._actors = actors
        self._source: Peer | None = None

    @classmethod
    def start(
        cls,
        settings: LearnerSettings,
        hf_dir: Path,
        catalogue: HasTrie,
        seed: int,
        total_steps: int,
        *,
        reference_dir: Path | None = None,
        constraint: Constraint[Any] | None = None,
    ) -> LearnerGroup:
        """Start the ranks as Ray actors; Ray is initialised.

        Args:
            settings: the learner's section of the configuration.
            hf_dir: Hugging Face folder all ranks can read.
            catalogue: gives the item trie that legal sets are replayed from.
            seed: of what the learner draws: the dropout of supervised steps.
            total_steps: optimiser steps of the whole job, for the schedule.
            reference_dir: Hugging Face folder of a frozen reference policy; None loads none.
            constraint: what legal sets are replayed from; by default single items with exclusions.

        Raises:
            RequestError: the model cannot be used.
            RunError: a rank failed, or the ranks did not meet in time.
        """
        import ray

        check_resources(settings)
        actor = ray.remote(LearnerActor)
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": settings.gpus if _gpus(settings) else 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": _environment(settings)},
        }
        actors = [actor.options(**options).remote() for _ in range(settings.ranks)]
        group = cls(settings, None, actors)
        addresses = group._wait([a.address.remote() for a in actors])
        one_node = len({node for node, _, _ in addresses}) == 1
        host, port = "127.0.0.1" if one_node else addresses[0][1], addresses[0][2]
        arguments = ray.put(
            {
                "settings": settings,
                "hf_dir": Path(hf_dir),
                "constraint": constraint or TrieConstraint(catalogue.trie(), exclude=True),
                "seed": seed,
                "total_steps": total_steps,
                "reference_dir": reference_dir,
            }
        )
        places = [RankPlace(rank=rank, ranks=settings.ranks, host=host, port=port) for rank in range(settings.ranks)]
        group._wait([a.build.remote(arguments, place) for a, place in zip(actors, places, strict=True)])
        return group

    @classmethod
    def local(
        cls,
        settings: LearnerSettings,
        hf_dir: Path,
        constraint: Constraint[Any],
        seed: int = 0,
        total_steps: int = 1,
        *,
        reference_dir: Path | None = None,
    ) -> LearnerGroup:
        """One rank inside this process, without Ray."""
        if settings.ranks != 1:
            raise ValueError(f"a local learner has one rank, not {settings.ranks}")
        learner = Learner(settings, hf_dir, constraint, seed=seed, total_steps=total_steps, reference_dir=reference_dir)
        return cls(settings, learner, [])

    # -- calls

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        if self._local is not None:
            return [getattr(self._local, method)(*arguments)]
        import ray

        shared = [ray.put(argument) for argument in arguments]
        return self._wait([actor.call.remote(method, *shared) for actor in self._actors])

    def _wait(self, calls: list[Any]) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=self.settings.timeout_s)
            if not ready:
                raise LearnerLost(f"{len(waiting)} learner ranks gave no answer within {self.settings.timeout_s:g} s")
            try:
                ray.get(ready)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from error
            except RayActorError as error:
                rank = calls.index(ready[0])
                raise LearnerLost(f"learner rank {rank} died: {str(error).splitlines()[0]}") from error
        return list(ray.get(calls))

    def score(self, completions: Completions, temperature: float) -> ScoreOutputs:
        """Scores of all completions, without gradient, by the present weights."""
        parts = self._all("score", completions, temperature)
        return _joined_scores(parts)

    def noise(self, completions: Completions, temperature: float, logp_PGT: FloatArray) -> dict[str, float]:
        """The learner's own gap to float32 per completion token: {mean, max}; 0 for a float32 learner.

        Args:
            completions: what was scored.
            temperature: as it was scored.
            logp_PGT: of `score`, by the present weights.
        """
        parts = self._all("noise", completions, temperature, logp_PGT)
        count = max(sum(part["count"] for part in parts), 1.0)
        return {"mean": sum(part["sum"] for part in parts) / count, "max": max(part["max"] for part in parts)}

    def update(self, completions: Completions, inputs: UpdateInputs) -> dict[str, float]:
        """One optimiser step; returns its metrics (`losses.update_metrics`, `grad_norm`, `lr`).

        Raises:
            RunError: loss or gradient is not finite; the weights are as before.
        """
        sums = join_statistics(self._all("update", completions, inputs))
        return update_metrics(sums) | self._step_metrics()

    def update_sft(self, rows: SequenceRows) -> dict[str, float]:
        """One optimiser step of supervised training on (tokens, marks of the tokens to learn)."""
        sums = join_statistics(self._all("update_sft", rows))
        return sums | self._step_metrics()

    def _step_metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = self._all("step_metrics")[0]
        return metrics

    def evaluate_nll(self, rows: SequenceRows) -> dict[str, float]:
        """Mean full-vocabulary NLL of the marked tokens: {nll, tokens}."""
        sums = join_statistics(self._all("evaluate_nll", rows))
        return {"nll": sums["nll"] / max(sums["tokens"], 1.0), "tokens": sums["tokens"]}

    # -- weights and disk

    @property
    def source(self) -> Peer:
        """The learner as the source of the weight channel."""
        if self._source is None:
            self._source = LocalPeer("learner", self._local) if self._local else RayPeer("learner", self._actors)
        return self._source

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self._all("steps_taken")[0])

    def save(self, folder: Path) -> None:
        """Write the state of all ranks into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("save", Path(folder))

    def load(self, folder: Path) -> None:
        """Continue from a state, of any number of ranks and any ZeRO stage.

        Raises:
            RequestError: the state is missing or of another model.
        """
        self._all("load", Path(folder))

    def export_hf(self, folder: Path) -> None:
        """Write weights, configuration, tokenizer and catalogue as a Hugging Face folder."""
        self._all("export_hf", Path(folder))

    def export_adapter(self, folder: Path) -> None:
        """Write the trained adapter alone, in PEFT's layout (a learner with `lora`)."""
        self._all("export_adapter", Path(folder))

    def close(self) -> None:
        """End the ranks."""
        if self._local is not None:
            self._local.close()
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
            self._actors = []


def _joined_scores(parts: list[ScoreOutputs]) -> ScoreOutputs:
    """Every slot is scored by exactly one rank and zero on the others."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(ScoreOutputs):
        arrays = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if arrays[0] is None else np.sum(arrays, axis=0, dtype=arrays[0].dtype)
    return ScoreOutputs(**joined)


def check_resources(settings: LearnerSettings) -> None:
    """Refuse what the cluster can never give, instead of waiting for it.

    Raises:
        RequestError: more ranks than CPUs, or CUDA without as many GPUs.
    """
    import ray

    total = ray.cluster_resources()
    if total.get("CPU", 0) < settings.ranks:
        raise RequestError("learner.ranks", settings.ranks, f"at most {int(total.get('CPU', 0))}, the cluster's CPUs")
    gpus = int(total.get("GPU", 0))
    if settings.device is Device.CUDA and gpus < settings.ranks * settings.gpus:
        raise RequestError("learner.device", "cuda", f"auto or cpu: {settings.ranks} ranks and {gpus} GPUs here")


def _gpus(settings: LearnerSettings) -> bool:
    if settings.device is Device.CPU:
        return False
    import ray

    return settings.device is Device.CUDA or ray.cluster_resources().get("GPU", 0) >= settings.ranks * settings.gpus


def _environment(settings: LearnerSettings) -> dict[str, str]:
    """Threads of a rank. They wait passively: spinning threads of one process starve the others of a small machine."""
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not _gpus(settings):
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
