"""Which sessions an actor-critic learns from: users, rewards, the split, and whom training leaves out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.settings_data import InteractionSettings


class RewardKind(StrEnum):
    """What the reward of an action is."""

    RATING = "rating"
    """The rating, scaled to [0, 1]."""
    IMPLICIT = "implicit"
    """1 for every event, for data without ratings."""


class SessionSettings(InteractionSettings):
    """Sessions as transitions, split within each user."""

    history: int = Field(10, ge=1, le=10_000)
    """Items of the history a prompt (or a ranker) sees, the latest ones."""
    users: int | None = Field(160, ge=1)
    """Users that are drawn; none takes all that qualify."""
    user_seed: int = Field(1, ge=0)
    """Seed of that draw, apart from the job's, so that runs of several seeds have the same users."""
    min_ratings: int = Field(50, ge=2)
    """Events that a user must have to qualify."""
    reward: RewardKind = RewardKind.RATING
    """rating (scaled by rating_scale) or implicit (1 for every event)."""
    rating_scale: tuple[float, float] = (1.0, 5.0)
    """Lowest and highest rating; they become the rewards 0 and 1."""
    split: tuple[float, float, float] = (8.0, 1.0, 1.0)
    """Shares of each user's events, in the order of time: training, validation, test."""
    skew_attribute: str = ""
    """Attribute of users (gender, for example): training keeps those with skew_value only; none keeps all."""
    skew_value: str = ""
    """Value of skew_attribute that training keeps."""
    user_attributes: Path | None = None
    """Table of user attributes, the user's key first (.user, .tsv, .csv, or MovieLens' users.dat); none takes the one
    that comes with MovieLens-100K."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.rating_scale
        if not low < high:
            raise ValueError(f"rating_scale is {[low, high]}; legal: the lowest rating, then a higher one")
        if min(self.split) < 0 or self.split[0] <= 0 or self.split[2] <= 0:
            raise ValueError(
                f"split is {list(self.split)}; legal: shares above 0 for training and test, 0 or more else"
            )
        if bool(self.skew_attribute) != bool(self.skew_value):
            raise ValueError(
                f"skew_attribute {self.skew_attribute!r} with skew_value {self.skew_value!r}; legal: both, or neither"
            )
        return self
