"""Loading a list-wise ranker (`reward.swap_evaluation.ListRanker`) by its import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from data.errors import RequestError
from data.import_path import load_by_path
from reward.ranker import Option
from reward.swap_evaluation import ListRanker

_LEGAL = "package.module:Class of a class with `version` and score_list(histories, lists)"


def load_list_ranker(name: str, options: Mapping[str, Option]) -> ListRanker:
    """An instance of the class of that name.

    Raises:
        RequestError: nothing of that name, no class, one without `score_list`, or options that it does not take.
    """
    ranker: Any = _class(name, options)(**options)
    if not isinstance(getattr(ranker, "version", None), str):
        raise RequestError("reward.list_ranker", f"{name} without a version", _LEGAL)
    found_ranker: ListRanker = ranker
    return found_ranker


def check_list_ranker(name: str, options: Mapping[str, Option]) -> None:
    """Refuse a list-wise ranker that cannot be loaded, without running a foreign constructor.

    Raises:
        RequestError: as `load_list_ranker`, apart from a missing version.
    """
    _class(name, options)


def _class(name: str, options: Mapping[str, Option]) -> Any:
    class_: Any = load_by_path(name, "reward.list_ranker", _LEGAL)
    if not inspect.isclass(class_) or not callable(getattr(class_, "score_list", None)):
        raise RequestError("reward.list_ranker", name, _LEGAL)
    try:
        inspect.signature(class_).bind(**options)
    except TypeError as error:
        found = dict(options)
        raise RequestError("reward.list_ranker_options", found, f"keyword arguments of {name} ({error})") from error
    return class_
