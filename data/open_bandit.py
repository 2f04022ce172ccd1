"""The Open Bandit sample as a feedback log: real clicks and true propensities of two policies, without histories.

Each row showed one item of a small campaign at one of three positions. The contexts are hashed user features, so users
are segments: a user id stands for one combination of features. There is nothing to learn a sequence from, which makes
this a contextual bandit, a test of propensity weights more than of policies.

Reads the Parquet sample (bandit.parquet, item_context.parquet), or the tables of the obp wheel (obp/dataset/obd), whose
code is not imported. Source: Saito, Aihara, Matsutani, Narita, Open Bandit Dataset and Pipeline (2020).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from data.errors import RequestError
from data.feedback import FeedbackLog, PropensityKind, single_item_log
from data.parquet import READ_ERRORS, digest_arrays, first_line, open_parquet
from data.records import Decode

PARQUET: Final = "bandit.parquet"
FEATURES: Final = tuple(f"user_feature_{number}" for number in range(4))
COLUMNS: Final = ("timestamp", "position", "action", "click", "propensity", *FEATURES)
WHEEL_NAMES: Final = {"item_id": "action", "propensity_score": "propensity"}
ITEMS: Final = {"all": 80, "men": 34, "women": 46}


class Campaign(StrEnum):
    """Which items were on offer."""

    ALL = "all"
    MEN = "men"
    WOMEN = "women"


class LoggingPolicy(StrEnum):
    """Who chose the items."""

    RANDOM = "random"
    """Evenly at random."""
    BTS = "bts"
    """Bernoulli Thompson sampling."""


@dataclass(frozen=True, kw_only=True)
class BanditLog:
    """A feedback log and the catalogue its items are numbered by."""

    log: FeedbackLog
    n_items: int
    catalogue_digest: str
    """Digest of campaign and number of items, for `FeedbackChecks.catalogues`; there are no titles."""


def open_bandit(folder: Path | None, campaign: Campaign, policy: LoggingPolicy) -> BanditLog:
    """Read one campaign under one policy.

    Items are the campaign's actions, 0 to n - 1. `need` holds the position, which is part of the context. The rows
    carry what the source says; `data.feedback_reading.find_faults` judges them.

    Args:
        folder: with the Parquet sample, or like obp/dataset/obd; none takes the installed obp wheel.
        campaign: items on offer.
        policy: who chose them.

    Raises:
        RequestError: no such data, or columns that are not those of the source.
    """
    root = folder if folder is not None else _wheel_folder()
    table, where = _read(root, campaign, policy)
    for name in COLUMNS:
        if name not in table.column_names or table[name].null_count:
            found = "no such column" if name not in table.column_names else f"{table[name].null_count} nulls"
            raise RequestError(f"{where}: column {name}", found, "the Open Bandit sample")
    if not len(table):
        raise RequestError(str(where), f"no rows of {campaign}/{policy}", "the Open Bandit sample")
    digest = digest_arrays(np.frombuffer(f"open-bandit {campaign} {ITEMS[campaign]}".encode(), np.uint8))
    with np.errstate(divide="ignore", invalid="ignore"):
        logp0_N = np.log(table["propensity"].to_numpy().astype(np.float64)).astype(np.float32)
    rows = len(table)
    log = single_item_log(
        request_id=[f"open-bandit-{campaign}-{policy}-{row}" for row in range(rows)],
        user_id_N=_segments(table),
        timestamp_N=_seconds(table, where),
        history=[np.zeros(0, np.int32)] * rows,
        exposed_N=table["action"].to_numpy().astype(np.int32),
        response_N=table["click"].to_numpy().astype(np.float32),
        logp0_N=logp0_N,
        propensity_kind=PropensityKind.GIVEN,
        policy_version=f"open-bandit-{policy}",
        decode=[Decode.SAMPLE.value] * rows,
        temperature=1.0,
        catalogue_digest=digest,
        need=[f"position {position}" for position in table["position"].to_pylist()],
    )
    return BanditLog(log=log, n_items=ITEMS[campaign], catalogue_digest=digest)


def _wheel_folder() -> Path:
    # Found, not imported: the package pulls in what we do not have.
    spec = importlib.util.find_spec("obp")
    if spec is None or not spec.submodule_search_locations:
        raise RequestError("--path", "missing, and the package obp is not installed", "a folder with bandit.parquet")
    return Path(next(iter(spec.submodule_search_locations))) / "dataset" / "obd"


def _read(root: Path, campaign: Campaign, policy: LoggingPolicy) -> tuple[pa.Table, Path]:
    if (root / PARQUET).is_file():
        return _read_parquet(root / PARQUET, campaign, policy), root / PARQUET
    path = root / policy / campaign / f"{campaign}.csv"
    if not path.is_file():
        raise RequestError(str(root), f"neither {PARQUET} nor {path.relative_to(root)}", "the Open Bandit sample")
    try:
        table = csv.read_csv(path)
    except READ_ERRORS as error:
        raise RequestError(str(path), f"not readable as CSV ({first_line(error)})", "the Open Bandit sample") from error
    return table.rename_columns([WHEEL_NAMES.get(name, name) for name in table.column_names]), path


def _read_parquet(path: Path, campaign: Campaign, policy: LoggingPolicy) -> pa.Table:
    file = open_parquet(path)
    wanted = [*COLUMNS, "campaign", "policy"]
    absent = [name for name in wanted if name not in file.schema_arrow.names]
    if absent:
        raise RequestError(f"{path}: column {absent[0]}", "no such column", "the Open Bandit sample")
    try:
        table = file.read(columns=wanted)
    except READ_ERRORS as error:
        raise RequestError(str(path), f"damaged ({first_line(error)})", "the Open Bandit sample") from error
    chosen = pc.and_(pc.equal(table["campaign"], campaign.value), pc.equal(table["policy"], policy.value))
    return table.filter(chosen)


def _seconds(table: pa.Table, where: Path) -> npt.NDArray[np.int64]:
    """Times in seconds: the Parquet sample has microseconds, the wheel has text that Arrow reads as a time."""
    column = table["timestamp"]
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us")).cast(pa.int64())
    elif pa.types.is_string(column.type):
        try:
            column = pc.cast(column, pa.timestamp("us", tz="UTC")).cast(pa.int64())
        except pa.ArrowException as error:
            raise RequestError(f"{where}: column timestamp", first_line(error), "times with a zone") from error
    return np.asarray(column.to_numpy(), np.int64) // 1_000_000


def _segments(table: pa.Table) -> npt.NDArray[np.int32]:
    """[N] number of each combination of user features, in the order of the combinations."""
    columns = [table[name].cast(pa.string()).to_numpy().astype(str) for name in FEATURES]
    _, segment_N = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return segment_N.reshape(-1).astype(np.int32)
