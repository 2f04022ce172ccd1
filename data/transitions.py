"""Sessions as an offline decision process: state (the items so far), action (the next), reward, next state, done.

A session is a user's events in the order of time, cut into training, validation and test within the user. A transition
is an event with at least one before it: the state is all earlier items of the user, the next state has the action too,
and the last training event ends its session. Validation and test rows are the same kind of thing, read as samples.

Source: methods.md section 5, "Data". Suffixes: `_E` event, `_N` transition or row, `_I` item.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from data.dataset import Dataset, Samples, Sequences
from data.errors import RequestError
from data.records import BoolArray, FloatArray, IntArray, LongArray
from data.session_settings import RewardKind, SessionSettings
from data.split import user_ends, user_starts
from data.user_attributes import user_attribute

PARTS = ("train", "valid", "test")
_USER_STREAM = 31


class SessionCount(StrEnum):
    """Which users and events are used, and why others are not; keys of `Sessions.counts`."""

    USERS = "users"
    """Users whose sessions are used."""
    SHORT_SESSION = "short_session"
    """Users of a single event, who make no transition; left out."""
    FEW_RATINGS = "few_ratings"
    """Users with fewer events than min_ratings; left out."""
    NOT_DRAWN = "not_drawn"
    """Users that qualify and were not drawn."""
    SKEWED_AWAY = "skewed_away"
    """Drawn users that training leaves out for their attribute; their rows are evaluated."""
    TRANSITIONS = "transitions"
    """Transitions that are trained on."""


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Training transitions; the state of one is `item_E[start_N:event_N]`, its action `item_E[event_N]`."""

    event_N: LongArray
    """Row of the action among the dataset's events; it keys the reference's answers."""
    start_N: LongArray
    """First event of the user."""
    reward_N: FloatArray
    """In [0, 1]."""
    done_N: BoolArray

    def __len__(self) -> int:
        return len(self.event_N)


@dataclass(frozen=True, kw_only=True)
class SessionRows:
    """Rows of an evaluated part."""

    samples: Samples
    reward_N: FloatArray
    """Reward of each target."""
    event_N: LongArray
    trained_N: BoolArray
    """Whether training saw sessions of the row's user."""


