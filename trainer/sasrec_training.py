"""Training SASRec on whole sequences, in one process.

Every event of the training sequences is a target once per epoch: a sequence is cut into windows at random places, new
ones every epoch, and each window reads as many earlier items as the network takes. The loss is the softmax over the
whole catalogue. Row-wise training (one row per target) costs ten times more and is worse (../shared/stack.md).

Reproducible on one machine and thread count: data order and dropout are drawn from (seed, epoch), so a state written
between two epochs continues to the same bits.

Suffixes: `_B` row of a batch, `_S` position, `_W` window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.dataset import Sequences
from data.embeddings import cooccurrence_vectors
from data.errors import RunError
from reward.sasrec import SASRec, SASRecShape
from trainer.ranker_settings import InitialItems, SASRecSettings

BETAS = (0.9, 0.98)
FINAL_LR = 0.02
"""Share of the learning rate that is left at the planned end."""
NO_TARGET = -100
COOCCURRENCE_WINDOW = 10
"""Events; items further apart do not count as together."""
COOCCURRENCE_STD = 0.1
"""Standard deviation of the initial item embeddings."""
_TURN_STREAM = 7
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of one epoch: window w reads values[begin:end - 1] and its targets are values[target_from:end]."""

    begin_W: np.ndarray
    target_from_W: np.ndarray
    end_W: np.ndarray

    def __len__(self) -> int:
        return len(self.end_W)


def cut_windows(sequences: Sequences, window: int, history: int, random: np.random.Generator) -> Windows:
    """Cut every sequence into windows of at most `window` targets at a random offset; each target falls into one.

    The first event of a sequence is a target as well (after the start token alone) where the sequence is a user's
    from the beginning, which trains the score after an empty history. `window` is at most `history`, or the first
    targets of a window would not fit into the positions of the network.
    """
    if window > history:
        raise ValueError(f"windows of {window} targets do not fit {history} items of history")
    rows: list[tuple[int, int, int]] = []
    for start, end, loss_from in zip(sequences.start_S, sequences.end_S, sequences.loss_from_S, strict=True):
        first = int(start) + (0 if loss_from <= 1 else int(loss_from))
        offset = int(random.integers(1, window + 1))
        cuts = [first, *range(first + offset, int(end), window), int(end)]
        for target_from, target_end in pairwise(cuts):
            if target_from < target_end:
                rows.append((max(int(start), target_end - 1 - history), target_from, target_end))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Windows(begin_W=table[:, 0], target_from_W=table[:, 1], end_W=table[:, 2])


