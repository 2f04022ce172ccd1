"""`windlass continual`: keep the served model up to date from a feedback log."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from data.errors import RequestError
from data.feedback import is_day
from data.settings import Settings
from launch.config import check_paths, job_from, merge, parse_overrides, read_recipe, recipe_path, validate
from launch.continual.cycle import Cycle, begin_registry
from launch.continual.files import Files
from launch.continual.lock import writing
from launch.continual.log_folder import LogFolder
from launch.continual.measuring import MeasureSettings
from launch.continual.metrics import MetricsSettings
from launch.continual.observer import Observer
from launch.continual.reasons import Decision, Reason
from launch.continual.recipe_updater import RecipeUpdater
from launch.continual.registry import Registry
from launch.continual.registry_report import write_version_page
from launch.continual.results import Result
from launch.continual.settings import ServiceSettings
from launch.continual.webhook import WebhookSettings
from trainer.checkpoints import open_model
from trainer.interruption import Interruption
from trainer.jobs import PRESETS, Job, RlJob, SftJob
from trainer.language_model import is_pretrained, language_path

SECTION = "continual"
EXIT_REJECTED = 3
TICK_S = 1.0


class ContinualSettings(ServiceSettings):
    """The section `continual` of a recipe."""

    measure: MeasureSettings = MeasureSettings()
    """How the held-out rows are measured."""
    poll_s: float = Field(60.0, ge=1)
    """Seconds between two looks at the log."""
    metrics: MetricsSettings = MetricsSettings()
    """Metrics for Prometheus."""
    webhook: WebhookSettings = WebhookSettings()
    """Who is told of promotions and rejections."""


class Section(Settings):
    """Where the settings stand in a recipe."""

    continual: ContinualSettings = ContinualSettings()
    """The service."""


def continual_command(arguments: list[str]) -> int:
    """Run the service; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(parser().format_help())
        return 0
    known, overrides = parser().parse_known_args(arguments)
    first_day = known.first_day or ""
    if first_day and not is_day(first_day):
        raise RequestError("--from", first_day, "YYYY-MM-DD")
    if known.json and not known.once:
        raise RequestError("--json", known.json, "with --once")
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(known.registry)):
        legal = "a local folder: versions appear by rename and are served by a link, which object stores do not have"
        raise RequestError("--registry", known.registry, legal)
    job, settings = read_continual(known.recipe, overrides, log=known.log, registry=known.registry)
    words = contextlib.redirect_stdout(sys.stderr) if known.json == "-" else contextlib.nullcontext()
    with words:
        results = serve(job, settings, known, first_day)
    if known.json:
        tell_json(results, known.json)
    return EXIT_REJECTED if known.once and any(one.decision is Decision.REJECTED for one in results) else 0


class Arguments(ArgumentParser):
    """A parser whose refusal is an error of the request, told in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            RequestError: always.
        """
        raise RequestError(self.prog.removeprefix("windlass "), message, f"see `{self.prog} --help`")


def parser() -> Arguments:
    """The arguments beside the recipe's keys."""
    made = Arguments(
        prog="windlass continual",
        description="Update the served model from each complete new day of a feedback log, guarded; see "
        "docs/continual.md. Keys of the recipe, also of its section `continual`, are given as --a.b VALUE.",
        allow_abbrev=False,
    )
    made.add_argument("recipe", help="an rl or sft recipe of `windlass train`, by name or path")
    made.add_argument("--log", required=True, help="feedback log: a folder or a pyarrow file-system URI")
    made.add_argument("--registry", required=True, type=Path, help="folder of the versions; made when missing")
    made.add_argument("--once", action="store_true", help="take what is complete now and end; for cron")
    made.add_argument("--from", dest="first_day", metavar="DAY", help="leave earlier days alone (YYYY-MM-DD)")
    made.add_argument("--dry-run", action="store_true", help="say what would be done; nothing is changed")
    made.add_argument("--json", metavar="FILE", help="write a list with a result per day (- for standard output)")
    return made


def read_continual(
    recipe: str, overrides: Sequence[str], *, log: str, registry: Path
) -> tuple[RlJob | SftJob, ContinualSettings]:
    """The job and the section `continual` of a recipe with overrides.

    Raises:
        RequestError: the first problem of either.
    """
    content = read_recipe(recipe_path(recipe))
    own = {SECTION: content.pop(SECTION, {})}
    pairs = parse_overrides(overrides)
    mine = [(path, text) for path, text in pairs if path[0] == SECTION]
    theirs = [f"--{'.'.join(path)}={text}" for path, text in pairs if path[0] != SECTION]
    settings = validate(Section, merge(own, mine, Section)).continual
    kinds = [text for path, text in pairs if path == ["job"]]
    kind = kinds[-1] if kinds else content.get("job")
    if kind not in ("rl", "sft"):
        raise RequestError("job", repr(kind), "rl or sft: jobs that train the model on a log")
    # The rows of every update come from the log, by a folder that the cycle makes.
    job: Job = job_from(content | {"feedback": str(registry.expanduser().resolve() / "continual")}, theirs)
    assert isinstance(job, RlJob | SftJob)
    return job, settings


def serve(job: RlJob | SftJob, settings: ContinualSettings, known: Namespace, first_day: str) -> list[Result]:
    """Work through the log once, or until somebody asks to stop."""
    check_paths(job)
    log, files, root = LogFolder(known.log), Files(), known.registry.expanduser().resolve()
    updater = RecipeUpdater(job, settings.measure)

    def cycle(registry: Registry) -> Cycle:
        return Cycle(log, registry, updater, settings, clock=time.time, files=files)

    if known.dry_run:
        results = cycle(Registry(root)).plan(first_day)
        tell(results)
        return results
    with writing(root):
        registry = Registry(root, files, create=True)
        if registry.current() is None:
            begin_registry(registry, first_model(job), at=time.time())
        with Observer(registry, settings.metrics, settings.webhook) as observer:
            while True:
                results = cycle(registry).run(first_day)
                tell(results)
                for one in results:
                    if one.version is not None:
                        print(f"{one.day}: report {write_version_page(registry, one.version)}", flush=True)
                observer.looked(results)
                stopped = any(told.reason is Reason.INTERRUPTED for one in results for told in one.reasons)
                if known.once or stopped or not waited(settings.poll_s):
                    return results


def first_model(job: RlJob | SftJob) -> Path:
    """The model that serves before any update.

    Raises:
        RequestError: the recipe begins with random weights, or with a language model that knows no items.
    """
    if job.init in PRESETS or (job.text.on and is_pretrained(language_path(job.init))):
        raise RequestError("init", job.init, "a trained model (a run, a checkpoint or an hf folder) to serve first")
    return open_model(Path(job.init))


def waited(seconds: float) -> bool:
    """Wait; False when somebody asked to stop meanwhile."""
    end = time.monotonic() + seconds
    with Interruption() as interruption:
        while time.monotonic() < end and not interruption.requested:
            time.sleep(TICK_S)
        return not interruption.requested


def tell(results: Sequence[Result]) -> None:
    """One line per result."""
    for one in results:
        version = "" if one.version is None else f" version {one.version}"
        print(f"{one.day}: {one.decision}{version}; " + "; ".join(map(str, one.reasons)), flush=True)


def tell_json(results: Sequence[Result], target: str) -> None:
    """The results as a JSON list."""
    content: list[dict[str, Any]] = [one.record() for one in results]
    text = json.dumps(content, indent=2, allow_nan=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError("--json", target, f"a writable file ({error.strerror})") from error
