"""Break the stages on purpose, one mutation at a time, and see the pure tests notice: `make mutants`.

Works on copies of the tree, never in place. Every mutation of mutations.yaml is applied alone and its test files run
until the first failure; a mutation that passes them all has survived, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutations.yaml"
TREES = ("data", "rollout", "reward", "trainer", "launch", "tests")
LIMIT_S = 300
_PASSED, _FAILED = 0, 1
"""Exit statuses of pytest."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "numpy", "pytest", "hypothesis", "pydantic", "jaxtyping"])


class Mutation(NamedTuple):
    """One change of the source that a test must notice."""

    name: str
    file: str
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Pure test files, the likeliest first."""


class Outcome(StrEnum):
    """What the tests said of a mutation."""

    KILLED = "killed"
    """A test failed."""
    SURVIVED = "survived"
    """All passed."""
    BROKEN = "broken"
    """No test ran to its end: the mutation is no legal program, or hangs."""


class MutationError(Exception):
    """A mutation that cannot be applied, or tests that fail without one."""


def read_mutations(path: Path = TABLE) -> list[Mutation]:
    """The mutations of a table, in its order."""
    table = yaml.safe_load(path.read_text())
    return [
        Mutation(file=file, tests=tuple(part["tests"]), **mutation)
        for file, part in table.items()
        for mutation in part["mutations"]
    ]


def mutated(text: str, mutation: Mutation) -> str:
    """The text with the mutation.

    Raises:
        MutationError: its old text is not there exactly once.
    """
    count = text.count(mutation.old)
    if count != 1:
        raise MutationError(f"{mutation.name}: its old text occurs {count} times in {mutation.file}, not once")
    return text.replace(mutation.old, mutation.new)


def copied(source: Path, target: Path) -> Path:
    """A copy of the packages and tests, without compiled files, which could hide a mutation."""
    for tree in TREES:
        if (source / tree).is_dir():
            shutil.copytree(source / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "setup.cfg", target)
    return target


def run_tests(tree: Path, files: Iterable[str]) -> tuple[int, str]:
    """Exit status and output of pytest in the tree, up to the first failure; property tests draw the same examples.

    In a fork of a process that has the large libraries loaded already, which halves the time.
    """
    log = tree / "pytest.log"
    process = _FORKS.Process(target=_pytest_in, args=(tree, tuple(files), log))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1, f"no end within {LIMIT_S} s"
    return process.exitcode, log.read_text()


def _pytest_in(tree: Path, files: tuple[str, ...], log: Path) -> NoReturn:
    """In a process of its own: the tree's packages instead of those of this checkout."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name in [name for name in sys.modules if name.split(".")[0] in TREES]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path) != ROOT)]
    sys.dont_write_bytecode = True
    os.chdir(tree)
    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files])))


def outcome(tree: Path, mutation: Mutation) -> Outcome:
    """Apply the mutation in the tree, run its tests, and undo it."""
    path = tree / mutation.file
    original = path.read_text()
    path.write_text(mutated(original, mutation))
    try:
        status, _ = run_tests(tree, mutation.tests)
    finally:
        path.write_text(original)
    return {_PASSED: Outcome.SURVIVED, _FAILED: Outcome.KILLED}.get(status, Outcome.BROKEN)


def chosen(only: Sequence[str]) -> list[Mutation]:
    """The mutations of the given names, or all.

    Raises:
        MutationError: a name that no mutation has, or one that cannot be applied.
    """
    everything = read_mutations()
    unknown = set(only) - {mutation.name for mutation in everything}
    if unknown:
        raise MutationError(f"no mutation is called {', '.join(sorted(unknown))}")
    found = [mutation for mutation in everything if not only or mutation.name in only]
    for mutation in found:
        mutated((ROOT / mutation.file).read_text(), mutation)
    return found


def run(mutations: Sequence[Mutation], jobs: int) -> list[Outcome]:
    """The outcome of every mutation, `jobs` at a time, each in a copy of its own.

    Raises:
        MutationError: the tests fail without any mutation.
    """
    with tempfile.TemporaryDirectory(prefix="windlass-mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            trees.put(copied(ROOT, Path(folder) / str(number)))

        def attempt(mutation: Mutation) -> Outcome:
            tree = trees.get()
            found = outcome(tree, mutation)
            trees.put(tree)
            print(f"{found:8} {mutation.name}", flush=True)
            return found

        status, output = run_tests(Path(folder) / "0", sorted({file for m in mutations for file in m.tests}))
        if status != _PASSED:
            raise MutationError(f"the tests fail without a mutation:\n{output[-2000:]}")
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(attempt, mutations))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutations and print how many were killed; 0 when all were."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="NAME", help="mutations to run (default: all)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="how many at a time")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # the groups are small, and jobs share the cores
    try:
        mutations = chosen(given.only)
        outcomes = run(mutations, max(given.jobs, 1))
    except MutationError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    print(f"mutants: {outcomes.count(Outcome.KILLED)}/{len(outcomes)} killed")
    return int(any(found is not Outcome.KILLED for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
