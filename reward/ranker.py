"""The ranker interface, and how a ranker is named: an artefact folder, a .onnx file, or a class by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from data.errors import RequestError
from data.import_path import load_by_path
from data.records import FloatArray, IntArray
from reward.artefact import RankerArtefact

Option = str | int | float | bool


@runtime_checkable
class Ranker(Protocol):
    """Scores items as the next one after a history; larger is better, the scale is the ranker's own."""

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> Sequence[FloatArray]:
        """Scores of `candidates[i]` after `histories[i]` (item ids, oldest first, possibly none).

        Returns one array per sample, as long as its candidates. Must be a function of its arguments alone.
        """
        ...


@runtime_checkable
class CatalogueRanker(Ranker, Protocol):
    """A ranker that knows its catalogue and scores all of it faster than item by item."""

    n_items: int

    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """Scores `[B, n_items]` of every item after each history."""
        ...


@runtime_checkable
class UncertainRanker(Ranker, Protocol):
    """A ranker that knows how sure it is of its scores."""

    def score_with_variance(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray]
    ) -> tuple[Sequence[FloatArray], Sequence[FloatArray]]:
        """What `score` returns, and the variance of each score: finite and above 0."""
        ...


@runtime_checkable
class NeedRanker(UncertainRanker, Protocol):
    """An uncertain ranker whose scores depend on what the list is for."""

    needs: tuple[str, ...]
    """Names of the needs that it knows."""

    def score_for_needs(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str]
    ) -> tuple[Sequence[FloatArray], Sequence[FloatArray]]:
        """`score_with_variance`, each sample for a need of its own."""
        ...


def load_ranker(source: Path | str, options: Mapping[str, Option] | None = None) -> Ranker:
    """Load a ranker by its name.

    Args:
        source: an artefact folder, a `.onnx` file, or `package.module:Class`.
        options: keyword arguments of the class, or of `OnnxRanker` for a `.onnx` file; of artefacts only a critic
            takes one: `need`, which its scores are for.

    Raises:
        RequestError: nothing of that name, a damaged artefact, or a class that is no ranker.
    """
    name = str(source)
    path = Path(source)
    if path.is_dir():
        return open_ranker(RankerArtefact.open(path), options)
    if path.suffix == ".onnx":
        from reward.onnx_ranker import OnnxRanker

        keywords: dict[str, Any] = dict(options or {})
        return OnnxRanker.from_file(path, **keywords)
    if ":" in name:
        return _from_import_path(name, options or {})
    raise RequestError("ranker", name, "an artefact folder, a .onnx file, or package.module:Class")


def open_ranker(artefact: RankerArtefact, options: Mapping[str, Option] | None = None) -> Ranker:
    """The ranker of an opened artefact; `options` as in `load_ranker`.

    Raises:
        RequestError: an unknown kind, tensors that do not fit it, or options that it does not take.
    """
    from reward.cooccurrence import CooccurrenceRanker
    from reward.critic import CriticRanker
    from reward.laac import LaacRanker
    from reward.popularity import PopularityRanker
    from reward.sasrec import SASRecRanker

    given = dict(options or {})
    need = given.pop("need", None) if artefact.kind == "critic" else None
    if given or not isinstance(need, str | None):
        raise RequestError(
            "ranker_options", dict(options or {}), f"none for the artefact {artefact.folder}: it holds its own"
        )
    kinds: dict[str, Callable[[RankerArtefact], Ranker]] = {
        "critic": lambda opened: CriticRanker.from_artefact(opened, need),
        "laac": LaacRanker.from_artefact,
        "sasrec": SASRecRanker.from_artefact,
        "cooccurrence": CooccurrenceRanker.from_artefact,
        "popularity": PopularityRanker.from_artefact,
    }
    if artefact.kind not in kinds:
        raise RequestError(f"{artefact.folder}: kind", artefact.kind, " | ".join(kinds))
    try:
        return kinds[artefact.kind](artefact)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(str(artefact.folder), f"does not fit its kind ({reason})", "an intact artefact") from error


def check_ranker(source: Path | str, options: Mapping[str, Option] | None = None) -> None:
    """Refuse a ranker that cannot be loaded, without running a foreign constructor.

    Raises:
        RequestError: as `load_ranker`.
    """
    if ":" in str(source) and not Path(source).is_dir() and Path(source).suffix != ".onnx":
        _ranker_class(str(source), options or {})
    else:
        load_ranker(source, options)


def _from_import_path(name: str, options: Mapping[str, Option]) -> Ranker:
    return _ranker_class(name, options)(**options)


def _ranker_class(name: str, options: Mapping[str, Option]) -> type[Ranker]:
    class_: Any = load_by_path(name, "ranker", "package.module:Class of a class with score(histories, candidates)")
    if not inspect.isclass(class_):
        raise RequestError("ranker", f"{name} is no class", "a class with score(histories, candidates)")
    if not issubclass(class_, Ranker):
        raise RequestError("ranker", name, "a class with score(histories, candidates)")
    try:
        inspect.signature(class_).bind(**options)
    except TypeError as error:
        raise RequestError("ranker_options", dict(options), f"keyword arguments of {name} ({error})") from error
    return class_