class Sessions:
    """The sessions of a dataset that a job learns from and is evaluated on."""

    def __init__(self, dataset: Dataset, settings: SessionSettings) -> None:
        """Draw the users.

        Raises:
            RequestError: no session, too few users, ratings that are missing or outside their scale, or an attribute
                or value that no user has.
        """
        self.dataset = dataset
        self.settings = settings
        self.item_E: IntArray = dataset.events.item_E
        user_E = dataset.events.user_E
        begin = np.flatnonzero(np.arange(len(user_E)) == user_starts(user_E))
        end = user_ends(user_E)[begin] if len(begin) else begin
        size = end - begin
        short, few = size < 2, (size >= 2) & (size < settings.min_ratings)
        qualified = np.flatnonzero(~short & ~few)
        wanted = len(qualified) if settings.users is None else settings.users
        if not len(qualified) or len(qualified) < wanted:
            found = f"{len(qualified)} users have {settings.min_ratings} events or more"
            found += f" ({int(short.sum())} have a single one)" if short.any() else ""
            legal = "a lower min_ratings" if not len(qualified) else f"at most {len(qualified)}, or a lower min_ratings"
            raise RequestError("data.users", found if not len(qualified) else f"{wanted}, but {found}", legal)
        random = np.random.default_rng([settings.user_seed, _USER_STREAM])
        chosen = np.sort(random.choice(qualified, size=wanted, replace=False))
        self.begin_U, self.end_U = begin[chosen].astype(np.int64), end[chosen].astype(np.int64)
        self.user_U: IntArray = user_E[self.begin_U]
        self.trained_U = self._trained()
        self.counts: dict[str, int] = {
            SessionCount.USERS.value: wanted,
            SessionCount.SHORT_SESSION.value: int(short.sum()),
            SessionCount.FEW_RATINGS.value: int(few.sum()),
            SessionCount.NOT_DRAWN.value: len(qualified) - wanted,
            SessionCount.SKEWED_AWAY.value: int((~self.trained_U).sum()),
            SessionCount.TRANSITIONS.value: len(self.transitions),
        }

    def _trained(self) -> BoolArray:
        settings = self.settings
        if not settings.skew_attribute:
            return np.ones(len(self.user_U), np.bool_)
        every = user_attribute(self.dataset, settings.skew_attribute, settings.user_attributes)
        own = [every[user] for user in self.user_U]
        trained: BoolArray = np.array([value == settings.skew_value for value in own], np.bool_)
        if not trained.any():
            values = sorted({value for value in own if value is not None})
            raise RequestError(
                "data.skew_value", settings.skew_value, f"one that a drawn user has: {', '.join(values)}"
            )
        return trained

    @cached_property
    def _bounds(self) -> LongArray:
        """[U, 4] first event of each part of each user, and the end."""
        shares = np.cumsum(self.settings.split) / sum(self.settings.split)
        size_U = self.end_U - self.begin_U
        inner = self.begin_U[:, None] + np.floor(size_U[:, None] * shares[None, :2] + 0.5).astype(np.int64)
        # The last event is a test row wherever two are left to train: one is the state, the other the action.
        inner = np.minimum(inner, self.end_U[:, None] - 1)
        inner = np.maximum(inner, self.begin_U[:, None] + 2)
        return np.concatenate([self.begin_U[:, None], np.minimum(inner, self.end_U[:, None]), self.end_U[:, None]], 1)

    @cached_property
    def reward_E(self) -> FloatArray:
        """[E] reward of each event of the chosen users, NaN elsewhere.

        Raises:
            RequestError: a rating that is missing or outside the scale.
        """
        reward_E = np.full(len(self.item_E), np.nan, np.float32)
        chosen = np.concatenate([np.arange(b, e) for b, e in zip(self.begin_U, self.end_U, strict=True)])
        if self.settings.reward is RewardKind.IMPLICIT:
            reward_E[chosen] = 1.0
            return reward_E
        low, high = self.settings.rating_scale
        rating = self.dataset.rating_E[chosen]
        bad = np.flatnonzero(~((rating >= low) & (rating <= high)))
        if len(bad):
            event = int(chosen[bad[0]])
            found = f"{rating[bad[0]]:g}" if np.isfinite(rating[bad[0]]) else "no rating"
            where = f"user {int(self.dataset.events.user_E[event])}, item {int(self.item_E[event])}"
            legal = f"{low:g} to {high:g} (data.rating_scale), or data.reward implicit"
            raise RequestError("rating", f"{found} of {where} ({len(bad)} of {len(chosen)} events)", legal)
        reward_E[chosen] = (rating - low) / (high - low)
        return reward_E

    @cached_property
    def transitions(self) -> Transitions:
        """What is trained on, user by user in the order of time."""
        bounds = self._bounds[self.trained_U]
        event = np.concatenate([np.arange(begin + 1, end) for begin, end in bounds[:, :2]])
        start = np.repeat(bounds[:, 0], bounds[:, 1] - bounds[:, 0] - 1)
        return Transitions(
            event_N=event.astype(np.int64),
            start_N=start.astype(np.int64),
            reward_N=self.reward_E[event],
            done_N=np.isin(event, bounds[:, 1] - 1),
        )

    def rows(self, part: str) -> SessionRows:
        """The rows of "valid" or "test", of every drawn user, session by session.

        Raises:
            RequestError: the part has no rows.
        """
        number = PARTS.index(part)
        bounds = self._bounds
        sizes = bounds[:, number + 1] - bounds[:, number]
        event = np.concatenate([np.arange(b, e) for b, e in bounds[:, number : number + 2]]).astype(np.int64)
        if not len(event):
            raise RequestError("data.split", f"{list(self.settings.split)} leaves no {part} rows", "a larger share")
        samples = Samples(
            user_id_N=np.repeat(self.user_U, sizes),
            target_N=self.item_E[event],
            timestamp_N=self.dataset.events.time_E[event],
            sample_id_N=np.arange(len(event), dtype=np.int64),
            values=self.item_E,
            start_N=np.repeat(bounds[:, 0], sizes),
            end_N=event,
        )
        return SessionRows(
            samples=samples,
            reward_N=self.reward_E[event],
            event_N=event,
            trained_N=np.repeat(self.trained_U, sizes),
        )

    def start_of(self, event_N: LongArray) -> LongArray:
        """First event of the user of each event."""
        return self._start_E[event_N]

    @cached_property
    def _start_E(self) -> LongArray:
        return user_starts(self.dataset.events.user_E)

    def train_counts(self) -> LongArray:
        """[I] training events of each item, of all drawn users: a skew changes what is learned, not the tail."""
        begin, end = self._bounds[:, 0], self._bounds[:, 1]
        event = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        return np.bincount(self.item_E[event], minlength=self.dataset.n_items).astype(np.int64)

    def train_sequences(self) -> Sequences:
        """The training parts of all drawn users as sequences."""
        begin, end = self._bounds[:, 0], self._bounds[:, 1]
        return Sequences(
            values=self.item_E,
            start_S=begin,
            end_S=end,
            loss_from_S=np.ones(len(begin), np.int64),
            user_id_S=self.user_U,
        )
