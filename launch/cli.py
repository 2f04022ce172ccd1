"""The `windlass` command.

A command is a function named in `COMMANDS` and imported when it is called, so that `windlass --help` needs neither
torch nor Ray. tyro turns a function's signature into its arguments; `train` reads its own, because its keys depend on
the recipe. Errors that a user can mend come out as one line on standard error.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 3 the guard rejected an update.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import RequestError, RunError, WindlassError

EXIT_FAILED = 1
EXIT_REQUEST = 2


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command and where its body is."""

    target: str
    """`module:function`. The function returns None, an exit code, or an answer (a mapping)."""
    summary: str
    answers: bool = False
    """It answers a question: takes `--json FILE`, and prints the answer as JSON with `-`."""
    own_arguments: bool = False
    """The function takes the list of arguments and reads it itself."""


COMMANDS: dict[str, Command] = {
    "data import": Command(
        target="launch.data_commands:import_command", summary="bring a dataset into the Parquet layout", answers=True
    ),
    "data inspect": Command(
        target="launch.data_commands:inspect_command", summary="summarise and validate a dataset folder", answers=True
    ),
    "data ids": Command(
        target="launch.id_commands:ids_command", summary="build semantic IDs for the items of a dataset", answers=True
    ),
    "data extend": Command(
        target="launch.extend_command:extend_command",
        summary="add items to a dataset and retire others; old ids and codes stay",
        answers=True,
    ),
    "data forget": Command(
        target="launch.forget_command:forget_command",
        summary="take a user's rows out of a dataset, a log and a registry",
        answers=True,
    ),
    "data simulate": Command(
        target="launch.simulate_command:simulate_command",
        summary="serve a policy over held-out contexts to get a feedback log",
        answers=True,
    ),
    "data bandit": Command(
        target="launch.bandit_command:bandit_command",
        summary="the Open Bandit sample as a feedback log",
        answers=True,
    ),
    "train": Command(
        target="launch.train_arguments:train_command",
        summary="run a recipe (sft, rl, ranker, critic, laac); resumes by itself from the run directory",
        own_arguments=True,
    ),
    "eval": Command(
        target="launch.eval_command:eval_command", summary="evaluate a checkpoint on a split", answers=True
    ),
    "serve": Command(
        target="launch.serving.command:serve_command",
        summary="answer requests with the served version of a registry, and log what is shown",
    ),
    "recommend": Command(
        target="launch.serving.recommend_command:recommend_command",
        summary="recommend for many contexts at once, Parquet to Parquet",
        answers=True,
    ),
    "continual": Command(
        target="launch.continual.command:continual_command",
        summary="keep the served model up to date from a feedback log, guarded",
        own_arguments=True,
    ),
    "replay": Command(
        target="launch.continual.replay_command:replay_command",
        summary="daily updates over the periods of a dataset, by several ways to update",
        answers=True,
        own_arguments=True,
    ),
    "ope bandit": Command(
        target="launch.ope_command:ope_bandit_command",
        summary="each policy of the Open Bandit sample from the other one's log",
        answers=True,
    ),
    "ope model": Command(
        target="launch.ope_command:ope_model_command",
        summary="what a model would have earned, from the log of another policy",
        answers=True,
    ),
    "registry list": Command(
        target="launch.continual.registry_command:list_command", summary="the versions of a registry", answers=True
    ),
    "registry show": Command(
        target="launch.continual.registry_command:show_command",
        summary="a version: where it comes from, and why it was promoted or rejected",
        answers=True,
    ),
    "registry promote": Command(
        target="launch.continual.registry_command:promote_command", summary="serve a version", answers=True
    ),
    "registry rollback": Command(
        target="launch.continual.registry_command:rollback_command",
        summary="serve again what was served before",
        answers=True,
    ),
    "registry prune": Command(
        target="launch.continual.registry_command:prune_command", summary="remove old versions", answers=True
    ),
    "bench rollout": Command(
        target="launch.bench.rollout:rollout_command",
        summary="time constrained beams against vLLM, transformers and the limit",
        answers=True,
    ),
    "bench learner": Command(
        target="launch.bench.learner:learner_command",
        summary="time learning on trees against rows and the limit",
        answers=True,
    ),
    "bench step": Command(
        target="launch.bench.step:step_command",
        summary="time whole RL steps against TRL's GRPOTrainer",
        answers=True,
    ),
    "bench stages": Command(
        target="launch.bench.stages:stages_command",
        summary="time the objective's stages within a learner's step",
        answers=True,
    ),
    "bench sync": Command(
        target="launch.bench.sync:sync_command",
        summary="time a push of the weights against a plain copy",
        answers=True,
    ),
    "bench reward": Command(
        target="launch.bench.reward:reward_command",
        summary="time the rewards of a batch against a loop over its lists",
        answers=True,
    ),
    "bench data": Command(
        target="launch.bench.data:data_command", summary="time an import and the item trie", answers=True
    ),
    "bench partition": Command(
        target="launch.bench.partition:partition_command",
        summary="time reading, validating and joining a day of a feedback log",
        answers=True,
    ),
    "bench serve": Command(
        target="launch.bench.serve:serve_command",
        summary="time requests to the service on loopback, and kill it under load",
        answers=True,
    ),
    "bench orchestrator": Command(
        target="launch.bench.orchestrator:orchestrator_command",
        summary="how many simulated engines one driver keeps at work",
        answers=True,
    ),
    "bench scale": Command(
        target="launch.bench.scale:scale_bench_command",
        summary="time whole steps with more engines and learners",
        answers=True,
    ),
    "bench suite": Command(
        target="launch.bench.suite:suite_command",
        summary="the benchmarks, small, against the ratios last accepted (make bench)",
        answers=True,
    ),
    "submit": Command(
        target="launch.submission.command:submit_command",
        summary="any of these commands on a cluster: a Ray job, Slurm, or a KubeRay RayJob",
        own_arguments=True,
    ),
    "status": Command(
        target="launch.status_command:status_command", summary="where a run is: step, engines, queues", answers=True
    ),
    "scale": Command(
        target="launch.status_command:scale_command",
        summary="change the number of engines of a running job",
        answers=True,
    ),
    "report": Command(target="launch.report:report_command", summary="the HTML report of a run, registry or replay"),
    "compare": Command(
        target="launch.compare:compare_command", summary="compare two runs with a paired bootstrap", answers=True
    ),
    "correlate": Command(
        target="launch.correlate:correlate_command",
        summary="rank correlation of AUC and its windows with recall over a run's checkpoints",
        answers=True,
    ),
    "strata": Command(
        target="launch.strata_command:strata_command",
        summary="where a run's reward helps, by difficulty and discriminability",
        answers=True,
    ),
    "sweep": Command(
        target="launch.sweep_command:sweep_command",
        summary="a recipe for several values of a key and several seeds, with means",
        answers=True,
    ),
    "results": Command(
        target="launch.results:results_command", summary="regenerate a table of docs/results.md", answers=True
    ),
    "demo": Command(
        target="launch.demo:demo_command", summary="the main job on MovieLens-100K, start to end", answers=True
    ),
    "smoke": Command(target="launch.smoke:smoke_command", summary="the whole loop in a minute"),
    "doctor": Command(
        target="launch.doctor:doctor_command", summary="what this machine lacks, and how to mend it", answers=True
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return the exit code; unexpected errors come through with their traceback."""
    try:
        return _dispatch(list(arguments))
    except RequestError as error:
        return _say(error, EXIT_REQUEST)
    except WindlassError as error:
        return _say(error, EXIT_FAILED)
    except BrokenPipeError:
        # The reader of our output (head, less) has left; keep the interpreter's own flush from failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        told = told_by_the_system(error)
        if told is None:
            raise
        return _say(told, EXIT_REQUEST if isinstance(told, RequestError) else EXIT_FAILED)


UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
    # A file lies where a folder is wanted, or the other way round.
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
"""The user may mend these by another path or other rights."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""These end a run whatever was asked for."""


def told_by_the_system(error: OSError) -> WindlassError | None:
    """What the file system refuses, in the words of the user's request; None for errors that may be our own fault."""
    where = str(error.filename or "file")
    reason = error.strerror or str(error)
    if error.errno in UNUSABLE:
        return RequestError(where[:200], reason, "a path that can be read and written")
    if error.errno in DISK:
        return RunError(f"{where}: {reason}; what was finished before stays")
    return None


def _say(error: WindlassError, code: int) -> int:
    print("windlass: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"windlass {version('windlass')}")
        return 0
    name, rest = split_command(arguments)
    if name not in COMMANDS:
        print(overview(name))
        return 0
    return _call(name, COMMANDS[name], rest)


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name (one or two words) and the arguments behind it; a group alone or with --help is itself.

    Raises:
        RequestError: no such command; the nearest one is named.
    """
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    words = 2 if arguments[0] in groups and len(arguments) > 1 and arguments[1] not in ("-h", "--help") else 1
    name = " ".join(arguments[:words])
    if name in COMMANDS or name in groups:
        return name, arguments[words:]
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else ", ".join(COMMANDS)
    raise RequestError("command", repr(name), hint)


def overview(group: str = "") -> str:
    """The list of commands, all or of one group."""
    shown = {name: c for name, c in COMMANDS.items() if not group or name.startswith(group + " ")}
    width = max(map(len, shown))
    lines = [
        f"usage: windlass {group or 'COMMAND'} ...",
        "",
        "windlass keeps an LLM recommender up to date by reinforcement learning.",
        "",
    ]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in shown.items()]
    lines += ["", "windlass COMMAND --help explains one. Commands that answer a question take --json FILE (- prints)."]
    return "\n".join(lines)


def _call(name: str, command: Command, arguments: list[str]) -> int:
    from data.faults import check_fault_variable
    from launch.user_path import append_user_path

    check_fault_variable()
    append_user_path(os.getcwd())
    function = load(name, command)
    if command.own_arguments:
        return _finish(function(arguments), None)
    target, arguments = split_json(arguments) if command.answers else (None, arguments)
    if command.answers and "json" in inspect.signature(function).parameters:
        # The body writes its own answer.
        arguments = arguments if target is None else [*arguments, "--json", target]
        target = None
    if target not in (None, "-"):
        check_writable(str(target))
    # With `--json -` standard output is the answer and nothing else; what the body says goes to standard error.
    words = contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext()
    with words:
        answer = parse_and_call(name, command, function, arguments)
    return _finish(answer, target)


def load(name: str, command: Command) -> Callable[..., Any]:
    """The body of a command."""
    module, _, function = command.target.partition(":")
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"windlass {name}", f"needs the package {error.name}", "an installation with it; see `windlass doctor`"
        ) from error
    return loaded


def split_json(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--json FILE` and the other arguments."""
    rest: list[str] = []
    target: str | None = None
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--json":
            position += 1
            if position == len(arguments):
                raise RequestError("--json", "no value", "--json FILE, or --json - for standard output")
            target = arguments[position]
        elif argument.startswith("--json="):
            target = argument.partition("=")[2]
        else:
            rest.append(argument)
        position += 1
    return target, rest


def parse_and_call(name: str, command: Command, function: Callable[..., Any], arguments: list[str]) -> Any:
    """Parse the arguments with tyro and call the body; a wrong argument is one line.

    tyro calls the function while it parses, so the body runs under a thin wrapper that only binds the arguments.
    """
    import functools

    import tyro
    from pydantic import ValidationError

    bound: list[functools.partial[Any]] = []

    @functools.wraps(function)
    def bind(*positional: Any, **named: Any) -> None:
        bound.append(functools.partial(function, *positional, **named))

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            tyro.cli(bind, prog=f"windlass {name}", description=inspect.getdoc(function), args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            return 0
        raise RequestError(name, unboxed(said.getvalue()), f"see `windlass {name} --help`") from stop
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or name
        raise RequestError(f"{name}: {where}", repr(problem["input"]), str(problem["msg"])) from error
    return bound[0]()


def unboxed(text: str) -> str:
    """tyro's message without colours and the box around it, on one line, up to its own pointer to the help."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in plain.splitlines()]
    # Box lines go, a line with the name of an option (--dataset PATH) stays.
    kept = [line for line in lines if line and not re.match(r"^([╭╰├─]|\+-|-{3})", line)]
    text = " ".join(" ".join(kept).partition("For full helptext")[0].split())
    # A wrong value of a nested section comes as pydantic's own report.
    nested = re.search(r"arguments\.(\S+): .*? for \w+ (\S+) (.*?) \[type=\w+, input_value=(.*?), input_type=", text)
    if nested is not None:
        section, field, wanted, value = nested.groups()
        return f"--{section}.{field} {value}: {wanted}".replace("_", "-")
    return text or "the arguments are not understood"


def _finish(answer: Any, json_target: str | None) -> int:
    if isinstance(answer, bool) or answer is None:
        return 0 if answer is not False else EXIT_FAILED
    if isinstance(answer, int):
        return answer
    if not isinstance(answer, Mapping):
        raise TypeError(f"a command returned {type(answer).__name__}; a mapping, an exit code or None is wanted")
    if json_target is not None:
        write_answer(answer, json_target)
    return int(answer.get("exit_code", 0))


def check_writable(target: str) -> None:
    """Refuse a file that could not be written, before the work whose answer it is to hold."""
    existed = os.path.exists(target)
    try:
        with open(target, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise RequestError("--json", target, f"a writable file ({error.strerror})") from error
    if not existed:
        os.unlink(target)


def write_answer(answer: Mapping[str, Any], target: str) -> None:
    """Write a command's answer as JSON to a file, or to standard output with `-`."""
    text = json.dumps(answer, indent=2, allow_nan=False, default=str)
    if target == "-":
        print(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise RequestError("--json", target, f"a writable file ({error.strerror})") from error


if __name__ == "__main__":
    main()
