"""`windlass data forget`: take a user's rows out of a dataset, a feedback log and a registry."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import model_validator

from data.dataset import Dataset
from data.errors import RequestError
from data.forgetting import Forgotten, finish_interrupted, forget_in_dataset, forget_in_log, user_number
from data.settings import Settings
from launch.continual.forgetting import ForgettingRegistry
from launch.continual.lock import writing
from launch.continual.log_folder import LogFolder


class ForgetCommand(Settings):
    """Arguments of the command."""

    user: tyro.conf.Positional[str]
    """The user's key in the source of the dataset; without a dataset the user's number in the log."""
    dataset: Path | None = None
    """Dataset folder; its fingerprint changes."""
    log: Path | None = None
    """Feedback log, a local folder."""
    registry: Path | None = None
    """Registry whose waiting rows are searched and whose journal follows the log."""

    @model_validator(mode="after")
    def _somewhere(self) -> ForgetCommand:
        if self.dataset is None and self.log is None and self.registry is None:
            raise RequestError("forget", "neither --dataset, --log nor --registry", "where to look")
        return self


def forget_command(arguments: Annotated[ForgetCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Take a user's rows out of a dataset, a feedback log and the rows that wait in a registry.

    Models that were trained on them do not change; the registry keeps which ones there were.
    """
    dataset = None
    if arguments.dataset is not None:
        finish_interrupted(arguments.dataset)
        dataset = Dataset.open(arguments.dataset)
    if arguments.log is not None and not arguments.log.is_dir():
        raise RequestError("--log", arguments.log, "a local folder")
    user = user_number(dataset, arguments.user)
    forgotten = Forgotten()
    with contextlib.ExitStack() as stack:
        registry = None
        if arguments.registry is not None:
            registry = ForgettingRegistry(arguments.registry)
            stack.enter_context(writing(arguments.registry))
            registry.check()
        if arguments.log is not None:
            log = LogFolder(str(arguments.log))
            known = {} if registry is None else registry.known(log)
            changed = forget_in_log(arguments.log, user, forgotten)
            if registry is not None:
                registry.follow(log, changed, known)
        if registry is not None:
            registry.forget_rows(user, forgotten)
            registry.record(user, forgotten, at=time.time())
        # Last: it tells the number of the key, which a second try needs.
        if dataset is not None:
            forget_in_dataset(dataset, user, forgotten)
    print(f"user {user}: " + (", ".join(f"{n:,} {where}" for where, n in forgotten.rows.items() if n) or "no rows"))
    return {"user_id": user, "rows": forgotten.rows}
