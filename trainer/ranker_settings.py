"""The `ranker` section of a `ranker` job: which ranker, its shape and its training."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings


class RankerKind(StrEnum):
    """Rankers that can be trained here."""

    SASREC = "sasrec"
    """Self-attention over the history (reward.sasrec)."""
    COOCCURRENCE = "cooccurrence"
    """Item-to-item counts (reward.cooccurrence)."""
    POPULARITY = "popularity"
    """Number of training events (reward.popularity)."""


class InitialItems(StrEnum):
    """Where the item embeddings of SASRec begin."""

    COOCCURRENCE = "cooccurrence"
    """Co-occurrence vectors of the training events; takes a quarter of the epochs of a random start."""
    RANDOM = "random"
    """Small random numbers, as in the paper."""


class SASRecSettings(Settings):
    """Shape and training of SASRec."""

    width: int = Field(64, ge=4, le=4096)
    """Width of embeddings and blocks; a multiple of `heads`."""
    layers: int = Field(2, ge=1, le=64)
    """Attention blocks."""
    heads: int = Field(2, ge=1, le=64)
    """Attention heads."""
    dropout: float = Field(0.4, ge=0, lt=1)
    """Dropout while training."""
    initial_items: InitialItems = InitialItems.COOCCURRENCE
    """Item embeddings begin as cooccurrence vectors (of training events) or random."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Learning rate of AdamW after warm-up."""
    warmup_steps: int = Field(50, ge=0)
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay of the matrices (not of embeddings' biases and norms)."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    batch_rows: int = Field(32, ge=1, le=65536)
    """Sequence windows per step."""
    window: int = Field(50, ge=1)
    """Training targets per window, at most (and at most data.history); the cuts move every epoch."""
    threads: int = Field(0, ge=0, le=1024)
    """Compute threads; 0 uses every core. Another number changes the weights in the last bits."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            low = self.width // self.heads * self.heads
            near = " or ".join(str(width) for width in (low, low + self.heads) if width)
            raise RequestError("ranker.sasrec.width", self.width, f"{near} (a multiple of ranker.sasrec.heads)")
        return self


class CooccurrenceSettings(Settings):
    """Item-to-item co-occurrence."""

    window: int = Field(20, ge=1, le=1000)
    """Items further apart in a user's sequence do not count as together; a pair counts 1/distance."""
    normalisation: float = Field(0.35, ge=0, le=1)
    """Exponent of both items' counts that a pair is divided by; 0.5 is the cosine."""
    recency: float = Field(0.8, gt=0, le=1)
    """Weight of a history item relative to the next newer one."""


class RankerBiasSettings(Settings):
    """Training log of a ranker that is biased on purpose: popular items were exposed more, so more of them is left."""

    keep: float = Field(1.0, gt=0, le=1)
    """Expected share of the training events that is kept; 1 keeps all, the ranker is then not biased."""
    exponent: float = Field(1.0, ge=0, le=10)
    """An event is kept with a probability proportional to its item's training count to this power, at most 1."""

    @property
    def on(self) -> bool:
        """Whether anything is left out."""
        return self.keep < 1


class RankerSettings(Settings):
    """The ranker and its training."""

    kind: RankerKind = RankerKind.SASREC
    """sasrec, cooccurrence or popularity."""
    sasrec: SASRecSettings = SASRecSettings()
    """Used with kind sasrec."""
    cooccurrence: CooccurrenceSettings = CooccurrenceSettings()
    """Used with kind cooccurrence."""
    bias: RankerBiasSettings = RankerBiasSettings()
    """Subsampling of the training log by popularity, for a biased reward model (AdaGRPO)."""
