"""Contract: what README.md and docs/*.md tell is there: links and anchors lead somewhere, every `windlass` command line
is one that the command line accepts, and every error line shown under a `$` is the one that comes.

Not checked here: that the commands do their work; their own tests run them.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import cli, commands
from launch.config import RECIPES
from launch.continual.command import parser, read_continual
from launch.continual.replay_command import read_replay
from launch.provenance import ROOT
from launch.submission.command import read_submission
from launch.submission.plan import make_plan
from launch.train_arguments import resolve, split_arguments

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def command_lines(text: str) -> Iterator[str]:
    """Lines of code that begin with `windlass`, continued ones joined, and such words in backticks in tables."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        match = re.fullmatch(r" {4}(?:[A-Z_]+=\S+ )?(windlass .*)", line)
        if match and "[--" not in line:  # not the usage
            yield match.group(1)
    yield from re.findall(r"\| `(windlass [^`]*)` \|", joined)


def error_lines(text: str) -> Iterator[tuple[str, str]]:
    """(command line, error line) of every `$ windlass …` that is followed by `windlass: …`."""
    yield from re.findall(r"^ {4}\$ (windlass .*)\n {4}(windlass: .*)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page if not file else page.parent / file
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(RECIPES / "ml100k-sft.yaml", tmp_path / "my-recipe.yaml")
    monkeypatch.chdir(tmp_path)
    for line in command_lines(page.read_text()):
        words = shlex.split(line, comments=True)[1:]
        name, rest = cli.split_command(words)
        if not rest or rest == ["--help"]:
            continue
        if name == "train":
            check_train(rest, tmp_path)
        elif name == "continual":
            check_continual(rest)
        elif name == "replay":
            read_replay(rest)
        elif name == "submit":
            check_submit(rest)
        else:
            check_other(name, rest)


def check_train(arguments: list[str], folder: Path) -> None:
    """The arguments of `train` resolve to a job."""
    if "--help" in arguments:
        arguments = [a for a in arguments if a != "--help"] or ["ml100k-sft"]
    recipe, run_dir, _, overrides = split_arguments(arguments)
    if recipe is None:
        assert run_dir is not None
        recipe = Path(run_dir).name
    resolve(recipe, run_dir, overrides)


def check_continual(arguments: list[str]) -> None:
    """The arguments of `continual` give a job and rules."""
    known, overrides = parser().parse_known_args(arguments)
    read_continual(known.recipe, overrides, log=known.log, registry=known.registry)


def check_submit(arguments: list[str]) -> None:
    """The options are accepted, and the plan of the command stands."""
    settings, words, _ = read_submission(arguments)
    if settings is not None:
        make_plan(settings, words)


def check_other(name: str, arguments: list[str]) -> None:
    """tyro takes the arguments; the body is not called."""
    command = commands.COMMANDS[name]
    body = cli.load(name, command)

    @functools.wraps(body)
    def nothing(*positional: Any, **named: Any) -> None:
        return None

    _, arguments = cli.split_json(arguments) if command.answers else (None, arguments)
    cli.parse_and_call(name, command, nothing, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shown_errors_are_the_ones_that_come(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, error in error_lines(page.read_text()):
        assert cli.run(shlex.split(command)[1:]) == 2
        assert capsys.readouterr().err.strip() == error


def test_the_pages_hold_what_this_test_looks_for() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(list(command_lines(text))) > 30
    assert len(list(error_lines(text))) >= 4
