"""Words about settings: full names, types with bounds, near misses. Shared by errors and help."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, kw_only=True)
class Key:
    """One settable value of a configuration."""

    name: str
    """Full dotted name."""
    kind: str
    """Type and bounds in words."""
    default: object
    """Default, or `PydanticUndefined` when it must be given."""
    help: str
    """Docstring of the field."""


def is_section(annotation: Any) -> bool:
    """True for a nested settings class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def keys(model: type[BaseModel], defaults: BaseModel | Mapping[str, Any] | None = None) -> list[Key]:
    """All keys below a model, in order of definition, with the values of `defaults` where it has them."""
    return list(_keys(model, defaults, ""))


def _keys(model: type[BaseModel], defaults: BaseModel | Mapping[str, Any] | None, prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        default = _value(defaults, name, field)
        if is_section(field.annotation):
            assert isinstance(field.annotation, type)
            below = default if isinstance(default, BaseModel | Mapping) else None
            yield from _keys(field.annotation, below, f"{prefix}{name}.")
        else:
            yield Key(name=prefix + name, kind=kind(field), default=default, help=field.description or "")


def _value(defaults: BaseModel | Mapping[str, Any] | None, name: str, field: FieldInfo) -> object:
    if isinstance(defaults, BaseModel):
        return getattr(defaults, name)
    if defaults is not None and name in defaults:
        return defaults[name]
    return field.get_default(call_default_factory=True, validated_data={})


def field_at(model: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    """The field a dotted path leads to, or None when it leads nowhere or into a mapping."""
    section: Any = model
    field: FieldInfo | None = None
    for part in path:
        if not is_section(section) or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        section = field.annotation
    return field


def kind(field: FieldInfo) -> str:
    """Type and bounds of a field in words: `integer from 1 to 64`, `one of sum, mean`, `number above 0, or null`."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        extra = [m for a in arguments[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return _kind(arguments[0], [*metadata, *extra])
    if origin in (Union, types.UnionType):
        words = [_kind(a, metadata) for a in arguments if a is not type(None)]
        return " or ".join(words) + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        return _one_of([str(a) for a in arguments])
    if origin in (list, tuple, Sequence, set, frozenset) or annotation in (list, tuple):
        inner = [a for a in arguments if a is not Ellipsis]
        return "list of " + " or ".join(dict.fromkeys(_kind(a) for a in inner)) if inner else "list"
    if origin in (dict, Mapping):
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _one_of([str(member.value) for member in annotation])
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    if annotation in names:
        return names[annotation] + ("" if annotation is bool else _bounds(metadata))
    if is_section(annotation):
        return "section with " + ", ".join(annotation.model_fields)
    return getattr(annotation, "__name__", str(annotation))


def _one_of(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else "one of " + ", ".join(values)


def _bounds(metadata: Sequence[Any]) -> str:
    words: list[str] = []
    for m in metadata:
        if isinstance(m, annotated_types.Interval):
            words += [w for w in (_bound(part) for part in m) if w]
        else:
            words.append(_bound(m))
    return "".join(f" {w}" for w in words if w)


def _bound(m: object) -> str:
    if isinstance(m, annotated_types.Ge):
        return f"from {m.ge}"
    if isinstance(m, annotated_types.Gt):
        return f"above {m.gt}"
    if isinstance(m, annotated_types.Le):
        return f"to {m.le}"
    if isinstance(m, annotated_types.Lt):
        return f"below {m.lt}"
    if isinstance(m, annotated_types.MultipleOf):
        return f"in multiples of {m.multiple_of}"
    pattern = getattr(m, "pattern", None)
    return f"matching {pattern}" if isinstance(pattern, str) else ""


def near_misses(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Known full names that look like `name`: by the whole, or by the last part."""
    whole = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    last = name.rpartition(".")[2]
    by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
    tails = [by_last[t] for t in difflib.get_close_matches(last, list(by_last), n=count, cutoff=0.6)]
    exact = [k for k in known if k.rpartition(".")[2] == last]
    return list(dict.fromkeys([*exact, *whole, *tails]))[:count]


def must_be_given(value: object) -> bool:
    """True for the default of a field that has none."""
    return value is PydanticUndefined
