"""docs/configuration.md, written from the docstrings, bounds and defaults of the settings.

    python -m launch.configuration_page            write the page
    python -m launch.configuration_page --check    say whether it is current; exit code 1 when it is not

A key that several jobs have is told once, with the jobs that have it; where its default differs, each job's is told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from pydantic import BaseModel

from data.errors import RequestError
from launch.bandit_command import BanditCommand
from launch.config import default_words
from launch.continual.command import Section
from launch.continual.registry_command import PromoteCommand, PruneCommand, RollbackCommand, VersionCommand
from launch.data_commands import ImportCommand, InspectCommand
from launch.eval_command import EvalCommand
from launch.id_commands import IdsCommand
from launch.provenance import ROOT
from launch.run_directory import MAY_CHANGE
from launch.serving.command import ServeCommand
from launch.serving.recommend_command import RecommendCommand
from launch.setting_names import Key, is_section, keys, must_be_given
from launch.simulate_command import SimulateCommand
from launch.strata_command import StrataCommand
from trainer.durable import write_text
from trainer.jobs import JOBS

PAGE = ROOT / "docs" / "configuration.md"
COMMANDS: Mapping[str, type[BaseModel]] = {
    "data import": ImportCommand,
    "data inspect": InspectCommand,
    "data ids": IdsCommand,
    "data simulate": SimulateCommand,
    "data bandit": BanditCommand,
    "eval": EvalCommand,
    "strata": StrataCommand,
    "serve": ServeCommand,
    "recommend": RecommendCommand,
    "continual": Section,
    "registry show": VersionCommand,
    "registry promote": PromoteCommand,
    "registry rollback": RollbackCommand,
    "registry prune": PruneCommand,
}
"""Commands whose arguments are settings; `train` takes those of the jobs."""
SHARED_SECTIONS = ("rollout", "cluster")
"""Sections of `eval`, `strata`, `serve`, `recommend` and `data simulate` that are the ones of the jobs."""

HEAD = """# Configuration

<!-- Written by `python -m launch.configuration_page` from the settings in the code. Do not edit. -->

A job is one mapping of YAML sections. It comes from a recipe (`launch/recipes/NAME.yaml`, or a path), and
`--section.key VALUE` on the command line overrides a key. Values are read as YAML, except where a key holds text or a
path: `--learner.lr 1e-4`, `--evaluation.k '[1, 5, 10]'`, `--rollout.max_model_len null`. Types are strict: `"1"` is no
number and `1` is no truth value. An unknown key is refused, with the nearest known names.

    windlass train ml100k-sft --print-config      # the resolved configuration; starts nothing
    windlass train ml100k-sft --help              # the keys of this job with the values of this recipe
    windlass train --help                         # the recipes, and the keys of every job

**Jobs** names the kinds of job that have the key. **R** marks keys that a continued run may have otherwise than it
began; with any other key changed, the run directory is refused. Checks between keys (divisibility, lengths, widths) are
made at start and name the legal neighbours.
"""

ENVIRONMENT = """## Environment variables

| variable | meaning |
|---|---|
| `WINDLASS_REWARD_TOKEN` | bearer token of the reward service; another name by `reward.token_env` |
| `WINDLASS_SERVE_TOKEN` | bearer token of `windlass serve`; another name by `--token-env` |
| `WINDLASS_METRICS_TOKEN` | the same of the metrics of `continual`; another name by `continual.metrics.token_env` |
| `WINDLASS_FAULT` | `POINT:N` kills a process at a named point; see [fault points](training.md#fault-points) |
| `WINDLASS_PACKAGE_DIGEST` | `unchecked` switches off the check that workers import the driver's packages |
| `WINDLASS_REQUIRE` | parts (`vllm,deepspeed,ray,trl,obp,shared-data`) whose absence fails tests, not skips them |
| `RAY_AUTH_MODE` | Ray's default works for a cluster started here; others want `token`, or `cluster.unauthenticated` |
| `PYTHON` | the interpreter `make` creates `.venv` with, when it is not `python3.11` or `python3` |
"""


@dataclass
class Entry:
    """A key, as the jobs that have it know it."""

    key: Key
    defaults: dict[str, str] = field(default_factory=dict)
    """Default in words by job."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.configuration_page", description="Write configuration.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write or check")
    options = parser.parse_args(arguments)
    if not options.check:
        write_text(options.page, page())
        print(options.page)
        return 0
    if is_current(options.page):
        return 0
    print(f"{options.page} is not current; write it with `python -m launch.configuration_page`", file=sys.stderr)
    return 1


