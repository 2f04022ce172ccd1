"""Scored groups on disk: what `--rollout-only` writes and `--train-only` reads, one Parquet file per step.

A row is a group; lists are flat in the order `[G]` or `[G, T]`. The file's metadata holds the format version, the
decoding specification, the constraint and the digest of the catalogue. The columns of scored items are there only
where the engine was asked for some, those of ranked lists only where the groups are lists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import RequestError
from data.records import Decode, DecodeSpec, Groups, ListSpec, Prompt, ScoredGroups
from trainer.durable import sync_file

FORMAT: Final = 1
_METADATA: Final = b"windlass.groups"
_PROMPT_LISTS: Final = ("token_ids", "history", "exclusions")
_PROMPT_SCALARS: Final = {"prompt_id": pa.int64(), "user_id": pa.int64(), "target": pa.int32(), "timestamp": pa.int64()}
_GROUP_ARRAYS: Final = {
    "valid_PG": pa.bool_(),
    "token_PGT": pa.int32(),
    "length_PG": pa.int32(),
    "item_PG": pa.int32(),
    "logp_PGT": pa.float32(),
    "finish_PG": pa.string(),
}
_RANKED_PROMPTS: Final = {
    "need": pa.string(),
    "candidates": pa.list_(pa.int32()),
    "gain_C": pa.list_(pa.float32()),
    "observed_C": pa.list_(pa.bool_()),
}
_RANKED_GROUPS: Final = {"item_PGK": pa.int32(), "segment_PGT": pa.int32()}
_ASKED: Final = "prompt_scored_items"
_ANSWERED: Final = "scored_logp_PMT"


def step_path(folder: Path, step: int) -> Path:
    """File of a step."""
    return folder / f"step-{step:06d}.parquet"


def dumped_steps(folder: Path) -> list[int]:
    """Steps that lie in the folder, in order.

    Raises:
        RequestError: there is none.
    """
    steps = steps_in(folder)
    absent = [step for step in range(1, steps[-1]) if step not in steps] if steps else []
    if absent:
        # A dump is a sequence of steps: training on what is left of one would pass for training on all of it.
        raise RequestError("train_only", f"{folder} holds no {step_path(folder, absent[0]).name}", "a whole dump")
    if not steps:
        raise RequestError("train_only", f"{folder} holds no step-*.parquet", "a folder that --rollout-only wrote")
    return steps


def steps_in(folder: Path) -> list[int]:
    """Steps that lie in a folder, in order; none where there is no folder."""
    names = [path.stem.removeprefix("step-") for path in folder.glob("step-*.parquet")]
    return sorted(int(name) for name in names if name.isdecimal())


def write_step(folder: Path, step: int, prompts: Sequence[Prompt], scored: ScoredGroups) -> None:
    """Write one step; the file appears under its name when it is complete."""
    groups = scored.groups
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(prompt, name) for prompt in prompts], kind) for name, kind in _PROMPT_SCALARS.items()
    }
    for name in _PROMPT_LISTS:
        columns[f"prompt_{name}"] = pa.array([getattr(prompt, name) for prompt in prompts], pa.list_(pa.int32()))
    for name, kind in _GROUP_ARRAYS.items():
        columns[name] = _flat_lists(getattr(groups, name), kind)
    scored_items = 0
    if groups.scored_logp_PMT is not None:
        scored_items = groups.scored_logp_PMT.shape[1]
        columns[_ASKED] = pa.array([prompt.scored_items for prompt in prompts], pa.list_(pa.int32()))
        columns[_ANSWERED] = _flat_lists(groups.scored_logp_PMT, pa.float32())
    if groups.spec.lists is not None:
        columns |= {
            f"prompt_{name}": pa.array([getattr(prompt, name) for prompt in prompts], kind)
            for name, kind in _RANKED_PROMPTS.items()
        }
        columns |= {name: _flat_lists(getattr(groups, name), kind) for name, kind in _RANKED_GROUPS.items()}
    columns["weight_version_P"] = pa.array(groups.weight_version_P)
    columns["engine_id_P"] = pa.array(groups.engine_id_P.astype(str).tolist(), pa.string())
    columns["failure_P"] = pa.array(scored.failure_P.astype(str).tolist(), pa.string())
    columns["reward_PG"] = _flat_lists(scored.reward_PG, pa.float32())
    for name, part in scored.parts_PG.items():
        columns[f"part_{name}"] = _flat_lists(part, pa.float32())
    head = {
        "format": FORMAT,
        "step": step,
        "shape": groups.shape,
        "scored_items": scored_items,
        "spec": dataclasses.asdict(groups.spec),
        "constraint": groups.constraint,
        "catalogue_digest": groups.catalogue_digest,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    temporary = path.with_suffix(".tmp")
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(head)})
    pq.write_table(table, temporary, compression="zstd")
    sync_file(temporary)
    temporary.rename(path)
    sync_file(folder)


def read_step(folder: Path, step: int, catalogue_digest: str) -> tuple[list[Prompt], ScoredGroups]:
    """Read one step.

    Raises:
        RequestError: not such a file, another format version, or groups of another catalogue.
    """
    path = step_path(folder, step)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RequestError("train_only", f"{path}: {error}", "a file that --rollout-only wrote") from error
    try:
        return _parse(path, table, catalogue_digest)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise RequestError(str(path), f"is damaged ({error!r})", "a file that --rollout-only wrote") from error


def _parse(path: Path, table: pa.Table, catalogue_digest: str) -> tuple[list[Prompt], ScoredGroups]:
    head = _head(path, table)
    if head["catalogue_digest"] != catalogue_digest:
        raise RequestError(
            str(path), f"catalogue {head['catalogue_digest'][:12]}", f"{catalogue_digest[:12]}, that of the model"
        )
    _check_types(path, table)
    prompts = [_prompt(row) for row in table.select(_prompt_columns()).to_pylist()]
    size, members, tokens = head["shape"]
    shapes = {2: (size, members), 3: (size, members, tokens)}
    arrays = {
        name: _from_lists(table[name], shapes[3 if name.endswith("T") else 2], kind)
        for name, kind in _GROUP_ARRAYS.items()
    }
    spec = dict(head["spec"])
    if spec.get("lists") is not None:
        spec["lists"] = ListSpec(**spec["lists"])
        ranked = table.select([f"prompt_{name}" for name in _RANKED_PROMPTS]).to_pylist()
        prompts = [_ranked(prompt, row) for prompt, row in zip(prompts, ranked, strict=True)]
        arrays["segment_PGT"] = _from_lists(table["segment_PGT"], shapes[3], _RANKED_GROUPS["segment_PGT"])
        whole = (size, members, spec["lists"].width)
        arrays["item_PGK"] = _from_lists(table["item_PGK"], whole, _RANKED_GROUPS["item_PGK"])
    if _ANSWERED in table.column_names:
        arrays[_ANSWERED] = _scored(table[_ANSWERED], size, head["scored_items"])
        asked = table[_ASKED].to_pylist()
        prompts = [
            dataclasses.replace(prompt, scored_items=tuple(items)) for prompt, items in zip(prompts, asked, strict=True)
        ]
    groups = Groups(
        prompt_id_P=table["prompt_id"].to_numpy(),
        weight_version_P=table["weight_version_P"].to_numpy(),
        engine_id_P=np.array(table["engine_id_P"].to_pylist(), dtype=str),
        spec=DecodeSpec(**{**spec, "decode": Decode(spec["decode"])}),
        constraint=head["constraint"],
        catalogue_digest=head["catalogue_digest"],
        **arrays,
    )
    parts = [name for name in table.column_names if name.startswith("part_")]
    scored = ScoredGroups(
        groups=groups,
        reward_PG=_from_lists(table["reward_PG"], shapes[2], pa.float32()),
        failure_P=np.array(table["failure_P"].to_pylist(), dtype=str),
        parts_PG={name.removeprefix("part_"): _from_lists(table[name], shapes[2], pa.float32()) for name in parts},
    )
    return prompts, scored


def _head(path: Path, table: pa.Table) -> dict[str, Any]:
    raw = (table.schema.metadata or {}).get(_METADATA)
    head: Any = json.loads(raw) if raw is not None else {}
    if not isinstance(head, dict):
        raise RequestError(str(path), "no description of the groups", "a file that --rollout-only wrote")
    if head.get("format") != FORMAT:
        raise RequestError(str(path), f"format {head.get('format', 'unknown')}", f"format {FORMAT} of a dump of groups")
    return head


def _check_types(path: Path, table: pa.Table) -> None:
    wanted: dict[str, pa.DataType] = dict(_PROMPT_SCALARS)
    wanted |= {f"prompt_{name}": pa.list_(pa.int32()) for name in _PROMPT_LISTS}
    wanted |= {name: pa.list_(kind) for name, kind in _GROUP_ARRAYS.items()}
    wanted |= {"reward_PG": pa.list_(pa.float32()), "failure_P": pa.string()}
    for name, kind in wanted.items():
        found = table.schema.field(name).type if name in table.column_names else "no such column"
        if found != kind:
            raise RequestError(f"{path}: column {name}", str(found), str(kind))


def _prompt_columns() -> list[str]:
    return [*_PROMPT_SCALARS, *(f"prompt_{name}" for name in _PROMPT_LISTS)]


def _prompt(row: dict[str, Any]) -> Prompt:
    lists: dict[str, Any] = {name: np.asarray(row[f"prompt_{name}"], dtype=np.int32) for name in _PROMPT_LISTS}
    return Prompt(**{name: row[name] for name in _PROMPT_SCALARS}, **lists)


def _ranked(prompt: Prompt, row: dict[str, Any]) -> Prompt:
    """The prompt with what it asks a list of."""
    return dataclasses.replace(
        prompt,
        need=row["prompt_need"],
        candidates=np.asarray(row["prompt_candidates"], dtype=np.int32),
        gain_C=np.asarray(row["prompt_gain_C"], dtype=np.float32),
        observed_C=np.asarray(row["prompt_observed_C"], dtype=bool),
    )


def _flat_lists(array: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    width = int(np.prod(array.shape[1:]))
    offsets = np.arange(len(array) + 1, dtype=np.int32) * width
    flat = array.reshape(-1)
    values = pa.array(flat.astype(str).tolist() if kind == pa.string() else flat, kind)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _scored(column: pa.ChunkedArray, prompts: int, items: int) -> Any:
    """`Groups.scored_logp_PMT`, whose tokens are those of the catalogue's longest item, not those of the groups."""
    tokens = len(column[0]) // max(items, 1) if prompts else 0
    return _from_lists(column, (prompts, items, tokens), pa.float32())


def _from_lists(column: pa.ChunkedArray, shape: tuple[int, ...], kind: pa.DataType) -> Any:
    values = column.combine_chunks().flatten()
    flat = np.array(values.to_pylist(), dtype=str) if kind == pa.string() else values.to_numpy(zero_copy_only=False)
    return flat.reshape(shape)
