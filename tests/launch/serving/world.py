"""A registry with two versions of a tiny model, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from data.catalogue import Catalogue
from launch.continual.cycle import begin_registry
from launch.continual.registry import Registry
from tests.tiny_model import tiny_catalogue, write_tiny_model
from trainer.prompt_card import PromptCard

ITEMS = 60


def write_model(folder: Path, catalogue: Catalogue, seed: int) -> Path:
    """A model that can be served."""
    model = write_tiny_model(folder, catalogue, seed=seed, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=32).write(model)
    return model


def make_registry(folder: Path) -> Registry:
    """Version 1 is served, version 2 waits: another model, with an item retired."""
    catalogue = tiny_catalogue(items=ITEMS)
    registry = Registry(folder / "registry", create=True)
    begin_registry(registry, write_model(folder / "first", catalogue, 0), at=0.0)
    registry.add(2, write_model(folder / "second", catalogue.retire([0]), 1), {"parent": 1})
    return registry
