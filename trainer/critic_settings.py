"""The `critic` section of a `critic` job: shape and training of the networks."""

from __future__ import annotations

from pydantic import Field

from data.settings import Settings


class CriticSettings(Settings):
    """Shape and training of a critic."""

    width: int = Field(32, ge=2, le=4096)
    """Width of the embeddings."""
    hidden: int = Field(64, ge=2, le=65536)
    """Width of the hidden layers."""
    networks: int = Field(1, ge=1, le=64)
    """Networks of the ensemble; their disagreement adds to the variance."""
    min_variance: float = Field(1e-2, gt=0, le=1)
    """Smallest variance, relative to that of the need's gains: many gains are 0, and a network becomes too sure."""
    lr: float = Field(3e-3, gt=0, le=1)
    """Learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0, le=10)
    """Decoupled weight decay."""
    epochs: int = Field(20, ge=1, le=100_000)
    """Passes over the observed gains, at most."""
    patience: int = Field(3, ge=1, le=100_000)
    """Epochs without a better loss on the validation users after which training ends; the best epoch is kept."""
    batch_rows: int = Field(256, ge=1, le=2**20)
    """Gains per step."""
    validation_share: float = Field(0.1, gt=0, lt=0.5)
    """Share of the critic's users that choose the epoch."""
    calibration_share: float = Field(0.2, gt=0, lt=0.5)
    """Share of the critic's users that calibration is measured on."""
    threads: int = Field(0, ge=0, le=1024)
    """Compute threads; 0 uses every core. Another number changes the weights in the last bits."""
