"""`windlass recommend`: recommendations for many contexts at once, Parquet to Parquet, with Ray Data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import tyro
import xxhash
from pydantic import Field

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.parquet import READ_ERRORS, first_line
from data.records import NO_ITEM
from launch.cluster import cluster
from launch.serving.exposure import ExposureSettings, Serving, has_legal_item, propensity_kind, show
from launch.serving.served import ItemIndex, prompt_of, serving_engines
from launch.simulate_command import policy_version
from rollout.engine import build_engine
from rollout.settings import RolloutSettings
from trainer.checkpoints import open_model
from trainer.durable import sync_tree
from trainer.initial_model import CATALOGUE, check_model
from trainer.prompt_card import PromptCard
from trainer.run_settings import ClusterSettings

OWN: Final = ("items", "keys", "scores", "logp0", "propensity_kind", "policy_version", "decode", "unknown_items")
"""Columns that are added; those of the contexts stay."""


class RecommendCommand(ExposureSettings):
    """Arguments of `windlass recommend`."""

    checkpoint: tyro.conf.Positional[Path]
    """The policy: a run folder (its best checkpoint), a checkpoint, an hf folder, or REGISTRY/current."""
    contexts: Path
    """Parquet file or folder with `history` (a list of item ids, or of keys as text), and optionally `request_id` and
    `exclude` (a list like `history`)."""
    out: Path
    """Folder of Parquet files, made by this command; it appears when all is done."""
    k: int = Field(10, ge=1, le=1024)
    """Items of each context."""
    batch: int = Field(128, ge=1)
    """Contexts per call of an engine."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines; `--rollout.engines` of them work side by side."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""


