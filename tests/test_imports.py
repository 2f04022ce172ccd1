"""Imports point one way: launch → trainer → {rollout, reward} → data.

Checks every import statement of every file of the five packages by parsing it; does not see imports by name at run
time (`importlib`).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "data": set(),
    "rollout": {"data"},
    "reward": {"data"},
    "trainer": {"data", "rollout", "reward"},
    "launch": {"data", "rollout", "reward", "trainer"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level names of all absolute imports in `source`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_follow_the_arrow(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package} | {"tests"}
    wrong = {str(f.relative_to(ROOT)): found for f in files if (found := imported_packages(f.read_text()) & forbidden)}
    assert not wrong


def test_an_import_against_the_arrow_is_seen() -> None:
    assert imported_packages("def f():\n    from trainer.loop import run\n") == {"trainer"}
