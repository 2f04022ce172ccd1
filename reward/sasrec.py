"""SASRec: self-attention over a user's items, scored against the item embeddings.

The network lives here because the reward service loads it; its training loop is `trainer.ranker_training`.
Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, with the usual changes: normalisation
before the blocks, a start token (so that an empty history has a score and the first event a loss), and the softmax
over the whole catalogue instead of sampled binary losses.

Suffixes: `_B` row, `_S` position, `_D` width, `_I` item, `_Q` pair of a history and one of its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from data.records import FloatArray, IntArray
from data.settings import Settings
from reward.artefact import RankerArtefact


class SASRecShape(Settings):
    """What the network of a SASRec ranker looks like; stored with its weights."""

    n_items: int = Field(ge=1)
    """Items of the catalogue; ids 0 to n_items - 1."""
    width: int = Field(64, ge=4, le=4096)
    """Width of the embeddings and of the blocks."""
    layers: int = Field(2, ge=1, le=64)
    """Attention blocks."""
    heads: int = Field(2, ge=1, le=64)
    """Attention heads; divides `width`."""
    max_history: int = Field(50, ge=1, le=100_000)
    """Most recent items that are read; older ones are cut."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout while training."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> SASRecShape:
        if self.width % self.heads:
            legal = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = sorted(legal, key=lambda h: abs(h - self.heads))[:2]
            raise ValueError(f"heads {self.heads} does not divide width {self.width}; nearest that do: {sorted(near)}")
        return self


class _Block(nn.Module):
    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        rows, steps, width = x_BSD.shape
        drop = self.dropout if self.training else 0.0
        projected = self.query_key_value(self.attention_norm(x_BSD)).view(rows, steps, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=drop)
        mixed_BSD = self.attention_out(mixed.transpose(1, 2).reshape(rows, steps, width))
        x_BSD = x_BSD + functional.dropout(mixed_BSD, drop, self.training)
        fed_BSD = self.feed_out(functional.gelu(self.feed_in(self.feed_norm(x_BSD))))
        return x_BSD + functional.dropout(fed_BSD, drop, self.training)


class SASRec(nn.Module):
    """Histories to states, one per prefix: state s has read the start token and the first s items."""

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        self.shape = shape
        self.item = nn.Embedding(shape.n_items + 1, shape.width)
        """One row per item, the last one is the start token and stands in the padding too."""
        self.position = nn.Embedding(shape.max_history + 1, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.bias = nn.Parameter(torch.zeros(shape.n_items))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def start_token(self) -> int:
        """Index of the start token in the embedding."""
        return self.shape.n_items

    def forward(self, token_BS: Tensor) -> Tensor:
        """States `[B, S, D]` of rows that begin with the start token; padding goes to the right."""
        steps = torch.arange(token_BS.shape[1], device=token_BS.device)
        x_BSD = self.item(token_BS) + self.position(steps)
        x_BSD = functional.dropout(x_BSD, self.shape.dropout, self.training)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        states_BSD: Tensor = self.norm(x_BSD)
        return states_BSD

    def logits(self, state_BD: Tensor) -> Tensor:
        """Scores `[B, I]` of all items."""
        return functional.linear(state_BD, self.item.weight[:-1], self.bias)


class SASRecRanker:
    """A trained SASRec behind the ranker interface.

    Histories are processed in chunks of a fixed number of rows and a fixed length, padded with empty ones, so that
    the score of a sample does not depend on what else is in the call beyond floating-point row position.
    """

    def __init__(self, network: SASRec, *, chunk: int = 64) -> None:
        self.network = network.eval()
        self.chunk = chunk
        self.n_items = network.shape.n_items

    @torch.inference_mode()
    def states(self, histories: Sequence[IntArray]) -> Tensor:
        """State after each whole history, `[B, D]`; longer ones are cut from the oldest item."""
        network = self.network
        limit = network.shape.max_history
        states = []
        for first in range(0, len(histories), self.chunk):
            part = [np.asarray(history)[-limit:] for history in histories[first : first + self.chunk]]
            token_BS = torch.full((self.chunk, limit + 1), network.start_token)
            last_B = torch.zeros(self.chunk, dtype=torch.long)
            for row, history in enumerate(part):
                token_BS[row, 1 : len(history) + 1] = torch.from_numpy(history.astype(np.int64))
                last_B[row] = len(history)
            states_BSD = network(token_BS)
            states.append(states_BSD[torch.arange(self.chunk), last_B][: len(part)])
        return torch.cat(states) if states else torch.zeros(0, network.shape.width)

    @torch.inference_mode()
    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        counts = [len(row) for row in candidates]
        state_BD = self.states(histories)
        item_Q = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *candidates]).astype(np.int64))
        row_Q = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
        score_Q = (state_BD[row_Q] * self.network.item.weight[item_Q]).sum(-1) + self.network.bias[item_Q]
        return [part.numpy() for part in torch.split(score_Q, counts)]

    @torch.inference_mode()
    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """See `reward.ranker.CatalogueRanker`."""
        return np.asarray(self.network.logits(self.states(histories)).numpy(), dtype=np.float32)

    def save(self, folder: Path, provenance: dict[str, object] | None = None) -> str:
        """Write the ranker artefact, weights in safetensors, and return its digest."""
        return RankerArtefact.write(
            folder,
            kind="sasrec",
            options=self.network.shape.model_dump(mode="json"),
            tensors={name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()},
            provenance=provenance,
        )

    @classmethod
    def from_artefact(cls, artefact: RankerArtefact) -> SASRecRanker:
        """The ranker of an opened artefact of kind `sasrec`."""
        network = SASRec(SASRecShape.model_validate(artefact.options))
        network.load_state_dict({name: torch.from_numpy(value) for name, value in artefact.tensors.items()})
        return cls(network)
