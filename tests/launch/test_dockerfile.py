"""Contract: the Dockerfile for GPU nodes is one that a builder takes, copies only what is there and what .dockerignore
lets through, pins what it installs, holds no secret, and does not run as root.

A lint of our own rules. Where Docker with buildx and a daemon are here, its own checks run as well (`docker build
--check`). The image itself is not built here: its base and its 7 GB of packages are not at hand.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.provenance import ROOT
from launch.submission.environment import SOUNDS_SECRET
from launch.user_path import PACKAGES

KNOWN = {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in DOCKERFILE if instruction == name]


def test_every_instruction_is_known_and_the_base_is_pinned() -> None:
    assert {instruction for instruction, _ in DOCKERFILE} == KNOWN
    assert DOCKERFILE[0][0] == "FROM"
    (base,) = arguments_of("FROM")
    assert re.fullmatch(r"[a-z/.-]+:3\.11\.\d+[\w.-]*", base), "the Python of the lock, to the patch"


def test_what_is_copied_is_there_and_goes_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*", "nothing goes along that is not named"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    sources = [source for arguments in arguments_of("COPY") for source in arguments.split()[:-1]]
    assert set(sources) == let_through
    for source in sources:
        assert (ROOT / source).exists(), source
    assert set(PACKAGES) <= set(sources)


def test_what_is_installed_is_pinned_and_leaves_nothing_behind() -> None:
    for command in arguments_of("RUN"):
        for part in (each.strip() for each in command.split("&&")):
            if "apt-get install" in part:
                assert "--no-install-recommends" in part
                assert "rm -rf /var/lib/apt/lists/*" in command
            if "pip install" in part:
                assert "--no-cache-dir" in part
                assert "--no-deps" in part, "the lock names every package"
                assert "--require-hashes -r requirements/cuda.lock" in part or part.endswith("-e .")
        assert not re.search(r"curl|wget [^\\]*http|--trusted-host|--index-url", command)


def test_no_secret_and_no_root() -> None:
    for arguments in arguments_of("ENV"):
        for name in re.findall(r"(\w+)=", arguments):
            assert not SOUNDS_SECRET.search(name), name
    assert arguments_of("USER")[-1] not in ("root", "0")
    last = [instruction for instruction, _ in DOCKERFILE]
    assert "RUN" not in last[last.index("USER") :]


@pytest.mark.long
def test_docker_has_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("docker") is None:
        pytest.skip("needs docker")
    if subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker with buildx")
    done = subprocess.run(
        ["docker", "build", "--check", str(ROOT)], capture_output=True, text=True, timeout=120, check=False
    )
    if "Cannot connect to the Docker daemon" in done.stderr or "failed to resolve" in done.stderr:
        pytest.skip("needs a Docker daemon that reaches a registry")
    assert done.returncode == 0, done.stdout + done.stderr