def is_current(path: Path) -> bool:
    """True when the file is what the settings say now.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8") == page()
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error), "a page to check") from error


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [HEAD]
    for section, entries in by_section(job_entries()).items():
        parts.append(_section(section, entries))
    parts.append("## Arguments of other commands\n")
    parts.append("`windlass COMMAND --help` prints the same. `_` and `-` are alike in their names.\n")
    for name, model in COMMANDS.items():
        parts.append(_command(name, model))
    parts.append(ENVIRONMENT)
    return "\n".join(parts)


def job_entries() -> dict[str, Entry]:
    """Every key of every job by its name, in the order of definition."""
    entries: dict[str, Entry] = {}
    for job, model in JOBS.items():
        for key in keys(model):
            if key.name == "job":
                continue
            entry = entries.setdefault(key.name, Entry(key=key))
            entry.defaults[job] = _default(key)
    return entries


def by_section(entries: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """The entries by the first part of their name; keys without a section come first, under an empty name."""
    sections: dict[str, list[Entry]] = {"": []}
    for name, entry in entries.items():
        sections.setdefault(name.partition(".")[0] if "." in name else "", []).append(entry)
    return sections


def may_change(name: str) -> bool:
    """Whether a continued run may change the key."""
    return any(name == key or name.startswith(key + ".") for key in MAY_CHANGE)


def _section(section: str, entries: Sequence[Entry]) -> str:
    lines = [f"## {section}" if section else "## Keys without a section", ""]
    if section:
        lines += [_purpose(section), ""]
    else:
        lines += [
            f"`job` is {', '.join(f'`{name}`' for name in JOBS)}, and says which of the keys below there are.",
            "",
        ]
    lines += ["| key | type | default | R | jobs | |", "|---|---|---|---|---|---|"]
    for entry in entries:
        mark = "R" if may_change(entry.key.name) else ""
        cells = [f"`{entry.key.name}`", entry.key.kind, _defaults(entry), mark, ", ".join(entry.defaults)]
        lines.append(_row([*cells, entry.key.help]))
    return "\n".join(lines) + "\n"


def _purpose(section: str) -> str:
    """First line of the docstring of the section's field, from the first job that has it."""
    for model in JOBS.values():
        if section in model.model_fields:
            return (model.model_fields[section].description or "").split("\n")[0]
    raise ValueError(f"no job has a section {section}")


def _defaults(entry: Entry) -> str:
    distinct = dict.fromkeys(entry.defaults.values())
    if len(distinct) == 1:
        return next(iter(distinct))
    return ", ".join(f"{value} ({', '.join(jobs)})" for value, jobs in _jobs_of(entry.defaults))


def _jobs_of(defaults: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    for value in dict.fromkeys(defaults.values()):
        yield value, [job for job, own in defaults.items() if own == value]


def _command(name: str, model: type[BaseModel]) -> str:
    lines = [f"### windlass {name}", "", "| argument | type | default | |", "|---|---|---|---|"]
    for key in keys(model):
        if key.name.partition(".")[0] in SHARED_SECTIONS and is_section(_annotation(model, key.name)):
            continue
        positional = "." not in key.name and tyro.conf.Positional in model.model_fields[key.name].metadata
        flag = f"`{key.name.upper()}`" if positional else f"`--{key.name.replace('_', '-')}`"
        lines.append(_row([flag, key.kind, _default(key), key.help]))
    shared = [f"`--{s}.*` as in [{s}](#{s})" for s in SHARED_SECTIONS if s in model.model_fields]
    if shared:
        lines += ["", f"And {', '.join(shared)}."]
    return "\n".join(lines) + "\n"


def _annotation(model: type[BaseModel], name: str) -> object:
    return model.model_fields[name.partition(".")[0]].annotation


def _default(key: Key) -> str:
    return "must be given" if must_be_given(key.default) else f"`{default_words(key)}`"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
