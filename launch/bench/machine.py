"""The machine a measurement comes from: processor, cores, memory, cards, libraries; never its name."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from launch.bench.settings import Device, usable_cores
from launch.provenance import commit, hardware, library_versions


def describe_machine() -> dict[str, Any]:
    """Hardware, libraries, commit and date of a measurement."""
    parts = hardware()
    del parts["host"]
    return {
        **parts,
        "usable_cores": usable_cores(),
        "kind": {device.value: machine_kind(parts, device) for device in Device},
        "libraries": library_versions(),
        "date": datetime.now(UTC).date().isoformat(),
        **commit(),
    }


def machine_kind(parts: dict[str, Any], device: Device) -> str:
    """Short name of machines whose ratios may be compared: the card, or processor family and cores.

    Several models of one processor family share a kind, because a fresh machine of a cloud may be any of them.
    """
    if device is Device.CUDA:
        name = parts["cards"][0].partition(",")[0] if parts["cards"] else "no card"
    else:
        words = re.sub(r"\(.*?\)|@.*", " ", parts["processor"]).split()
        name = " ".join([*[word for word in words if word.isalpha()][:2], f"{usable_cores()} cores"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
