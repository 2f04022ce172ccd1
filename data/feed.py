"""Where training rows come from: batches of prompts with a cursor, and windows of whole sequences for SFT.

Both are functions of (seed, epoch, position) and nothing else, so a resumed run sees what an undisturbed one sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from data.catalogue import Catalogue
from data.dataset import Sequences
from data.errors import RequestError
from data.records import BoolArray, IntArray, LongArray, Prompt

_PROMPT_STREAM: Final = 1
_WINDOW_STREAM: Final = 2
CursorState = dict[str, int | str]


class DrawnPrompts(Protocol):
    """What a builder makes of rows."""

    @property
    def prompts(self) -> list[Prompt]:
        """In the order of the rows."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What was not taken as it is, by reason."""
        ...


class PromptSource(Protocol):
    """What makes prompts of rows: `data.prompts.PromptBuilder`, or something that has them already."""

    def build(self, samples: Any, rows: npt.NDArray[np.integer]) -> DrawnPrompts:
        """Prompts of the given rows of the feed's samples."""
        ...


class Feed:
    """Endless batches of prompts: every row at most once per epoch, reshuffled by the seed in each epoch.

    An epoch ends with its last whole batch, so that no batch holds a prompt twice (its random numbers are keyed by
    the prompt); the rows left over are others in every epoch when shuffling.
    """

    def __init__(
        self,
        samples: Sized,
        builder: PromptSource,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        *,
        fingerprint: str,
    ) -> None:
        """`fingerprint` is the dataset's, kept in the cursor.

        Raises:
            RequestError: fewer rows than a batch.
        """
        if not 1 <= batch_size <= len(samples):
            raise RequestError("batch size", batch_size, f"1 to {len(samples)}, the rows of the split")
        self.samples = samples
        self.builder = builder
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.epoch = 0
        self.batch = 0
        self._order_cache: tuple[int, LongArray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return len(self.samples) // self.batch_size

    def next(self) -> DrawnPrompts:
        """The next batch; moves the cursor."""
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        start = self.batch * self.batch_size
        self.batch += 1
        return self.builder.build(self.samples, self._order()[start : start + self.batch_size])

    def _order(self) -> LongArray:
        if self._order_cache is None or self._order_cache[0] != self.epoch:
            rows = np.arange(len(self.samples))
            if self.shuffle:
                rows = generator(self.seed, _PROMPT_STREAM, self.epoch).permutation(rows)
            self._order_cache = (self.epoch, rows)
        return self._order_cache[1]

    def state_dict(self) -> CursorState:
        """The cursor, for a checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "rows": len(self.samples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self.batch,
        }

    def load_state_dict(self, state: CursorState) -> str | None:
        """Continue from a cursor.

        Returns:
            None, or a message for the user when the cursor is of other data, another batch size or another seed and
            the feed therefore starts anew.
        """
        own = self.state_dict()
        differing = [
            f"{key} {state.get(key)!r} became {own[key]!r}"
            for key in ("fingerprint", "rows", "batch_size", "seed")
            if state.get(key) != own[key]
        ]
        if differing:
            self.epoch = self.batch = 0
            return f"the data cursor starts anew: {', '.join(differing)}"
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        return None


def sequence_windows(
    sequences: Sequences, catalogue: Catalogue, history: int, seed: int, epoch: int, *, stride: int | None = None
) -> list[tuple[IntArray, BoolArray]]:
    """Token rows that train on whole sequences: every target is the target of exactly one row of an epoch.

    A sequence of more than history + 1 events is cut into windows of that many; where it is cut changes with the
    epoch, so that over the epochs an event is predicted from contexts of many lengths up to `history`.

    Args:
        stride: most targets per window; the other events of a window are context. Smaller means longer contexts and
            more tokens. By default `history`, at least one event of context.

    Returns:
        (token_ids int32 [R], loss_mask bool [R]) per window in a shuffled order: `<bos>` and the paths of at most
        history + 1 events; the mask is true on the tokens to be predicted.

    Raises:
        RequestError: a stride outside 1..history.
    """
    targets = history if stride is None else stride
    if not 1 <= targets <= history:
        raise RequestError("stride", targets, f"1 to {history}, the history")
    rng = generator(seed, _WINDOW_STREAM, epoch)
    rows: list[tuple[IntArray, BoolArray]] = []
    bos = np.asarray([catalogue.vocabulary.bos], dtype=np.int32)
    for s in range(len(sequences)):
        events = sequences.values[int(sequences.start_S[s]) : int(sequences.end_S[s])]
        first = int(sequences.loss_from_S[s])
        short = len(events) <= history + 1
        stop = len(events) if short else min(len(events), first + 1 + int(rng.integers(targets)))
        while first < len(events):
            start = max(0, stop - history - 1)
            tokens, length = catalogue.tokens_of(events[start:stop])
            mask = np.zeros(1 + len(tokens), dtype=bool)
            mask[1 + int(length[: first - start].sum()) :] = True
            rows.append((np.concatenate([bos, tokens]), mask))
            first, stop = stop, min(len(events), stop + targets)
    return [rows[row] for row in rng.permutation(len(rows))]


def generator(seed: int, *keys: int) -> np.random.Generator:
    """A random generator that depends on its keys only, not on what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *keys])))
