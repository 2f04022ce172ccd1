"""The `windlass` command.

A command is a function named in `launch.commands` and imported when it is called, so that `windlass --help` needs
neither torch nor Ray. tyro turns a function's signature into its arguments; `train` reads its own, because its keys
depend on the recipe. Errors that a user can mend come out as one line on standard error.

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
from typing import Any

from data.errors import RequestError, RunError, WindlassError
from launch.commands import COMMANDS, Command

EXIT_FAILED = 1
EXIT_REQUEST = 2


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
