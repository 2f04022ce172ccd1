"""The learner as the driver sees it: one object, whatever the number of ranks (`trainer.rank_group`).

Every call goes to all ranks with the whole batch; the answers for the ranks' shares are joined here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.constraint import Constraint
from data.records import FloatArray
from data.trie import ItemTrie
from data.trie_constraint import TrieConstraint
from rollout.movers import Endpoint, MoverRequest
from rollout.peers import LocalPeer, Peer, RayPeer
from rollout.placement import Placement
from rollout.probe import Gap, Probe, ProbeAnswer
from rollout.receiving import PushMessage, Receipt
from trainer.completion_scores import ScoreOutputs
from trainer.learner import Learner, SequenceRows
from trainer.losses import UpdateInputs, join_statistics, update_metrics
from trainer.rank_group import LearnerLost, RankActor, RankGroup
from trainer.ranks import RankPlace
from trainer.settings import LearnerSettings
from trainer.trees import Completions

__all__ = ["LearnerGroup", "LearnerLost"]


class HasTrie(Protocol):
    """What is needed of a `data.catalogue.Catalogue`."""

    def trie(self) -> ItemTrie:
        """The trie of the active items."""
        ...


class LearnerActor(RankActor):
    """A learner rank in a process of its own."""

    def make(self, arguments: dict[str, Any], place: RankPlace) -> Learner:
        """The learner."""
        return Learner(**arguments, place=place)

    def describe_weights(self) -> Any:
        """See `Learner`."""
        return self.call("describe_weights")

    def open_push(self, request: MoverRequest) -> Endpoint | None:
        """See `Learner`."""
        return self.call("open_push", request)  # type: ignore[no-any-return]

    def send_push(self, message: PushMessage) -> Receipt | None:
        """See `Learner`."""
        return self.call("send_push", message)  # type: ignore[no-any-return]

    def answer_probe(self, probe: Probe) -> ProbeAnswer:
        """See `Learner`."""
        return self.call("answer_probe", probe)  # type: ignore[no-any-return]

    def probe_noise(self, probe: Probe) -> Gap:
        """See `Learner`."""
        return self.call("probe_noise", probe)  # type: ignore[no-any-return]


class LearnerGroup(RankGroup):
    """All ranks of the learner."""

    def __init__(
        self, settings: LearnerSettings, local: Learner | None, actors: list[Any], placement: Placement | None = None
    ) -> None:
        super().__init__(settings, local, actors, placement)
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
        placement: Placement | None = None,
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
            placement: where the ranks go; by default near each other on any node.

        Raises:
            RequestError: the model cannot be used.
            RunError: there is no room, a rank failed, or the ranks did not meet in time.
        """
        arguments = {
            "settings": settings,
            "hf_dir": Path(hf_dir),
            "constraint": constraint or TrieConstraint(catalogue.trie(), exclude=True),
            "seed": seed,
            "total_steps": total_steps,
            "reference_dir": reference_dir,
        }
        return cls.start_ranks(settings, LearnerActor, arguments, placement)

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

    def score(self, completions: Completions, temperature: float) -> ScoreOutputs:
        """Scores of all completions, without gradient, by the present weights."""
        parts = self._all("score", completions, temperature)
        return _joined_scores(parts)

    def noise(self, completions: Completions, temperature: float, logp_PGT: FloatArray) -> dict[str, float]:
        """The learner's own gap to a wider type per completion token: {mean, max}.

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

    def give_memory(self) -> None:
        """Before engines that share the ranks' cards wake: what the ranks keep for later and do not hold now."""
        self._all("give_memory")

    def export_hf(self, folder: Path) -> None:
        """Write weights, configuration, tokenizer and catalogue as a Hugging Face folder."""
        self._all("export_hf", Path(folder))

    def export_adapter(self, folder: Path) -> None:
        """Write the trained adapter alone, in PEFT's layout (a learner with `lora`)."""
        self._all("export_adapter", Path(folder))


def _joined_scores(parts: list[ScoreOutputs]) -> ScoreOutputs:
    """Every slot is scored by exactly one rank and zero on the others."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(ScoreOutputs):
        arrays = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if arrays[0] is None else np.sum(arrays, axis=0, dtype=arrays[0].dtype)
    return ScoreOutputs(**joined)
