"""From a recipe and overrides to a checked job.

A recipe is YAML: a name (launch/recipes/NAME.yaml) or a path. `--a.b VALUE` overrides are merged into it as YAML
values before anything is checked, so that a recipe and a command line meet the same checks and get the same one-line
errors: the field's full name, the value found, and what is legal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from data.dataset import Dataset
from data.errors import RequestError
from data.settings import Settings
from data.text_settings import ItemForm
from data.text_tokenizer import PACKAGED
from launch.setting_names import Key, field_at, is_section, keys, kind, near_misses
from reward.artefact import DESCRIPTION, RankerArtefact
from reward.service import check_port, check_service
from trainer.checkpoints import model_folder
from trainer.critic_job import check_critic
from trainer.group_dump import dumped_steps
from trainer.jobs import JOBS, PRESETS, BaseJob, CriticJob, Job, LaacJob, PolicyJobSettings, RlJob
from trainer.laac_settings import ReferenceKind
from trainer.language_model import is_pretrained, language_path
from trainer.trackers import check_trackers

RECIPES = Path(__file__).parent / "recipes"
OVERRIDE = re.compile(r"--([A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*)(?:=(.*))?", re.DOTALL)

SettingsT = TypeVar("SettingsT", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML where `1e-4` is a number and a key given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no plain word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-4 as text because it has no dot; people write learning rates that way.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def recipe_names() -> list[str]:
    """Names of the recipes that come with windlass."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        RequestError: there is none; near misses are named.
    """
    if name_or_path in recipe_names():
        return RECIPES / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = near_misses(name_or_path, recipe_names())
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise RequestError(
        "recipe", f"{name_or_path!r} is neither a recipe nor a file", f"{', '.join(recipe_names())}, or a path{hint}"
    )


def recipe_header(path: Path) -> str:
    """The comment a recipe opens with, as one paragraph."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RequestError: not UTF-8, not YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error), "a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise RequestError(str(path), f"byte {error.start} is not UTF-8", "a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        raise RequestError(str(path), one_line(str(error)), "a YAML mapping") from error
    except RecursionError as error:
        raise RequestError(str(path), "nested too deeply", "a YAML mapping of sections") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(str(path), f"holds {type(content).__name__}", "a YAML mapping of sections")
    try:
        json.dumps(content, default=str, skipkeys=True)
    except ValueError as error:
        raise RequestError(str(path), "a section that holds itself", "a YAML mapping of sections") from error
    return content


def load_job(name_or_path: str, overrides: Sequence[str] = ()) -> Job:
    """The checked job of a recipe with `--a.b VALUE` overrides.

    Raises:
        RequestError: anything that is wrong with either, the first problem found.
    """
    content = read_recipe(recipe_path(name_or_path))
    return job_from(content, overrides)


def job_from(content: Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """The checked job of a mapping (a recipe, or a run's config.yaml) with overrides."""
    pairs = parse_overrides(overrides)
    kinds = [value for path, value in pairs if path == ["job"]]
    model = job_model(kinds[-1] if kinds else content.get("job"))
    merged = merge(content, pairs, model)
    job: Job = _absolute(validate(model, merged))  # type: ignore[assignment]
    return job


def job_model(name: object) -> type[BaseJob]:
    """The class of a job by the name of its kind."""
    if not isinstance(name, str) or name not in JOBS:
        raise RequestError("job", "missing" if name is None else repr(name), f"one of {', '.join(JOBS)}")
    return JOBS[name]


def parse_overrides(arguments: Sequence[str]) -> list[tuple[list[str], str]]:
    """(path, text) of each `--a.b VALUE` or `--a.b=VALUE`; hyphens in names count as underscores."""
    pairs: list[tuple[list[str], str]] = []
    position = 0
    while position < len(arguments):
        match = OVERRIDE.fullmatch(arguments[position])
        if match is None:
            raise RequestError("arguments", repr(arguments[position]), "--section.key VALUE")
        name, text = match.group(1).replace("-", "_"), match.group(2)
        if text is None:
            position += 1
            if position == len(arguments):
                raise RequestError(name, "no value", f"--{name} VALUE")
            text = arguments[position]
        pairs.append((name.split("."), text))
        position += 1
    return pairs


def merge(content: Mapping[str, Any], pairs: Sequence[tuple[list[str], str]], model: type[BaseModel]) -> dict[str, Any]:
    """A copy of `content` with the overrides in it; their texts are read as YAML unless the field is text."""
    merged: dict[str, Any] = json.loads(json.dumps(dict(content), default=str))
    for path, text in pairs:
        section = merged
        for depth, part in enumerate(path[:-1]):
            below = section.setdefault(part, {})
            if not isinstance(below, dict):
                raise RequestError(".".join(path), text, f"{'.'.join(path[: depth + 1])} is no section")
            section = below
        section[path[-1]] = _override_value(path, text, model)
    return merged


def _override_value(path: list[str], text: str, model: type[BaseModel]) -> Any:
    field = field_at(model, path)
    words = kind(field) if field is not None else ""
    if words.endswith(", or null") and text in ("null", "none", "None", "~"):
        return None
    if re.match(r"(text|path|one of)\b", words):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RequestError(".".join(path), repr(text), words or "a YAML value") from error


def validate(model: type[SettingsT], content: Mapping[str, Any]) -> SettingsT:
    """An instance of `model`, with strict types: "1" is no number and 1 is no truth value.

    Raises:
        RequestError: the first problem, by full name.
    """
    try:
        # JSON is the strict mode in which text is still an enum member or a path and a list a tuple.
        return TypeAdapter(model).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise request_error(error, model) from error


def request_error(error: ValidationError, model: type[BaseModel]) -> RequestError:
    """The first problem of a validation error, as one line for the user; how many more there are."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    # Tags that pydantic adds for members of a union are no part of the name the user wrote.
    path = [str(part) for part in problem["loc"] if not re.match(r"(function-|tuple|list\[|union)", str(part))]
    where = ".".join(path) or model.__name__
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    field = field_at(model, path)
    if field is None and path[-1:] and path[-1].isdecimal() and problem["type"] != "extra_forbidden":
        # A member of a list: the list says what its members are.
        field = field_at(model, path[:-1])
    legal = kind(field) if field is not None else _without_prefix(str(problem["msg"]))
    found: str = "missing" if problem["type"] == "missing" else _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        found, legal = "unknown key", _unknown_key(where, path, model)
    elif problem["type"] in ("value_error", "assertion_error"):
        told, _, said = _without_prefix(str(problem["msg"])).partition("; legal: ")
        found, legal = told, said or legal
    elif problem["type"] in ("model_type", "model_attributes_type"):
        legal = legal if legal.startswith("section") else "a section"
    return RequestError(where, found, legal + more)


def _unknown_key(where: str, path: list[str], model: type[BaseModel]) -> str:
    known = [key.name for key in keys(model)]
    near = near_misses(where, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    parent = field_at(model, path[:-1]) if len(path) > 1 else None
    section = parent.annotation if parent is not None and is_section(parent.annotation) else model
    return "keys here are " + ", ".join(section.model_fields)  # type: ignore[union-attr]


def _without_prefix(message: str) -> str:
    return re.sub(r"^(Value|Assertion) error, ", "", one_line(message))


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def _absolute(settings: SettingsT) -> SettingsT:
    """Paths made absolute: workers have another current directory, and a resumed run may too."""
    update: dict[str, object] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            update[name] = _absolute(value)
        elif isinstance(value, Path):
            update[name] = value.expanduser().resolve()
    if isinstance(settings, PolicyJobSettings) and settings.init not in (*PRESETS, *PACKAGED):
        update["init"] = str(Path(settings.init).expanduser().resolve())
    return settings.model_copy(update=update)


def check_paths(job: Job) -> None:
    """Refuse folders that the job names and that are not there, before anything is started.

    Raises:
        RequestError: no dataset, no such codes, or no model where `init` points.
    """
    dataset = job.data.dataset
    if not (dataset / "dataset.json").is_file():
        raise RequestError("data.dataset", dataset, "a folder written by `windlass data import` (with dataset.json)")
    check_trackers(job.tracking)
    if isinstance(job, LaacJob):
        check_reference(job)
    if not isinstance(job, PolicyJobSettings | CriticJob):
        return
    codes = dataset / "codes" / f"{job.data.codes}.parquet"
    titled = isinstance(job, PolicyJobSettings) and job.text.items is ItemForm.TITLES
    if not codes.is_file() and not titled:
        there = sorted(path.stem for path in codes.parent.glob("*.parquet") if path.is_file())
        legal = ", ".join(there) if there else "none is there yet; write one with `windlass data ids`"
        raise RequestError("data.codes", job.data.codes, legal)
    if isinstance(job, CriticJob):
        return
    if job.init not in PRESETS and not (job.text.on and is_pretrained(language_path(job.init))):
        try:
            model_folder(Path(job.init))
        except RequestError as error:
            if error.where != "model":
                raise
            raise RequestError("init", job.init, f"{', '.join(PRESETS)}, or {error.legal}") from error
    if isinstance(job, RlJob):
        check_rl_paths(job)


def check_reference(job: LaacJob) -> None:
    """Refuse a reference that cannot answer.

    Raises:
        RequestError: no model where one is named, or neither a model nor a written cache.
    """
    reference = job.laac.reference
    if reference.kind is not ReferenceKind.LLM or not job.laac.method.asks:
        return
    if reference.model is not None:
        model_folder(reference.model)
    elif reference.cache is None or not reference.cache.is_file():
        legal = "a run, checkpoint or hf folder, laac.reference.cache of a written cache, or laac.reference.kind random"
        raise RequestError("laac.reference.model", "none", legal)


def check_rl_paths(job: RlJob) -> None:
    """Refuse what an `rl` job would only meet after its engines are up.

    Raises:
        RequestError: a ranker, a dump or a folder that is not there or not usable.
    """
    check_service(job.reward)
    if job.cluster.address is None and job.reward.ranker is not None and job.reward.port:
        # In a cluster that is up, Ray Serve may rightly be there already.
        check_port(job.reward.host, job.reward.port)
    check_ranker_data(job)
    if job.train_only is not None:
        dumped_steps(job.train_only)
    target = job.rollout_only
    if target is not None and target.exists() and not target.is_dir():
        raise RequestError("rollout_only", target, "a folder, made when it is missing")


def check_ranker_data(job: RlJob) -> None:
    """Refuse a ranker that was trained on other items: the same numbers would mean other things.

    Raises:
        RequestError: the artefact tells another dataset than the job's, or is a critic that a job of lists may not ask.
    """
    if job.reward.ranker is None or not (Path(job.reward.ranker) / DESCRIPTION).is_file():
        return
    artefact = RankerArtefact.open(Path(job.reward.ranker))
    if job.lists.on:
        check_critic(artefact, job.lists)
    told = artefact.provenance.get("dataset")
    own = Dataset.open(job.data.dataset).fingerprint
    if told is not None and told != own:
        raise RequestError(
            "reward.ranker",
            f"{job.reward.ranker} was trained on the dataset {told}",
            f"a ranker of {job.data.dataset}, {own}",
        )


def to_mapping(settings: Settings) -> dict[str, Any]:
    """The settings as plain YAML values, every key written out."""
    dumped: dict[str, Any] = settings.model_dump(mode="json")
    return dumped


def to_yaml(settings: Settings) -> str:
    """The resolved configuration as it is kept in config.yaml."""
    return yaml.safe_dump(to_mapping(settings), sort_keys=False, allow_unicode=True)


def default_words(key: Key) -> str:
    """The default of a key as one would write it."""
    value = key.default
    plain = [_plain(member) for member in value] if isinstance(value, tuple | list) else _plain(value)
    return json.dumps(plain, default=str) if not isinstance(plain, str) else plain or '""'


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value.value if isinstance(value, Enum) else value