class SASRecTraining:
    """Network, optimiser and counters of a training run; `epoch` steps through one epoch."""

    def __init__(
        self, sequences: Sequences, n_items: int, settings: SASRecSettings, *, history: int, seed: int
    ) -> None:
        self.sequences = sequences
        self.settings = settings
        self.seed = seed
        self.step = 0
        self.epochs_done = 0
        shape = SASRecShape(
            n_items=n_items,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            max_history=history,
            dropout=settings.dropout,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = SASRec(shape)
        if settings.initial_items is InitialItems.COOCCURRENCE:
            self._begin_with_cooccurrence()
        matrices = [p for name, p in self.network.named_parameters() if _decays(name, p)]
        others = [p for name, p in self.network.named_parameters() if not _decays(name, p)]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=BETAS,
        )

    def _begin_with_cooccurrence(self) -> None:
        """Item embeddings from co-occurrence, turned so that no dimension (and no head) gets all the large values."""
        n_items, width = self.network.shape.n_items, self.network.shape.width
        dims = min(n_items - 1, width)
        vectors = cooccurrence_vectors(self.sequences, n_items, dims, COOCCURRENCE_WINDOW).astype(np.float64)
        turn = np.linalg.qr(np.random.default_rng([self.seed, _TURN_STREAM]).normal(size=(width, width)))[0][:dims]
        turned = vectors @ turn
        scaled = turned * (COOCCURRENCE_STD / max(turned.std(), 1e-12))
        with torch.no_grad():
            self.network.item.weight[:n_items] = torch.from_numpy(scaled.astype(np.float32))

    def epoch(self, *, planned_epochs: float, planned_steps: float) -> Iterator[dict[str, float]]:
        """Take the steps of the next epoch, yielding the metrics of each.

        Args:
            planned_epochs: epochs of the whole run, `inf` when unlimited; the learning rate falls linearly to it.
            planned_steps: the same in steps.

        Raises:
            RunError: a loss or gradient that is not finite; the step was not taken.
        """
        random = np.random.default_rng([self.seed, self.epochs_done])
        history = self.network.shape.max_history
        windows = cut_windows(self.sequences, min(self.settings.window, history), history, random)
        order = random.permutation(len(windows))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.integers(2**62)))
            dropout_state = torch.get_rng_state()
        for first in range(0, len(order), self.settings.batch_rows):
            done = (self.epochs_done + first / len(order)) / planned_epochs
            rate = self._rate(max(done, self.step / planned_steps))
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(dropout_state)
                metrics = self._step(windows, order[first : first + self.settings.batch_rows], rate)
                dropout_state = torch.get_rng_state()
            yield metrics
        self.epochs_done += 1

    def _rate(self, share_done: float) -> float:
        warmup = min(1.0, (self.step + 1) / (self.settings.warmup_steps + 1))
        return self.settings.lr * warmup * max(FINAL_LR, 1.0 - share_done)

    def _step(self, windows: Windows, rows: np.ndarray, rate: float) -> dict[str, float]:
        token_BS, target_BS = self._batch(windows, rows)
        self.network.train()
        state_BSD = self.network(token_BS)
        wanted_BS = target_BS != NO_TARGET
        loss = functional.cross_entropy(self.network.logits(state_BSD[wanted_BS]), target_BS[wanted_BS])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.grad_clip))
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise RunError(
                f"SASRec step {self.step + 1}: loss {loss.item()}, gradient norm {norm}; lower ranker.sasrec.lr"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.step += 1
        return {"loss": loss.item(), "grad_norm": norm, "lr": rate, "targets": float(wanted_BS.sum())}

    def _batch(self, windows: Windows, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token and target rows, padded on the right; position s reads the start token and s items."""
        begin, target_from, end = windows.begin_W[rows], windows.target_from_W[rows], windows.end_W[rows]
        steps = int((end - begin).max())
        index_BS = begin[:, None] + np.arange(steps)
        inside_BS = index_BS < end[:, None]
        item_BS = np.where(inside_BS, self.sequences.values[np.minimum(index_BS, end[:, None] - 1)], 0).astype(np.int64)
        token_BS = np.full(item_BS.shape, self.network.start_token)
        token_BS[:, 1:] = np.where(inside_BS[:, 1:], item_BS[:, :-1], self.network.start_token)
        target_BS = np.where(inside_BS & (index_BS >= target_from[:, None]), item_BS, NO_TARGET)
        return torch.from_numpy(token_BS), torch.from_numpy(target_BS)

    def state(self) -> Arrays:
        """Weights, moments and counters as arrays, between two epochs."""
        arrays = {
            f"weight/{name}": tensor.detach().numpy().copy() for name, tensor in self.network.state_dict().items()
        }
        for name, parameter in self.network.named_parameters():
            for moment, value in self.optimiser.state.get(parameter, {}).items():
                arrays[f"{moment}/{name}"] = value.detach().numpy().copy()
        return arrays | {"step": np.array([self.step]), "epochs_done": np.array([self.epochs_done])}

    def load_state(self, arrays: Arrays) -> None:
        """Continue from `state`."""
        self.network.load_state_dict(
            {
                name.removeprefix("weight/"): torch.from_numpy(v.copy())
                for name, v in arrays.items()
                if name.startswith("weight/")
            }
        )
        for name, parameter in self.network.named_parameters():
            moments = ("step", "exp_avg", "exp_avg_sq")
            found = {m: torch.from_numpy(arrays[f"{m}/{name}"].copy()) for m in moments if f"{m}/{name}" in arrays}
            if found:
                self.optimiser.state[parameter] = found
        self.step, self.epochs_done = int(arrays["step"][0]), int(arrays["epochs_done"][0])


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and not name.startswith(("item.", "position."))
