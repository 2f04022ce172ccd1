"""Needs: what a ranked list is for. A need has a name, an instruction and a gain of
(user, item, time).

Gains are computed for observed events only: what the user did with the item after the time of the prompt. Everything
else a gain looks at (history, activity of items) lies strictly before that time.

Source: methods.md section 3, "Need gains". Suffixes: `_N` (prompt, item) pair, `_P` prompt, `_T` history position, `_I`
item, `_X` label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data.dataset import Dataset
from data.errors import RequestError
from data.import_path import load_by_path
from data.item_activity import ItemActivity
from data.item_labels import ItemLabels
from data.records import BoolArray, IntArray, LongArray
from data.settings import Settings

GainArray = npt.NDArray[np.float64]
HOUR_S: Final = 3600
_NAME: Final = r"^[a-z][a-z0-9_]*$"


class NeedSettings(Settings):
    """A need that lists are ranked for."""

    name: str = Field(min_length=1, max_length=40, pattern=_NAME)
    """Name in metrics and tables."""
    instruction: tuple[Annotated[str, Field(pattern=_NAME)], ...] = ()
    """Words that tell the model of the need, each a token `<need:WORD>`; empty for its name. Several words let a need
    that is held out from training be said in words that training has."""
    gain: str = ""
    """`package.module:function` of (rows, facts) that returns one gain per row; empty for the built-in gain of that
    name (interest, explore, trend, niche, discover)."""
    window_hours: float = Field(168.0, gt=0)
    """Hours before the prompt in which `trend` and `discover` count an item's events."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GainRows:
    """Observed pairs of prompts and items."""

    user_N: IntArray
    item_N: IntArray
    time_N: LongArray
    """Seconds; the time of the prompt, not of the event."""
    rating_N: GainArray
    """Rating of the event; 1 where the source has none."""
    prompt_N: LongArray
    """Row of `history_PT`."""
    history_PT: IntArray
    """Items that each prompt shows, padded with `NO_ITEM`."""
    window_s: int
    """Window of the need, in seconds."""


class ItemFacts:
    """What is known of the items of a dataset; each part is computed when a gain first asks for it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.n_items = dataset.n_items

    @cached_property
    def labels(self) -> ItemLabels:
        """Genres or departments; raises RequestError where the items have neither."""
        return ItemLabels.read(self._dataset.items())

    @cached_property
    def activity(self) -> ItemActivity:
        """Events of the items in time."""
        events = self._dataset.events
        return ItemActivity(events.item_E, events.time_E, self.n_items)


GainFunction = Callable[[GainRows, ItemFacts], GainArray]


def interest(rows: GainRows, facts: ItemFacts) -> GainArray:
    """The rating."""
    return rows.rating_N


def explore(rows: GainRows, facts: ItemFacts) -> GainArray:
    """The rating where the item has a label that no item of the prompt's history has, else 0."""
    label_IX = facts.labels.label_IX
    has_IX = np.concatenate([label_IX, np.zeros((1, label_IX.shape[1]), dtype=bool)])  # the last row is NO_ITEM's
    seen_PX: BoolArray = np.zeros((len(rows.history_PT), label_IX.shape[1]), dtype=bool)
    for item_P in rows.history_PT.T:
        seen_PX |= has_IX[item_P]
    new_N = (label_IX[rows.item_N] & ~seen_PX[rows.prompt_N]).any(1)
    return np.where(new_N, rows.rating_N, 0.0)


def trend(rows: GainRows, facts: ItemFacts) -> GainArray:
    """The rating times the item's events in the window before the prompt, relative to the busiest item's."""
    count_N = facts.activity.within(rows.item_N, rows.time_N, rows.window_s)
    most_N = facts.activity.busiest(rows.time_N, rows.window_s)
    gain_N: GainArray = rows.rating_N * count_N / np.maximum(most_N, 1)
    return gain_N


def discover(rows: GainRows, facts: ItemFacts) -> GainArray:
    """The gain of `trend` where that of `explore` is not 0: what is trending among labels that are new to the user."""
    return np.where(explore(rows, facts) > 0, trend(rows, facts), 0.0)


def niche(rows: GainRows, facts: ItemFacts) -> GainArray:
    """The rating divided by one more than the item's events before the prompt."""
    gain_N: GainArray = rows.rating_N / (1.0 + facts.activity.before(rows.item_N, rows.time_N))
    return gain_N


BUILT_IN: Final[dict[str, GainFunction]] = {
    function.__name__: function for function in (interest, explore, trend, niche, discover)
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """A need with its gain."""

    name: str
    words: tuple[str, ...]
    """Its instruction."""
    function: GainFunction
    window_s: int

    def gains(self, rows: GainRows, facts: ItemFacts) -> GainArray:
        """float64 [N], the gain of each row.

        Raises:
            RequestError: the function fails, or returns another shape, or a gain that is not a finite number from 0.
        """
        where = f"need {self.name}"
        legal = "one finite gain from 0 for every row"
        count = len(rows.item_N)
        gain_N = np.asarray(self.function(rows, facts))
        if gain_N.shape != (count,) or gain_N.dtype.kind not in "biuf":
            raise RequestError(where, f"gains of shape {list(gain_N.shape)} and type {gain_N.dtype}", legal)
        bad_N = ~np.isfinite(gain_N) | (gain_N < 0)
        if bad_N.any():
            row = int(np.flatnonzero(bad_N)[0])
            found = f"gain {gain_N[row]:g} of user {rows.user_N[row]}, item {rows.item_N[row]}"
            raise RequestError(where, f"{found} ({int(bad_N.sum())} of {count} gains)", legal)
        checked_N: GainArray = gain_N.astype(np.float64)
        return checked_N


def load_needs(settings: Sequence[NeedSettings]) -> tuple[Need, ...]:
    """The needs of a configuration, in its order.

    Raises:
        RequestError: no need, a name that occurs twice, or a gain that is not built in and cannot be imported.
    """
    names = [one.name for one in settings]
    if len(set(names)) != len(names) or not names:
        raise RequestError("needs", ", ".join(names) or "none", "at least one, with different names")
    return tuple(_load(one) for one in settings)


def _load(settings: NeedSettings) -> Need:
    where = f"needs: gain of {settings.name}"
    legal = f"{' | '.join(BUILT_IN)}, or a package.module:function of (rows, facts)"
    if not settings.gain:
        if settings.name not in BUILT_IN:
            raise RequestError(where, "none given", legal)
        function = BUILT_IN[settings.name]
    else:
        function = load_by_path(settings.gain, where, legal)
        if not callable(function):
            raise RequestError(where, f"{settings.gain} is no function", legal)
    return Need(
        name=settings.name,
        words=settings.instruction or (settings.name,),
        function=function,
        window_s=max(1, round(settings.window_hours * HOUR_S)),
    )


def instruction_words(needs: Sequence[Need]) -> tuple[str, ...]:
    """The different words of all instructions, in the order in which they first occur."""
    return tuple(dict.fromkeys(word for need in needs for word in need.words))
