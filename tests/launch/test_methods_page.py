"""Contract: every file, key, recipe and test that docs/methods.md names is there, and every switch of the objective is
on the page.

Not checked here: that the formulas are right; the tests that the page names check them.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from launch.configuration_page import job_entries
from launch.provenance import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
QUOTED = re.findall(r"`([^`]+)`", PAGE)


@functools.cache
def functions(path: Path) -> set[str]:
    """Names of the functions of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_files_and_tests_exist() -> None:
    named = [word for word in QUOTED if re.fullmatch(r"[\w/]+\.py(::\w+)?", word)]
    assert len(named) > 40
    for word in named:
        file, _, test = word.partition("::")
        assert (ROOT / file).is_file(), word
        assert not test or test in functions(ROOT / file), word


def test_keys_exist_and_no_switch_of_the_objective_is_missing() -> None:
    keys = set(job_entries())
    named = {word for word in QUOTED if re.fullmatch(r"(objective|group|reward|rollout)\.[a-z_.]+", word)}
    assert named <= keys, named - keys
    switches = {key for key in keys if key.startswith(("objective.", "group."))}
    assert switches <= named, switches - named


def test_recipes_exist() -> None:
    sentences = re.findall(r"Recipes? (`[^.:]+`)[.:]", PAGE)
    recipes = [name for sentence in sentences for name in re.findall(r"`([^`]+)`", sentence)]
    assert len(recipes) > 15
    for name in recipes:
        assert (ROOT / "launch" / "recipes" / f"{name}.yaml").is_file(), name
