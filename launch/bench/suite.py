"""`windlass bench suite` (`make bench`): the benchmarks, small, against the ratios that were last accepted.

`launch/bench/accepted/KIND.json` holds them for one kind of machine:

    {"format": 1, "kind": "amd-epyc-2-cores", "tolerance": 0.25, "commit": "...", "date": "...",
     "ratios": {"rollout.fraction_of_limit": 0.8, ...}}

Ratios are of times of one run, so they hold on a machine that is slower than the last one; every one of them is better
when it is larger. One that fell by more than the tolerance is a regression.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import tyro

from data.errors import RequestError
from launch.bench.machine import describe_machine
from launch.bench.settings import Device
from launch.cli import EXIT_FAILED
from launch.results import lookup, run_windlass
from launch.run_directory import read_json
from trainer.durable import write_text

FORMAT: Final = 1
ACCEPTED: Final = Path(__file__).parent / "accepted"
TOLERANCE: Final = 0.25
"""Share by which a ratio may fall: medians of a few repetitions on a shared machine vary by 10 to 15 %."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark of the suite."""

    arguments: tuple[str, ...]
    ratios: tuple[str, ...]
    """Places in the answer."""
    on_card: tuple[str, ...] | None = None
    """Arguments on a card; none where it does not run there."""

    def arguments_on(self, device: Device) -> tuple[str, ...] | None:
        """Arguments for a device; none where it does not run there."""
        return self.arguments if device is Device.CPU else self.on_card


SUITE: Final[Mapping[str, Part]] = {
    "rollout": Part(
        arguments=("--prompts", "32", "--repeats", "5", "--ways", "ours,floor"),
        on_card=("--engine", "reference", "--model", "0.5b"),
        ratios=("fraction_of_limit",),
    ),
    "learner": Part(
        arguments=("--prompts", "2", "--repeats", "3"),
        on_card=("--model", "0.5b", "--repeats", "5"),
        ratios=("fraction_of_limit",),
    ),
    "sync": Part(
        arguments=("--repeats", "15", "--movers", "shared_memory"),
        on_card=("--model", "0.5b", "--movers", "cuda_ipc"),
        ratios=("link_fraction",),
    ),
    "reward": Part(
        arguments=("--prompts", "128", "--repeats", "5", "--swap-lists", "100000"), ratios=("speedup_vs_loop",)
    ),
    "data": Part(arguments=("--rows", "200000", "--repeats", "3", "--items", "20000"), ratios=("fraction_of_read",)),
}


def suite_command(
    only: str = "",
    accept: bool = False,
    device: Annotated[Device, tyro.conf.EnumChoicesFromValues] = Device.CPU,
    accepted: Path = ACCEPTED,
) -> dict[str, Any]:
    """Run the benchmarks small and say what got slower than what was last accepted; exit code 1 when something did.

    Args:
        only: comma-separated benchmarks; none means all.
        accept: write what was measured as accepted for this kind of machine.
        device: cpu or cuda.
        accepted: folder of the accepted ratios.
    """
    possible = {name: wanted for name, part in SUITE.items() if (wanted := part.arguments_on(device)) is not None}
    names = [name.strip() for name in only.split(",") if name.strip()] or list(possible)
    for name in names:
        if name not in possible:
            raise RequestError("--only", name, ", ".join(possible))
    machine = describe_machine()
    path = accepted / f"{machine['kind'][device]}.json"
    before = read_accepted(path)
    measured: dict[str, float] = {}
    unsound = []
    for name in names:
        answer = run_windlass(["bench", name, "--device", device.value, *possible[name]])
        measured |= ratios_of(name, answer)
        if not answer["checked"]:
            unsound.append(name)
    tolerance = float(before.get("tolerance", TOLERANCE))
    fallen = regressions(before.get("ratios", {}), measured, tolerance)
    for line in report(before.get("ratios", {}), measured, tolerance):
        print(line)
    if unsound:
        print(f"wrong results, whatever their speed: {', '.join(unsound)}")
    elif accept:
        write_accepted(path, machine, device, {**before.get("ratios", {}), **measured}, tolerance)
        print(f"accepted in {path}")
    elif not before:
        print(f"nothing is accepted yet for {machine['kind'][device]}: `windlass bench suite --accept` does it")
    failed = bool(unsound) or (bool(fallen) and not accept)
    return {
        "ratios": measured,
        "accepted": before.get("ratios", {}),
        "tolerance": tolerance,
        "slower": fallen,
        "checked": not unsound,
        "machine": machine,
        "exit_code": EXIT_FAILED if failed else 0,
    }


def ratios_of(name: str, answer: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of a benchmark's answer, as `benchmark.field`.

    Raises:
        RequestError: the answer lacks one.
    """
    found = {}
    for field in SUITE[name].ratios:
        value = lookup(answer, field)
        if not isinstance(value, int | float):
            raise RequestError(f"answer of bench {name}", f"{field} is {value!r}", "a number")
        found[f"{name}.{field}"] = float(value)
    return found


def regressions(accepted: Mapping[str, float], measured: Mapping[str, float], tolerance: float) -> list[str]:
    """Names of the ratios that fell by more than the tolerance."""
    return [name for name, value in measured.items() if name in accepted and value < accepted[name] * (1 - tolerance)]


def report(accepted: Mapping[str, float], measured: Mapping[str, float], tolerance: float) -> Sequence[str]:
    """A line per ratio."""
    fallen = regressions(accepted, measured, tolerance)
    lines = []
    for name, value in measured.items():
        if name not in accepted:
            lines.append(f"  new     {name} {value:.3g}")
            continue
        word = "SLOWER" if name in fallen else "ok"
        change = 100 * (value / accepted[name] - 1)
        lines.append(f"  {word:<7} {name} {value:.3g}, accepted {accepted[name]:.3g} ({change:+.0f} %)")
    return lines


def read_accepted(path: Path) -> dict[str, Any]:
    """What is accepted for a kind of machine; empty where nothing is.

    Raises:
        RequestError: a file of another format.
    """
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("format") != FORMAT or not isinstance(content.get("ratios"), dict):
        raise RequestError(str(path), f"format {content.get('format')!r}", f"format {FORMAT} with ratios")
    return dict(content)


def write_accepted(
    path: Path, machine: Mapping[str, Any], device: Device, ratios: Mapping[str, float], tolerance: float
) -> None:
    """Accept ratios for a kind of machine."""
    content = {
        "format": FORMAT,
        "kind": machine["kind"][device],
        "tolerance": tolerance,
        "commit": machine["commit"],
        "date": machine["date"],
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
