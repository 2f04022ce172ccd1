"""What a user names as `package.module:name`: a ranker class, a stage of the objective."""

from __future__ import annotations

import importlib
from typing import Any

from data.errors import RequestError


def load_by_path(path: str, where: str, legal: str) -> Any:
    """The object at `package.module:name`.

    Args:
        where: the setting that names it.
        legal: what the setting takes.

    Raises:
        RequestError: another form, no such module or name, or a module that cannot be imported.
    """
    module_name, _, name = path.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise RequestError(where, path, legal)
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the module is the user's: its import may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(where, f"{path} ({reason})", legal) from error
