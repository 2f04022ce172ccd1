"""Arguments of `windlass train`: the recipe, the run directory, overrides, and the help with every key."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import RequestError
from launch.config import (
    check_paths,
    default_words,
    job_from,
    job_model,
    load_job,
    read_recipe,
    recipe_header,
    recipe_names,
    recipe_path,
    to_yaml,
)
from launch.run_directory import RunDirectory
from launch.setting_names import keys, must_be_given
from trainer.jobs import JOBS, Job

USAGE = """usage: windlass train RECIPE [--run-dir DIR] [--print-config] [--a.b VALUE ...]
       windlass train --run-dir DIR [--a.b VALUE ...]      (continue a run with its own configuration)"""


def train_command(arguments: list[str]) -> int:
    """Run a recipe, or continue a run; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        recipe = next((a for a in arguments if not a.startswith("-")), None)
        print(help_text(recipe))
        return 0
    recipe, run_dir, only_print, overrides = split_arguments(arguments)
    job, folder = resolve(recipe, run_dir, overrides)
    if only_print:
        print(to_yaml(job), end="")
        return 0
    check_paths(job)
    from launch.train_command import train

    with RunDirectory.open(folder, job, command=["train", *arguments]) as run:
        summary = train(job, run)
    if isinstance(summary, Mapping):
        print(f"{run.path}: {json.dumps(headline(summary))}")
    return 0


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a summary."""
    return {key: value for key, value in summary.items() if isinstance(value, str | int | float | bool)}


def split_arguments(arguments: list[str]) -> tuple[str | None, str | None, bool, list[str]]:
    """(recipe, run directory, print only, overrides)."""
    recipe: str | None = None
    run_dir: str | None = None
    only_print = False
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        name, equals, value = argument.partition("=")
        if name in ("--run-dir", "--run_dir"):
            if not equals:
                position += 1
                value = arguments[position] if position < len(arguments) else ""
            if not value:
                raise RequestError("--run-dir", "no value", "--run-dir DIR")
            run_dir = value
        elif argument == "--print-config":
            only_print = True
        elif argument.startswith("--"):
            overrides.append(argument)
            if not equals and position + 1 < len(arguments):
                position += 1
                overrides.append(arguments[position])
        elif recipe is None:
            recipe = argument
        else:
            raise RequestError("arguments", repr(argument), "one recipe, then --section.key VALUE")
        position += 1
    return recipe, run_dir, only_print, overrides


def resolve(recipe: str | None, run_dir: str | None, overrides: list[str]) -> tuple[Job, Path]:
    """The job and the run directory of a command line."""
    if recipe is not None:
        return load_job(recipe, overrides), Path(run_dir or Path("runs") / recipe_path(recipe).stem)
    if run_dir is None:
        raise RequestError("recipe", "missing", f"{', '.join(recipe_names())}, or a path, or --run-dir of a run")
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        raise RequestError("--run-dir", f"{run_dir} holds no config.yaml", "a run directory, or a recipe before it")
    return job_from(read_recipe(config), overrides), Path(run_dir)


def help_text(recipe: str | None = None) -> str:
    """Usage, the recipes, and every key with its type, default and docstring; with a recipe, its values."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [USAGE, ""]
    if recipe is None:
        lines.append("recipes:")
        names = recipe_names()
        for name in names:
            header = recipe_header(recipe_path(name))
            lines += _wrapped(f"  {name:<{max(map(len, names))}}  ", header, width)
        shown: dict[str, tuple[type, Mapping[str, Any] | None]] = {name: (JOBS[name], None) for name in JOBS}
    else:
        path = recipe_path(recipe)
        content = read_recipe(path)
        lines += _wrapped("", recipe_header(path), width)
        shown = {str(content.get("job")): (job_model(content.get("job")), load_job(recipe).model_dump())}
    told: set[str] = set()
    for name, (model, values) in shown.items():
        lines += ["", f"keys of {name} jobs:"]
        for key in keys(model, values):
            if key.name == "job":
                continue
            default = "must be given" if must_be_given(key.default) else f"default {default_words(key)}"
            lines.append(f"  --{key.name}  ({key.kind}; {default if recipe is None else default_words(key)})")
            text = key.help if key.name not in told else f"{key.help.split('. ')[0].rstrip('.')} (as above)."
            lines += _wrapped("      ", " ".join(text.split()), width)
            told.add(key.name)
    return "\n".join(lines)


def _wrapped(indent: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=" " * len(indent)) or [indent.rstrip()]