def recommend_command(
    arguments: Annotated[RecommendCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Recommend for every context of a Parquet file; its rows come back, in any order, with what is shown for each."""
    engines = serving_engines(arguments.rollout, arguments, width=max(arguments.beams, arguments.k))
    hf_dir = open_model(arguments.checkpoint).resolve()
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    check_model(hf_dir, catalogue.vocabulary.size)
    if arguments.beams > catalogue.n_items:
        raise RequestError("--beams", arguments.beams, f"at most {catalogue.n_items}, the items of the catalogue")
    rows = check_contexts(arguments.contexts)
    if arguments.out.exists():
        raise RequestError("--out", f"{arguments.out} is there already", "a folder that is not there yet")
    version = policy_version(hf_dir)
    partial = arguments.out.absolute().with_name(f".{arguments.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with cluster(arguments.cluster):
        write(arguments, engines, hf_dir, version, partial)
    answered = pads.dataset(partial, format="parquet")
    if answered.count_rows() != rows:
        raise RunError(f"{partial}: {answered.count_rows()} rows of {rows} contexts; {arguments.out} was not made")
    sync_tree(partial)
    partial.rename(arguments.out)
    shown = answered_counts(arguments.out)
    print(f"{arguments.out}: {rows:,} contexts, {shown['empty']:,} without a legal item; policy {version}")
    return {"path": str(arguments.out), "rows": rows, "policy_version": version, "checkpoint": str(hf_dir), **shown}


def check_contexts(path: Path) -> int:
    """The number of contexts.

    Raises:
        RequestError: not Parquet, no rows, no history, or columns that this command adds.
    """
    try:
        dataset = pads.dataset(path, format="parquet")
        rows = int(dataset.count_rows())
    except READ_ERRORS as error:
        raise RequestError("--contexts", f"{path} ({first_line(error)})", "Parquet with a column history") from error
    for name in ("history", "exclude"):
        present = name in dataset.schema.names
        kind = dataset.schema.field(name).type if present else None
        if (present or name == "history") and not is_item_list(kind):
            raise RequestError(f"--contexts: {name}", str(kind or "no such column"), "a list of integers or text")
    taken = sorted(set(OWN) & set(dataset.schema.names))
    if taken:
        raise RequestError("--contexts", f"columns {', '.join(taken)}", f"none of {', '.join(OWN)}")
    if not rows:
        raise RequestError("--contexts", f"{path} has no rows", "at least one context")
    return rows


def is_item_list(kind: pa.DataType | None) -> bool:
    """Whether a column holds lists of item ids or keys."""
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return bool(pa.types.is_integer(kind.value_type) or pa.types.is_string(kind.value_type))


def write(arguments: RecommendCommand, engines: RolloutSettings, hf_dir: Path, version: str, partial: Path) -> None:
    """Read, recommend and write, as a stream through the cluster.

    Raises:
        RunError: an engine failed.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A wrong context is wrong every time.
    context.max_errored_blocks = 0
    exposure = ExposureSettings(**arguments.model_dump(include=set(ExposureSettings.model_fields)))
    variables = engines.process_environment()
    answers = ray.data.read_parquet(str(arguments.contexts.resolve())).map_batches(
        Recommender,
        fn_constructor_args=(engines, hf_dir, exposure, version, arguments.k, arguments.seed),
        batch_size=arguments.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=engines.engines),
        num_cpus=1,
        num_gpus=engines.gpus or None,
        runtime_env={"env_vars": variables},
    )
    try:
        answers.write_parquet(str(partial))
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunError(f"an engine failed: {lines[-1].strip()}; {arguments.out} was not made") from error


class Recommender:
    """One engine in an actor of Ray Data."""

    def __init__(
        self, engines: RolloutSettings, hf_dir: Path, exposure: ExposureSettings, version: str, items: int, seed: int
    ) -> None:
        self._engine = build_engine(engines, hf_dir)
        self._catalogue = Catalogue.load(hf_dir / CATALOGUE)
        self._index = ItemIndex(self._catalogue)
        self._builder = PromptCard.read(hf_dir).builder(self._catalogue, hf_dir)
        self._exposure = exposure
        self._version = version
        self._items = min(items, self._catalogue.n_items)
        self._seed = seed

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with what is shown for each."""
        history = table["history"].to_pylist()
        exclude = table["exclude"].to_pylist() if "exclude" in table.column_names else [None] * len(table)
        contexts = [self._index.context(row or (), out or ()) for row, out in zip(history, exclude, strict=True)]
        keys = prompt_keys(table)
        prompts = [prompt_of(self._builder, one, int(key)) for one, key in zip(contexts, keys.tolist(), strict=True)]
        legal = [place for place, prompt in enumerate(prompts) if has_legal_item(prompt, self._catalogue)]
        empty: list[Any] = [[] for _ in prompts]
        items, scores, logp0, decode = list(empty), list(empty), list(empty), [None] * len(prompts)
        if legal:
            shown = show(
                self._engine, [prompts[place] for place in legal], self._exposure, seed=self._seed, items=self._items
            )
            for row, place in enumerate(legal):
                filled = shown.item_PK[row] != NO_ITEM
                items[place] = shown.item_PK[row][filled].tolist()
                scores[place] = shown.logp_PK[row][filled].tolist()
                logp0[place] = shown.logp0_PK[row][filled].tolist()
                decode[place] = shown.decode_P[row]
        rows = len(table)
        if self._exposure.serve is Serving.BEAM:
            logp0 = [None] * rows
        columns = {
            "items": pa.array(items, pa.list_(pa.int32())),
            "keys": pa.array([[self._catalogue.item_keys[i] for i in row] for row in items], pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float32())),
            "logp0": pa.array(logp0, pa.list_(pa.float32())),
            "propensity_kind": pa.array([propensity_kind(self._exposure).value] * rows, pa.string()),
            "policy_version": pa.array([self._version] * rows, pa.string()),
            "decode": pa.array(decode, pa.string()),
            "unknown_items": pa.array([one.unknown for one in contexts], pa.int32()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table


def prompt_keys(table: pa.Table) -> npt.NDArray[np.uint32]:
    """[rows] what the draws of each context are keyed by: its request id where there is one, else its content.

    So that an answer depends neither on the batch nor on the engine nor on the file it came from.
    """
    names = [name for name in ("user_id", "history", "exclude") if name in table.column_names]
    chosen = table.select(["request_id"] if "request_id" in table.column_names else names).to_pylist()
    return np.array([xxhash.xxh32_intdigest(repr(sorted(row.items())).encode()) for row in chosen], np.uint32)


def answered_counts(folder: Path) -> dict[str, int]:
    """Counts over the answers: items shown, contexts without any, items that nobody knows."""
    counts = {"items": 0, "empty": 0, "unknown_items": 0}
    for batch in pads.dataset(folder, format="parquet").to_batches(columns=["items", "unknown_items"]):
        length = pc.list_value_length(batch.column("items"))
        counts["items"] += int(pc.sum(length).as_py() or 0)
        counts["empty"] += int(pc.sum(pc.equal(length, 0)).as_py() or 0)
        counts["unknown_items"] += int(pc.sum(batch.column("unknown_items")).as_py() or 0)
    return counts
