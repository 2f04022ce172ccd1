"""The plan of a submission: what would run where, with what; what `--dry-run` prints and every target carries out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import RequestError
from launch.submission.environment import plain_variables, refuse_written_secrets, secret_names
from launch.submission.gpu_hours import Estimate, estimate
from launch.submission.settings import SubmitSettings, Target
from trainer.jobs import Job, LaacJob, RlJob, SftJob
from trainer.preflight import asks
from trainer.settings import Device

NOT_SUBMITTED = ("submit",)
"""Commands that act on jobs and are no jobs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked submission."""

    settings: SubmitSettings
    words: list[str]
    """The windlass command, without the word windlass."""
    plain: dict[str, str]
    """Environment variables that travel with their values."""
    secrets: list[str]
    """Names of those that do not."""
    needs: dict[str, float]
    """GPUs and CPUs that the command's parts ask Ray for; empty where the command does not tell."""
    estimate: Estimate

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.settings.nodes * self.settings.gpus_per_node

    def record(self, files: dict[str, Any]) -> dict[str, Any]:
        """The plan as `--json` prints it; `files` are those that are shipped or generated."""
        settings = self.settings
        return {
            "target": settings.to.value,
            "command": ["windlass", *self.words],
            "env_keys": sorted([*self.plain, *self.secrets]),
            "secret_keys": self.secrets,
            "resources": {
                "nodes": settings.nodes,
                "cpus_per_node": settings.cpus_per_node,
                "gpus_per_node": settings.gpus_per_node,
                "memory_gib_per_node": settings.memory_gib_per_node,
                "hours": settings.hours,
                "needs": self.needs,
            },
            "files": files,
            "gpu_hours": self.estimate.gpu_hours,
            "gpu_hours_reason": self.estimate.reason,
        }


def make_plan(settings: SubmitSettings, words: Sequence[str]) -> Plan:
    """Check a submission as far as this machine can.

    Raises:
        RequestError: the command or its arguments are wrong, it needs more than is asked for, or a secret would be
            written down.
    """
    plain = plain_variables(settings.env)
    secrets = secret_names(settings.secret)
    refuse_written_secrets(words, plain, secrets)
    job = checked_command(list(words), settings.to)
    needs = job_needs(job, on_gpus=settings.gpus_per_node > 0)
    plan = Plan(
        settings=settings,
        words=list(words),
        plain=plain,
        secrets=secrets,
        needs=needs,
        estimate=estimate(job, gpus=settings.nodes * settings.gpus_per_node),
    )
    _check_amounts(plan)
    return plan


def checked_command(words: list[str], target: Target) -> Job | None:
    """Refuse a command line that the command itself would refuse; the job of `train`, none of other commands.

    Raises:
        RequestError: as the command would say, or a run directory that the nodes could not share.
    """
    from launch import cli, commands

    if not words:
        raise RequestError("submit", "no command", "windlass submit --to TARGET [OPTIONS] -- COMMAND ...")
    name, arguments = cli.split_command(words)
    if name not in commands.COMMANDS or name in NOT_SUBMITTED:
        raise RequestError(
            "command", repr(name), "a command that does work, such as train, eval, continual or bench step"
        )
    if name == "train":
        return _checked_train(arguments, target)
    command = commands.COMMANDS[name]
    if not command.own_arguments:
        body = cli.load(name, command)

        @functools.wraps(body)
        def nothing(*positional: Any, **named: Any) -> None:
            return None

        _, arguments = cli.split_json(arguments) if command.answers else (None, arguments)
        cli.parse_and_call(name, command, nothing, arguments)
    return None


def _checked_train(arguments: list[str], target: Target) -> Job:
    from launch.train_arguments import resolve, split_arguments

    recipe, run_dir, _, overrides = split_arguments(arguments)
    if target is not Target.SLURM and (run_dir is None or not Path(run_dir).is_absolute()):
        # The job's current folder is a copy on one node, which goes with the job.
        raise RequestError("--run-dir", run_dir or "missing", "an absolute path that every node sees")
    if recipe is None and not (Path(run_dir or "") / "config.yaml").is_file():
        raise RequestError("recipe", "missing", "a recipe: the run's own configuration cannot be read from here")
    return resolve(recipe, run_dir, overrides)[0]


def job_needs(job: Job | None, *, on_gpus: bool) -> dict[str, float]:
    """CPUs and GPUs that the parts of a job ask Ray for; a learner takes a GPU where the nodes have some."""
    if isinstance(job, LaacJob):
        return _laac_needs(job, on_gpus=on_gpus)
    if not isinstance(job, SftJob | RlJob):
        return {}
    wanted = asks(job, with_fleet=True, on_gpus=on_gpus)
    return {
        "gpus": float(sum(ask.count * ask.gpus for ask in wanted)),
        "cpus": float(sum(ask.count * ask.cpus for ask in wanted)),
    }


def _laac_needs(job: LaacJob, *, on_gpus: bool) -> dict[str, float]:
    """The engines of a reference that is asked are gone when the ranks start; a single rank asks Ray for nothing."""
    ranks = job.laac.ranks if job.laac.ranks > 1 else 0
    engines = job.rollout.engines if job.laac.reference.model is not None else 0
    on_cuda = job.laac.device is Device.CUDA or (job.laac.device is Device.AUTO and on_gpus)
    return {"gpus": float(max(engines * job.rollout.gpus, ranks * on_cuda)), "cpus": float(max(engines, ranks))}


def _check_amounts(plan: Plan) -> None:
    settings = plan.settings
    needed = plan.needs.get("gpus", 0.0)
    if needed > plan.gpus:
        raise RequestError(
            "--gpus-per-node",
            f"{settings.nodes} nodes with {settings.gpus_per_node} GPUs are {plan.gpus}",
            f"at least {needed:g} GPUs in all, which the command's engines, learners and replicas ask for",
        )
