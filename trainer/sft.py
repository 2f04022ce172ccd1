"""Supervised training with the full-vocabulary NLL: on whole sequences, or on ideal lists (`trainer.list_sft`).

Every event of a user's sequence is the target of one window per epoch (`data.feed.sequence_windows`); a step takes
`batch_rows` windows and normalises by all their target tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data.catalogue import Catalogue
from data.dataset import Samples, Sequences
from data.errors import RequestError
from data.feed import sequence_windows
from data.records import BoolArray, IntArray
from data.text_prompts import TextPromptBuilder
from data.text_tasks import TaskRows
from trainer.jobs import SftJob
from trainer.learner_group import LearnerGroup
from trainer.training_loop import Metrics, TrainingLoop

Rows = Sequence[tuple[IntArray, BoolArray]]


@dataclasses.dataclass
class RowFeed(abc.ABC):
    """Batches of the rows of an epoch; its state is an epoch and a batch."""

    batch_rows: int
    seed: int
    fingerprint: str
    epoch: int = dataclasses.field(default=0, init=False)
    batch: int = dataclasses.field(default=0, init=False)
    _rows: Rows | None = dataclasses.field(default=None, init=False)

    @abc.abstractmethod
    def rows_of(self, epoch: int) -> Rows:
        """(tokens, marks of the tokens to learn) of an epoch, in its order: a function of the seed and the epoch."""

    def next(self) -> Rows:
        """The next batch; the last one of an epoch may be smaller."""
        if self._rows is None:
            self._rows = self.rows_of(self.epoch)
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
            self._rows = self.rows_of(self.epoch)
        start = self.batch * self.batch_rows
        self.batch += 1
        return self._rows[start : start + self.batch_rows]

    @property
    def batches_per_epoch(self) -> int:
        """Batches of the present epoch."""
        if self._rows is None:
            self._rows = self.rows_of(self.epoch)
        return -(-len(self._rows) // self.batch_rows)

    def state_dict(self) -> dict[str, int | str]:
        """The cursor, for a checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self.batch,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> str | None:
        """Continue from a cursor; returns a message when it is of other data and the feed starts anew."""
        own = self.state_dict()
        differing = [
            f"{key} {state.get(key)!r} became {own[key]!r}"
            for key in ("fingerprint", "batch_rows", "seed")
            if state.get(key) != own[key]
        ]
        if differing:
            self.epoch = self.batch = 0
            return f"the data cursor starts anew: {', '.join(differing)}"
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self._rows = None
        return None


@dataclasses.dataclass
class WindowFeed(RowFeed):
    """Batches of sequence windows."""

    sequences: Sequences
    catalogue: Catalogue
    history: int

    def rows_of(self, epoch: int) -> Rows:
        """See `RowFeed`."""
        windows = sequence_windows(self.sequences, self.catalogue, self.history, self.seed, epoch)
        if not windows:
            raise RequestError(
                "data.dataset", "no sequence of two events to train on", "a dataset with longer histories"
            )
        return windows


@dataclasses.dataclass
class TaskFeed(RowFeed):
    """Batches of prompts of a language model with their answers."""

    samples: Samples
    builder: TextPromptBuilder

    def rows_of(self, epoch: int) -> Rows:
        """See `RowFeed`."""
        return TaskRows(self.builder, self.samples, seed=self.seed, epoch=epoch)


@dataclasses.dataclass(kw_only=True)
class SftLoop(TrainingLoop):
    """Steps of supervised training."""

    job: SftJob
    feed: RowFeed
    learners: LearnerGroup

    pushes_every_step = False

    def epochs(self) -> float:
        """Passes over the sequences so far."""
        return self.feed.epoch + self.feed.batch / self.feed.batches_per_epoch

    def keep(self, folder: Path) -> None:
        """Nothing: the cursor tells everything."""

    def close(self) -> None:
        """Nothing runs beside the steps."""

    def step(self) -> Metrics:
        """One optimiser step on a batch of windows."""
        rows = self.feed.next()
        metrics: Metrics = self.host.rest_engines()
        with self.timer.phase("update"):
            metrics |= self.learners.update_sft(rows)
        self.state = dataclasses.replace(self.state, step=self.state.step + 1, cursor=dict(self.feed.state_dict()))
        return metrics | {"epoch": self.epochs(), "rows": float(len(rows))}
