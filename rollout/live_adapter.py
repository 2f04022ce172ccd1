"""An adapter that travels by itself: which tensors it is, and what an engine must know before the first push.

The factors of every adapted matrix travel under PEFT's names, and the trained rows of the embedding (and of a head of
its own) under the name of their matrix behind `ROWS`. All of one version travel in one push. The engine keeps the
initial model and applies the factors beside its matrices, so only rows that are replaced touch the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pydantic import Field

from data.settings import Settings

FACTORS: Final = "base_model.model."
"""What the names of factors begin with."""
ROWS: Final = "rows/"
"""What the names of rows begin with."""


class LiveAdapter(Settings):
    """The shape of the adapter that learners push by itself; a job sets it (learner.lora.push)."""

    rank: int = Field(0, ge=0)
    """Rank of the factors; 0 without such an adapter."""
    alpha: int = Field(1, ge=1)
    """The product of the factors is scaled by alpha / rank."""
    first_row: int = Field(0, ge=0)
    """First of the trained rows, which are neighbours."""
    rows: int = Field(0, ge=0)
    """How many there are."""

    @property
    def on(self) -> bool:
        """Whether the engine gets such an adapter."""
        return self.rank > 0


def is_adapter(names: Iterable[str]) -> bool:
    """Whether the tensors of a push are an adapter and not a whole model."""
    return all(name.startswith((FACTORS, ROWS)) for name in names)
