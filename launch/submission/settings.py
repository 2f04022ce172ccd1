"""Options of `windlass submit`."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

import tyro
from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings

KUBERNETES_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
"""RayJob names: a DNS label, short enough for the pods' suffixes."""
_Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


class Target(StrEnum):
    """Where a job is submitted to."""

    RAY = "ray"
    """A running Ray cluster, by its Jobs API."""
    SLURM = "slurm"
    """A Slurm partition; Ray is started on the allocation."""
    KUBERAY = "kuberay"
    """Kubernetes with the KubeRay operator, as a RayJob."""


class SubmitSettings(Settings):
    """Where a command runs, on what, and what it is given."""

    to: Target
    """`ray`, `slurm` or `kuberay`."""
    name: str = Field("windlass", min_length=1, max_length=47)
    """Name of the job (slurm, kuberay)."""
    nodes: int = Field(1, ge=1, le=100_000)
    """Nodes the job asks for (slurm, kuberay); of a running cluster, the nodes that must be there."""
    cpus_per_node: int = Field(4, ge=1)
    """CPUs of each node."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each node."""
    memory_gib_per_node: int = Field(0, ge=0)
    """Memory of each node in GiB; 0 leaves it to the scheduler (kuberay: 8)."""
    hours: float = Field(24.0, gt=0)
    """Longest time the job may take (slurm, kuberay)."""
    grace_s: int = Field(300, ge=1)
    """Seconds between SIGTERM and SIGKILL: time to reach the next step boundary and write a checkpoint."""
    env: _Words = ()
    """NAME or NAME=VALUE of an environment variable that the job gets; may be given several times."""
    secret: _Words = ()
    """NAME of a variable with a secret. Its value is on the nodes already (ray), in your environment (slurm) or under
    NAME in `secret_object` (kuberay); nothing that windlass writes holds it."""
    secret_object: str = "windlass"
    """The Kubernetes Secret that holds the secrets (kuberay)."""
    python: str = ""
    """Interpreter on the nodes; none takes `python` (ray, kuberay) or this one (slurm)."""
    address: str = "http://127.0.0.1:8265"
    """Address of the cluster's dashboard (ray)."""
    working_dir: Path = Path()
    """Folder that is shipped to the nodes (ray)."""
    partition: str = ""
    """Partition (slurm)."""
    account: str = ""
    """Account (slurm)."""
    sbatch: _Words = ()
    """A further option of sbatch without its dashes, such as qos=high; may be given several times (slurm)."""
    port: int = Field(6379, ge=1024, le=65535)
    """Port of the Ray head (slurm)."""
    image: str = ""
    """Container image with windlass installed (kuberay)."""
    namespace: str = "default"
    """Kubernetes namespace (kuberay)."""
    volume: _Words = ()
    """CLAIM:/path of a persistent volume claim that every pod mounts, such as the run directory's (kuberay)."""
    dry_run: bool = False
    """Print the plan; submit nothing."""
    follow: bool = True
    """Stay, show the job's output and end with its exit code; Ctrl-C stops the job."""

    @model_validator(mode="after")
    def _fits_the_target(self) -> Self:
        if self.to is Target.KUBERAY:
            if not self.image:
                raise RequestError("--image", "missing", "a container image with windlass installed")
            for field, value in (("--name", self.name), ("--namespace", self.namespace)):
                if not KUBERNETES_NAME.fullmatch(value):
                    raise RequestError(field, repr(value), "a-z, 0-9 and -, at most 47, first a letter")
            for volume in self.volume:
                claim, _, path = volume.partition(":")
                if not claim or not path.startswith("/"):
                    raise RequestError("--volume", repr(volume), "CLAIM:/path")
        if self.to is Target.SLURM:
            for field, value in (("--name", self.name), ("--partition", self.partition), ("--account", self.account)):
                if not re.fullmatch(r"[\w.@+-]*", value):
                    raise RequestError(field, repr(value), "letters, digits and . @ + - _")
            for option in self.sbatch:
                if not re.fullmatch(r"[a-z][a-z-]*(=[^\s'\"]+)?", option):
                    raise RequestError("--sbatch", repr(option), "option or option=value, without dashes and spaces")
        return self
