"""`windlass data ids`: semantic IDs for the items of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import Field

from data.code_building import IdSettings, build_codes
from data.codes import codes_path
from data.dataset import Dataset


class IdsCommand(IdSettings):
    """Arguments of the command."""

    dataset: Path
    """Folder that `windlass data import` wrote."""
    name: str = Field("default", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the codes: they are written to codes/NAME.parquet in the dataset folder."""


def ids_command(
    arguments: Annotated[IdsCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Make the semantic IDs of a dataset, or say what the existing ones of that name are like.

    Codes are never made anew under a name that is taken: a model knows items by their codes.
    """
    dataset = Dataset.open(arguments.dataset)
    settings = IdSettings(**arguments.model_dump(include=set(IdSettings.model_fields)))
    codes, existed = build_codes(dataset, arguments.name, settings)
    path = codes_path(dataset.path, arguments.name)
    lengths = np.diff(codes.start)
    answer = {
        "path": str(path),
        "existed": existed,
        "items": codes.n_items,
        "paths": codes.distinct_paths(),
        "tokens_per_item": [int(lengths.min()), int(lengths.max())],
        "level_sizes": list(codes.level_sizes),
        "on_collision": codes.on_collision.value,
        "provenance": codes.provenance,
    }
    verb = "exist with these settings" if existed else "written"
    print(f"{path}: {verb}; {answer['items']} items on {answer['paths']} paths, level sizes {answer['level_sizes']}")
    for key in ("colliding_items", "moved_items", "without_text", "without_cooccurrence", "distortion"):
        if key in codes.provenance:
            print(f"  {key.replace('_', ' ')}: {codes.provenance[key]}")
    return answer
