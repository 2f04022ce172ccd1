"""`windlass submit`: any windlass command as a job of a cluster."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import tyro

from launch.submission import kuberay, ray_job, slurm
from launch.submission.following import follow
from launch.submission.plan import Plan, make_plan
from launch.submission.settings import SubmitSettings, Target

NAME = "submit"
TARGETS: dict[Target, ModuleType] = {Target.RAY: ray_job, Target.SLURM: slurm, Target.KUBERAY: kuberay}


def options(settings: Annotated[SubmitSettings, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues]) -> int:
    """Submit a windlass command to a cluster, follow its output, and end with its exit code.

    windlass submit --to ray|slurm|kuberay [OPTIONS] [--json FILE] -- COMMAND ...
    """
    raise AssertionError("unreachable: only its signature is read")


def submit_command(arguments: list[str]) -> int:
    """Submit a command; returns its exit code, or 0 when it is not followed."""
    settings, words, target = read_submission(arguments)
    if settings is None:
        return 0
    # With `--json -` standard output is the answer and nothing else.
    said = contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext()
    with said:
        plan = make_plan(settings, words)
        record = plan.record(TARGETS[settings.to].files(plan))
    if target is not None:
        from launch.cli import write_answer

        write_answer(record, target)
    if settings.dry_run:
        if target is None:
            show(record)
        return 0
    with said:
        return carry_out(plan)


def read_submission(arguments: Sequence[str]) -> tuple[SubmitSettings | None, list[str], str | None]:
    """(options, command, file for the plan); no options when only the help was asked for.

    Raises:
        RequestError: wrong options; those of the command are checked later.
    """
    from launch.cli import check_writable, parse_and_call, split_json
    from launch.commands import COMMANDS

    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    target, own = split_json(words[:at])
    found: list[SubmitSettings] = []

    def body(settings: SubmitSettings) -> int:
        found.append(settings)
        return 0

    body.__signature__ = inspect.signature(options, eval_str=True)  # type: ignore[attr-defined]
    body.__annotations__ = dict(inspect.get_annotations(options, eval_str=True))
    body.__doc__ = options.__doc__
    parse_and_call(NAME, COMMANDS[NAME], body, own)
    if not found:
        return None, [], None
    if target not in (None, "-"):
        check_writable(str(target))
    return found[0], words[at + 1 :], target


def carry_out(plan: Plan) -> int:
    """Submit, and follow unless told otherwise."""
    job = TARGETS[plan.settings.to].submit(plan, print)
    if not plan.settings.follow:
        return 0
    code = follow(job, grace_s=plan.settings.grace_s)
    print(job.describe())
    return code


def show(record: dict[str, Any]) -> None:
    """The plan for a person: generated files in full, shipped ones as a count."""
    asked = record["resources"]
    print(f"command     {' '.join(record['command'])}")
    print(f"target      {record['target']}, {asked['nodes']} nodes with {asked['cpus_per_node']} CPUs", end="")
    print(f" and {asked['gpus_per_node']} GPUs each")
    print(f"needs       {', '.join(f'{name} {count:g}' for name, count in asked['needs'].items()) or 'not known'}")
    print(f"environment {', '.join(record['env_keys']) or 'nothing'}")
    hours = record["gpu_hours"]
    print(f"GPU hours   {'not known' if hours is None else f'{hours:.2f}'} ({record['gpu_hours_reason']})")
    files = record["files"]
    if "shipped" in files:
        print(f"files       {len(files['shipped'])} from {files['from']}, {files['bytes'] / 2**20:.1f} MiB")
    else:
        import yaml

        text = files.get("script") or yaml.safe_dump(files["manifest"], sort_keys=False)
        print(f"\n{text}", end="")
