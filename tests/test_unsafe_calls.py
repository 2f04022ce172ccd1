"""Contract: no source file reads what came from outside by a way that runs code: no pickle, no `torch.load` that is not
`weights_only`, no NumPy pickles, no YAML tags, no eval or exec, no shell; and nothing sets Ray's authentication.

Every file of the five packages is parsed. Exceptions are named here with their reason. Not checked: the libraries
themselves (DeepSpeed's own checkpoints are pickles, so windlass writes the learners' state as safetensors).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from launch.provenance import ROOT
from launch.user_path import PACKAGES

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
ALLOWED = {
    # CUDA IPC handles, made and read by processes of one run on one host, over a socket that only they know.
    ("rollout/ring_movers.py", "import pickle"),
}
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What a file does that it must not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            yield from unsafe_call(node)
        elif isinstance(node, ast.Constant) and node.value == "RAY_AUTH_MODE":
            yield "RAY_AUTH_MODE"


def unsafe_call(node: ast.Call) -> Iterator[str]:
    name = name_of(node.func)
    given = {word.arg: word.value for word in node.keywords}
    safe = given.get("weights_only")
    if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and "allow_pickle" in given:
        yield "np.load with allow_pickle"
    if name in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    if name == "yaml.load" and not any(name_of(argument).endswith("_Loader") for argument in node.args[1:]):
        yield "yaml.load with an unknown loader"
    shell = given.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        yield f"{name} with a shell"


def test_no_file_runs_what_it_reads() -> None:
    assert len(SOURCES) > 300
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for path in SOURCES
        for what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


def test_the_search_finds_them() -> None:
    bad = "import pickle\nfrom joblib import load\ntorch.load(f)\ntorch.load(f, weights_only=False)\neval('1')\n"
    bad += "np.load(f, allow_pickle=True)\nyaml.load(f, yaml.Loader)\nrun(c, shell=True)\nx = 'RAY_AUTH_MODE'\n"
    assert len(list(unsafe(ast.parse(bad)))) == 9
    assert list(unsafe(ast.parse("torch.load(f, weights_only=True)\nyaml.load(f, _Loader)\nrun(c)\n"))) == []
