"""One version of the registry at work: its engines, its catalogue, and the prompts as it was trained on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.prompts import PromptBuilder
from data.records import Decode, DecodeSpec, Groups, IntArray, Prompt
from launch.continual.registry import Registry
from launch.serving.exposure import ExposureSettings, Serving
from rollout.engine_calls import EngineFailure
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.initial_model import CATALOGUE, check_model
from trainer.prompt_card import PromptCard


@dataclass(frozen=True, kw_only=True)
class Context:
    """Who is recommended to."""

    history: IntArray
    """Known items, oldest first; whole, because it decides which items are excluded."""
    excluded: IntArray
    """Further items that may not be shown."""
    unknown: int
    """Items that the catalogue does not have; they were left out."""


class ItemIndex:
    """Item ids by key."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._items = catalogue.n_items
        self._by_key = {key: item for item, key in enumerate(catalogue.item_keys)}

    def find(self, item: int | str) -> int | None:
        """The id of an item given by id or key; None where there is none."""
        if isinstance(item, str):
            return self._by_key.get(item)
        return item if 0 <= item < self._items else None

    def context(self, history: Sequence[int | str], excluded: Sequence[int | str] = ()) -> Context:
        """A context of items given by id or key."""
        found = [self.find(item) for item in history]
        out = [self.find(item) for item in excluded]
        return Context(
            history=np.array([item for item in found if item is not None], np.int32),
            excluded=np.unique(np.array([item for item in out if item is not None], np.int32)),
            unknown=found.count(None) + out.count(None),
        )


def prompt_of(builder: PromptBuilder, context: Context, prompt_id: int) -> Prompt:
    """The prompt of a context."""
    prompt, _ = builder.prompt(context.history, prompt_id)
    if not len(context.excluded):
        return prompt
    return dataclasses.replace(prompt, exclusions=np.union1d(prompt.exclusions, context.excluded).astype(np.int32))


def hides_more(prompt: Prompt, context: Context, exclude_seen: bool) -> bool:
    """Whether items were excluded that a reader of the log cannot know of from the history."""
    known = np.unique(context.history) if exclude_seen else np.zeros(0, np.int32)
    return len(prompt.exclusions) > len(known)


def serving_engines(rollout: RolloutSettings, exposure: ExposureSettings, *, width: int) -> RolloutSettings:
    """The engines as the serving needs them.

    Args:
        rollout: as given by the user, who tells only where to decode.
        exposure: how it is decoded.
        width: most beams or draws of a prompt.

    Raises:
        RequestError: a decoding key of `rollout` that another argument tells.
    """
    named = {"decode": "serve", "width": "beams", "temperature": "temperature"}
    for key, instead in named.items():
        if getattr(rollout, key) != RolloutSettings.model_fields[key].default:
            found = getattr(rollout, key)
            raise RequestError(f"--rollout.{key}", found, f"--{instead}; rollout tells only where to decode")
    decode = Decode.SAMPLE if exposure.serve is Serving.SAMPLE else Decode.BEAM
    return rollout.model_copy(update={"decode": decode, "width": width, "temperature": exposure.temperature})


class ServedVersion:
    """A version with running engines."""

    def __init__(self, number: int, name: str, catalogue: Catalogue, builder: PromptBuilder, fleet: RolloutFleet):
        self.number = number
        self.name = name
        """What rows of the log call it."""
        self.catalogue = catalogue
        self.builder = builder
        self._fleet = fleet

    @staticmethod
    def start(registry: Registry, number: int, rollout: RolloutSettings) -> ServedVersion:
        """Verify the files of a version, start engines with it and let them answer once.

        Raises:
            RequestError: no such version, or not as it was written, or settings that it cannot meet.
            RunError: engines that do not come up or answer wrongly.
        """
        version = registry.verify(number)
        catalogue = Catalogue.load(version.path / CATALOGUE)
        check_model(version.path, catalogue.vocabulary.size)
        builder = PromptCard.read(version.path).builder(catalogue, version.path)
        fleet = RolloutFleet.start(rollout, version.path, catalogue)
        served = ServedVersion(number, version.name, catalogue, builder, fleet)
        try:
            served.try_out()
        except BaseException:
            served.close()
            raise
        return served

    @cached_property
    def index(self) -> ItemIndex:
        """Item ids by key."""
        return ItemIndex(self.catalogue)

    def try_out(self) -> None:
        """Ask for one item of nobody.

        Raises:
            RunError: the answer has another catalogue, or is not legal.
        """
        prompt, _ = self.builder.prompt(np.zeros(0, np.int32))
        groups = self._fleet.generate([prompt], DecodeSpec(decode=Decode.BEAM, width=1))
        violations = sum(self._fleet.violations.values())
        if groups.catalogue_digest != self.catalogue.digest or violations or not groups.valid_PG.all():
            raise RunError(f"version {self.name} answered wrongly: {violations} items that are not legal")

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Complete the prompts; an engine that failed is started again, once, and asked again.

        Raises:
            EngineFailure: it failed again.
            RunError: an item that is not legal.
        """
        before = sum(self._fleet.violations.values())
        try:
            groups = self._fleet.generate(prompts, spec)
        except EngineFailure as failure:
            self._fleet.restart(failure.engine_id)
            groups = self._fleet.generate(prompts, spec)
        if sum(self._fleet.violations.values()) > before:
            raise RunError(f"version {self.name} generated items that are not legal; nothing of it was answered")
        return groups

    def describe(self) -> dict[str, str | int]:
        """What generates."""
        return self._fleet.describe()

    def close(self) -> None:
        """End the engines."""
        self._fleet.close()


def current_number(registry: Registry) -> int:
    """The number of the served version.

    Raises:
        RequestError: nothing is served yet.
    """
    promotions = registry.promotions()
    if not promotions:
        raise RequestError(str(registry.root), "serves no version", "a registry with a promoted version")
    return promotions[-1].version


def open_registry(root: Path) -> Registry:
    """A registry for reading, and that it serves something."""
    registry = Registry(root)
    current_number(registry)
    return registry
