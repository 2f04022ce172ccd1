"""Sections of the configuration that say which data a job reads and what a prompt shows."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from data.settings import Settings


class InteractionSettings(Settings):
    """Which interactions a job reads."""

    dataset: Path
    """Folder that `windlass data import` wrote (it holds dataset.json)."""
    history: int = Field(50, ge=1, le=10_000)
    """Items of the history a prompt (or a ranker) sees, the latest ones."""
    exclude_seen: bool = True
    """Never recommend an item of the user's whole history; applied in the constraint, for every method alike."""


class PromptSettings(InteractionSettings):
    """Which interactions, and how they become prompts."""

    codes: str = Field("default", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the semantic IDs: codes/NAME.parquet in the dataset folder (written by `windlass data ids`)."""
    max_prompt_tokens: int = Field(256, ge=2)
    """Longest prompt; a longer one is kept, shortened from the oldest item, and counted."""


class RolloutDataSettings(PromptSettings):
    """Which interactions an `rl` job takes prompts from."""

    latest_rows: int | None = Field(None, ge=1)
    """Roll out only on the latest so many training rows; none takes all. Recent rows resemble what is asked next."""
