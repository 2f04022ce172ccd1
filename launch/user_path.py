"""The user's folder on the module path, behind everything: their ranker classes can be imported, and nothing of ours
can be shadowed by a `data/` or `trainer.py` that lies there."""

from __future__ import annotations

import importlib
import sys

PACKAGES = ("data", "rollout", "reward", "trainer", "launch")


def append_user_path(folder: str) -> None:
    """Put `folder` last on the module path, after our packages have been found.

    An editable installation finds packages by a hook behind the whole path, so being last is not enough: the
    packages are imported first.
    """
    for name in PACKAGES:
        importlib.import_module(name)
    if folder not in sys.path:
        sys.path.append(folder)
