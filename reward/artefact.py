"""Ranker artefacts: a folder with `ranker.json` and `weights.safetensors`, never a pickle.

`ranker.json` holds the format version, the kind, the options that rebuild the ranker, where it came from, and the
digest of the weights; `RankerArtefact.open` refuses a folder whose weights are not those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from data.errors import RequestError

FORMAT = 1
DESCRIPTION = "ranker.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class RankerArtefact:
    """What a ranker artefact holds."""

    kind: str
    """`sasrec`, `cooccurrence`, `popularity`, `critic`, `laac` or `onnx`."""
    options: Mapping[str, Any]
    """Plain values that rebuild the ranker around its tensors."""
    tensors: Mapping[str, np.ndarray]
    digest: str
    """Digest of the weights file; identifies the ranker in caches and records."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Dataset fingerprint, training figures and the like; not read by rankers."""
    folder: Path = Path()

    @staticmethod
    def write(
        folder: Path,
        *,
        kind: str,
        options: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        provenance: Mapping[str, Any] | None = None,
    ) -> str:
        """Write an artefact, the description last, and return its digest.

        Both files appear by rename after fsync, so that a folder with a description is whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        blob = save_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()})
        digest = xxhash.xxh3_128_hexdigest(blob)
        description = {
            "format": FORMAT,
            "kind": kind,
            "options": dict(options),
            "digest": digest,
            "provenance": dict(provenance or {}),
        }
        _replace(folder / WEIGHTS, blob)
        _replace(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
        return digest

    @staticmethod
    def open(folder: Path) -> RankerArtefact:
        """Read and check an artefact.

        Raises:
            RequestError: not an artefact, an unknown format version, or weights that do not match the digest.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise RequestError(str(folder), f"no {DESCRIPTION} in it", "a ranker artefact written by `windlass train`")
        try:
            description = json.loads(path.read_bytes())
        except ValueError as error:
            raise RequestError(str(path), f"not JSON ({error})", "an intact ranker artefact") from error
        fields = {"format": int, "kind": str, "options": dict, "digest": str, "provenance": dict}
        if not isinstance(description, dict) or any(
            not isinstance(description.get(name), type_) for name, type_ in fields.items()
        ):
            raise RequestError(str(path), "fields are missing or of a wrong type", f"the fields {', '.join(fields)}")
        if description["format"] != FORMAT:
            raise RequestError(f"{path}: format", description["format"], f"{FORMAT}, the version this windlass reads")
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise RequestError(str(weights), "missing", "the weights that belong to ranker.json")
        blob = weights.read_bytes()
        found = xxhash.xxh3_128_hexdigest(blob)
        if found != description["digest"]:
            raise RequestError(str(weights), f"digest {found}", f"the digest of ranker.json, {description['digest']}")
        try:
            tensors = load_tensors(blob)
        except SafetensorError as error:
            raise RequestError(str(weights), f"not safetensors ({error})", "an intact ranker artefact") from error
        return RankerArtefact(
            kind=description["kind"],
            options=description["options"],
            tensors=tensors,
            digest=found,
            provenance=description["provenance"],
            folder=folder,
        )


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
