"""Contract: exit codes and one-line errors of the command line; `--json`; the start needs neither torch nor Ray.

Not checked here: the bodies of the commands, which have their own tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from data.errors import RequestError, RunError
from launch import cli, commands


def _answer(path: Annotated[str, tyro.conf.Positional], /, count: int = 1) -> dict[str, Any]:
    """Answer something.

    Args:
        path: a path.
        count: how many.
    """
    sys.stdout.write("words for a person\n")
    if path == "wrong":
        raise RequestError("path", path, "right")
    if path == "fails":
        raise RunError("the engine\ndied")
    return {"path": path, "count": count}


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        commands.COMMANDS, "answer", commands.Command(target=f"{__name__}:_answer", summary="answers", answers=True)
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def test_answers_go_to_a_file_or_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["answer", "x", "--count", "3", "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "x", "count": 3}
    assert capsys.readouterr().out == "words for a person\n"
    assert cli.run(["answer", "x", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "x", "count": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["answer", "wrong"], 2, "path: wrong; legal: right"),
        (["answer", "fails"], 1, "the engine died"),
        (["answer"], 2, "a path. (required)"),
        (["answer", "x", "--cuont", "3"], 2, "--cuont"),
        (["answer", "x", "--count", "many"], 2, "many"),
        (["answer", "x", "--json"], 2, "--json FILE"),
        (["answer", "x", "--json", "/no/such/folder/a.json"], 2, "a writable file"),
        (["answe"], 2, "did you mean answer"),
        (["data", "imprt"], 2, "did you mean data import"),
        (
            ["train", "ml100k-sft", "--data.dataset", "/nowhere"],
            2,
            "data.dataset: /nowhere; legal: a folder written by",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_misspelt_fault_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WINDLASS_FAULT", "rolout:1")
    assert cli.run(["answer", "x"]) == 2
    assert "WINDLASS_FAULT: rolout:1; legal: POINT:N" in capsys.readouterr().err


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_answer", lambda path: 1 / 0)
    monkeypatch.setattr(cli, "parse_and_call", lambda name, command, function, arguments: function("x"))
    with pytest.raises(ZeroDivisionError):
        cli.run(["answer", "x"])


def test_help_is_fast_because_it_imports_little() -> None:
    code = (
        "import sys, launch.cli; launch.cli.run(['--help']);"
        "heavy = {'torch', 'ray', 'vllm', 'pydantic', 'tyro', 'numpy'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "windlass COMMAND --help" in done.stdout


def test_train_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "ml100k-rl", "--print-config", "--seed", "7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_every_command_leads_to_a_function() -> None:
    """The table names bodies that exist; files of other commands may be checked only where they are."""
    for name, command in commands.COMMANDS.items():
        module = command.target.partition(":")[0].replace(".", "/") + ".py"
        if (Path(cli.__file__).parents[1] / module).is_file():
            assert callable(cli.load(name, command)), name
