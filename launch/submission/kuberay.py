"""A command as a KubeRay RayJob: the manifest, and its way to the cluster through kubectl.

Secrets are keys of a Kubernetes Secret; the manifest has their names. Ray's token is made and kept by the operator
(`authOptions`). The cluster is deleted when the job has ended; the run directory lies on a claim that every pod mounts.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from data.errors import RequestError, RunError
from launch.submission.plan import Plan
from launch.submission.ray_job import STOP_WAIT

TIMEOUT_S = 60.0
MEMORY_GIB = 8
"""Memory of a pod where nobody says anything else."""
SHARED_MEMORY = "shared-memory"
API_VERSION = "ray.io/v1"


def manifest(plan: Plan) -> dict[str, Any]:
    """The RayJob: one pod per node, the first of them the head."""
    settings = plan.settings
    cluster: dict[str, Any] = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": _start_params(plan),
            "template": _pod_template(plan, "ray-head"),
        },
    }
    if settings.nodes > 1:
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": settings.nodes - 1,
                "minReplicas": settings.nodes - 1,
                "maxReplicas": settings.nodes - 1,
                "rayStartParams": _start_params(plan),
                "template": _pod_template(plan, "ray-worker"),
            }
        ]
    return {
        "apiVersion": API_VERSION,
        "kind": "RayJob",
        "metadata": {"name": settings.name, "namespace": settings.namespace},
        "spec": {
            "entrypoint": f"exec {shlex.join([settings.python or 'python', '-P', '-m', 'launch.cli', *plan.words])}",
            "runtimeEnvYAML": json.dumps({"env_vars": {STOP_WAIT: str(settings.grace_s)}}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": settings.grace_s,
            "activeDeadlineSeconds": max(1, round(settings.hours * 3600)),
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": cluster,
        },
    }


def _start_params(plan: Plan) -> dict[str, str]:
    return {"num-cpus": str(plan.settings.cpus_per_node), "num-gpus": str(plan.settings.gpus_per_node)}


def _pod_template(plan: Plan, container: str) -> dict[str, Any]:
    settings = plan.settings
    python = settings.python or "python"
    memory = settings.memory_gib_per_node or MEMORY_GIB
    amounts = {"cpu": str(settings.cpus_per_node), "memory": f"{memory}Gi"}
    if settings.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(settings.gpus_per_node)
    claims = [volume.partition(":")[::2] for volume in settings.volume]
    mounts = [{"name": f"claim-{index}", "mountPath": path} for index, (_, path) in enumerate(claims)]
    volumes: list[dict[str, Any]] = [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}}
        for index, (claim, _) in enumerate(claims)
    ]
    # Ray's object store and the weight channel live in /dev/shm; a container's own is 64 MiB.
    volumes.append({"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, memory // 2)}Gi"}})
    mounts.append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})
    return {
        "spec": {
            "terminationGracePeriodSeconds": settings.grace_s,
            "containers": [
                {
                    "name": container,
                    "image": settings.image,
                    "env": _environment(plan),
                    "resources": {"limits": amounts, "requests": amounts},
                    "volumeMounts": mounts,
                    "securityContext": {"allowPrivilegeEscalation": False},
                    "lifecycle": {"preStop": {"exec": {"command": [python, "-P", "-m", "launch.submission.drain"]}}},
                }
            ],
            "volumes": volumes,
        }
    }


def _environment(plan: Plan) -> list[dict[str, Any]]:
    plain = [{"name": name, "value": value} for name, value in sorted(plan.plain.items())]
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": plan.settings.secret_object, "key": name}}}
        for name in plan.secrets
    ]
    return [*plain, *secrets]


def files(plan: Plan) -> dict[str, Any]:
    """What the plan says of files: the manifest, which goes to kubectl by standard input."""
    return {"manifest": manifest(plan)}


@dataclass
class KubeJob:
    """A submitted job, as `launch.submission.following` follows it."""

    name: str
    namespace: str
    _shown: int = 0

    def output(self) -> str:
        """What the submitter's pod has printed since the last call; it repeats the job's output."""
        done = _run(["logs", f"job/{self.name}", "--tail=-1"], self.namespace)
        if done.returncode:
            # There is no such pod before the cluster is up, and none after it was cleaned up.
            return ""
        new, self._shown = done.stdout[self._shown :], max(self._shown, len(done.stdout))
        return new

    def exit_code(self) -> int | None:
        """None while the job is on; 0 after success or a stop, else 1."""
        status = self._status()
        if status.get("jobDeploymentStatus") not in ("Complete", "Failed", "Suspended"):
            return None
        return 0 if status.get("jobStatus") in ("SUCCEEDED", "STOPPED") else 1

    def _status(self) -> dict[str, Any]:
        text = tell(["get", "rayjobs.ray.io", self.name, "--output=json"], self.namespace)
        status = json.loads(text).get("status", {})
        return status if isinstance(status, dict) else {}

    def stop(self) -> None:
        """Suspend the RayJob: the operator stops the Ray job, then deletes the pods, whose processes get SIGTERM."""
        patch = json.dumps({"spec": {"suspend": True}})
        tell(["patch", "rayjobs.ray.io", self.name, "--type=merge", f"--patch={patch}"], self.namespace)

    def describe(self) -> str:
        """Name and state."""
        status = self._status()
        return f"RayJob {self.name}: {status.get('jobDeploymentStatus')} {status.get('message', '')}".strip()


def submit(plan: Plan, say: Callable[[str], None]) -> KubeJob:
    """Create the RayJob.

    Raises:
        RequestError: there is no kubectl here, or the cluster refuses the manifest.
    """
    settings = plan.settings
    if shutil.which("kubectl") is None:
        raise RequestError("--to", "kuberay, and there is no kubectl on this machine", "a machine with kubectl")
    done = _run(["create", "--filename=-"], settings.namespace, text=json.dumps(manifest(plan)))
    if done.returncode:
        raise RequestError("kubectl create", " ".join(done.stderr.split()), "a manifest that the cluster takes")
    say(f"created RayJob {settings.name} in namespace {settings.namespace}")
    return KubeJob(name=settings.name, namespace=settings.namespace)


def tell(arguments: Sequence[str], namespace: str) -> str:
    """Standard output of kubectl.

    Raises:
        RunError: it failed; in its own words.
    """
    done = _run(arguments, namespace)
    if done.returncode:
        raise RunError(f"kubectl {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def _run(arguments: Sequence[str], namespace: str, *, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", f"--namespace={namespace}", *arguments]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"kubectl {arguments[0]}: no answer within {TIMEOUT_S:.0f} s") from error
