"""Contract: every file, key, recipe and test that docs/methods.md names is there, and every switch of the objective and
every metric of a stage is on the page.

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


def test_every_metric_of_a_stage_is_on_the_page() -> None:
    literals = {
        word
        for file in {word for word in QUOTED if re.fullmatch(r"trainer/\w+\.py", word)}
        for word in metric_names(ROOT / file)
    }
    assert {"gate/open", "anchor/effective_size", "window/mass/N", "advantage/sum", "refill/extra_prompts"} <= literals
    on_the_page = set(QUOTED)
    parts_of_a_run = ("policy_gap/", "tokens/", "loss/", "staleness/", "queue/")
    elsewhere = {name for name in literals if name.startswith(parts_of_a_run)}
    elsewhere |= {"weight_version/oldest", "completion/absent_share", "time/ahead/N"}
    assert literals - elsewhere <= on_the_page, literals - elsewhere - on_the_page


def metric_names(path: Path) -> set[str]:
    """Literal `group/name` strings of a file; what an f-string fills in is an N."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else "N" for part in parts]
        if all(isinstance(text, str) for text in texts):
            found.add("".join(map(str, texts)))
    return {name for name in found if re.fullmatch(r"[a-z_]+(/[a-z_N]+)+", name)}
