"""What a submitted job gets as environment variables, and that no secret is written down on the way.

A variable whose name sounds like a secret may only be named, with `--secret`; its value reaches the job by other means
(the nodes, Slurm's copy of the submitter's environment, a Kubernetes Secret).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from data.errors import RequestError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SOUNDS_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)", re.IGNORECASE
)
SHORTEST_SECRET = 8
"""Shorter values are too common to be searched for in a command line."""
PASSED_ON = ("WINDLASS_FAULT", "HF_HUB_OFFLINE", "DS_ACCELERATOR")
"""Variables that a job gets without being asked when the submitter has them."""


def plain_variables(asked: Sequence[str]) -> dict[str, str]:
    """Names and values of `--env NAME` and `--env NAME=VALUE`.

    Raises:
        RequestError: no name, a name that sounds like a secret, or NAME alone without a value here.
    """
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for word in asked:
        name, given, value = word.partition("=")
        if not NAME.fullmatch(name):
            raise RequestError("--env", repr(name), "NAME or NAME=VALUE")
        if SOUNDS_SECRET.search(name):
            raise RequestError("--env", f"{name} sounds like a secret", f"--secret {name}")
        if not given and name not in os.environ:
            raise RequestError("--env", f"{name} is not set here", f"{name}=VALUE, or a variable of this environment")
        found[name] = value if given else os.environ[name]
    return found


def secret_names(asked: Sequence[str]) -> list[str]:
    """Names of `--secret NAME`.

    Raises:
        RequestError: anything but a name.
    """
    for name in asked:
        if not NAME.fullmatch(name):
            # The value itself must not come up in an error either.
            raise RequestError("--secret", f"{name.partition('=')[0]!r} and more", "the NAME of a variable, no value")
    return sorted(set(asked))


def refuse_written_secrets(words: Sequence[str], plain: Mapping[str, str], secrets: Sequence[str]) -> None:
    """Refuse a command line or a plain variable that holds the value of a secret of this environment.

    Raises:
        RequestError: names the secret, never its value.
    """
    for name, value in os.environ.items():
        if name not in secrets and not SOUNDS_SECRET.search(name):
            continue
        if len(value) < SHORTEST_SECRET:
            continue
        holders = [f"word {index + 1}" for index, word in enumerate(words) if value in word]
        holders += [f"--env {other}" for other, text in plain.items() if value in text]
        if holders:
            raise RequestError(f"{holders[0]} of the submission", f"holds the value of {name}", f"--secret {name}")
