"""`windlass doctor`: what this machine lacks, and how to mend it.

Every check looks at one thing and says what it found; nothing is installed or started. A required part that is missing
makes the answer `ok: false` and the exit code 1.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data.errors import RequestError
from launch.provenance import cards, library_versions

NEED_MEMORY_GIB = 8
NEED_DISK_GIB = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the answer."""

    part: str
    ok: bool
    found: str
    mend: str = ""
    """What to do when it is not ok."""
    required: bool = True
    """False for what only some commands need."""


def doctor_command(plan: str | None = None) -> dict[str, Any]:
    """Look at this machine and say what it lacks for which command, or what a recipe needs.

    Args:
        plan: a recipe (name or path) of a policy job: print what its processes need of memory, and which cards fit.
    """
    if plan is not None:
        return {"ok": True, "findings": [], "plan": plan_of(plan), "exit_code": 0}
    findings = [check() for check in CHECKS]
    for finding in findings:
        mark = "ok     " if finding.ok else ("missing" if finding.required else "absent ")
        print(f"{mark}  {finding.part:<22} {finding.found}{'' if finding.ok else f'; {finding.mend}'}")
    ok = all(finding.ok for finding in findings if finding.required)
    print("this machine can run the demo" if ok else "this machine lacks what is marked as missing")
    return {"ok": ok, "findings": [vars(finding) for finding in findings], "exit_code": 0 if ok else 1}


def plan_of(recipe: str) -> list[dict[str, Any]]:
    """The memory plan of a recipe, printed as well.

    Raises:
        RequestError: a recipe that trains no policy, or a model whose shape is not known here.
    """
    from launch.config import load_job
    from launch.memory_plan import memory_plan
    from trainer.jobs import RlJob, SftJob

    job = load_job(recipe)
    if not isinstance(job, SftJob | RlJob):
        raise RequestError("--plan", f"{recipe}, a job of another kind", "a recipe of job: sft or rl")
    records = [process.record() for process in memory_plan(job)]
    for record in records:
        print(f"{record['count']} x {record['process']}: {record['total_gib']:.2f} GiB each")
        for where in ("device_gib", "host_gib"):
            for part, size in record[where].items():
                print(f"  {part + (' (host)' if where == 'host_gib' else ''):<28} {size:8.3f}")
        print(f"  fits a card of              {', '.join(record['fits']) or 'none of those known'}")
    return records


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(part="Python", ok=sys.version_info[:2] in ((3, 11), (3, 12)), found=found, mend="use 3.11 or 3.12")


def _library(name: str, module: str, *, required: bool, mend: str) -> Callable[[], Finding]:
    def check() -> Finding:
        present = importlib.util.find_spec(module) is not None
        versions = library_versions()
        version = versions.get(name) or versions.get(f"{name}-cpu") or "present"
        return Finding(
            part=name, ok=present, found=version if present else "not installed", mend=mend, required=required
        )

    return check


def _clashing_builds() -> Finding:
    clash = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    on_cpu = not cards()
    return Finding(
        part="torch companions",
        ok=not (clash and on_cpu),
        found=", ".join(clash) or "none, as it should be",
        mend=f"pip uninstall {' '.join(clash)}: CUDA builds make `import vllm` fail on CPU",
    )


def _tool(name: str, mend: str) -> Callable[[], Finding]:
    def check() -> Finding:
        path = shutil.which(name)
        return Finding(part=name, ok=path is not None, found=path or "not on the path", mend=mend)

    return check


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    return Finding(
        part="memory",
        ok=free >= NEED_MEMORY_GIB,
        found=f"{free:.1f} GiB free",
        mend=f"the demo takes up to {NEED_MEMORY_GIB} GiB",
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    free = shutil.disk_usage(path).free / 2**30 if path.is_dir() else 0.0
    return Finding(
        part="/dev/shm",
        ok=free >= 1,
        found=f"{free:.1f} GiB free",
        mend="Ray and the weight channel need 1 GiB (docker: --shm-size=2g)",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding(
        part="disk here", ok=free >= NEED_DISK_GIB, found=f"{free:.0f} GiB free", mend=f"{NEED_DISK_GIB} GiB for runs"
    )


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding(part="cores", ok=cores >= 2, found=str(cores), mend="two are the least that was tested")


def _cards() -> Finding:
    found = cards()
    return Finding(
        part="GPU", ok=bool(found), found="; ".join(found) or "none", mend="everything runs on CPU", required=False
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _cores,
    _memory,
    _shared_memory,
    _disk,
    _tool("g++", "torch and DeepSpeed build extensions with it (Debian: build-essential)"),
    _library("torch", "torch", required=True, mend="make setup"),
    _library("vllm", "vllm", required=True, mend="make setup"),
    _library("deepspeed", "deepspeed", required=True, mend="make setup"),
    _library("ray", "ray", required=True, mend="make setup"),
    _clashing_builds,
    _library(
        "recbole", "recbole", required=False, mend="the MovieLens-100K files: pip install --no-deps recbole==1.2.1"
    ),
    _library(
        "sentence-transformers", "sentence_transformers", required=False, mend="title embeddings: extra `embeddings`"
    ),
    _library("onnxruntime", "onnxruntime", required=False, mend="ONNX rankers: extra `onnx`"),
    _library("peft", "peft", required=False, mend="adapters in place of full training: extra `lora`"),
    _library("gguf", "gguf", required=False, mend="language models in GGUF files: extra `gguf`"),
    _cards,
)
