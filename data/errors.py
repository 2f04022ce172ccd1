"""Errors that a person can mend, told in one line.

`RequestError` is what the command line turns into exit code 2: the request was wrong. `RunError` is a run that
failed after a sound request (exit code 1). Both print as one line without a traceback.
"""

from __future__ import annotations


class WindlassError(Exception):
    """Base of the errors whose message is written for the user."""


class RequestError(WindlassError):
    """The request was wrong: names the field or file, the value found, and what is legal."""

    def __init__(self, where: str, found: object, legal: str) -> None:
        self.where = where
        self.found = found
        self.legal = legal
        super().__init__(where, found, legal)

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; legal: {self.legal}"


class RunError(WindlassError):
    """The run failed; the message says what happened and what is left on disk."""
