"""How a test run is dealt to processes, and its closing lines: passed, failed, and skipped by reason."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

# Read by OpenMP when torch is imported: threads that wait must not spin, which on a loaded machine costs 3x the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# Timings never decide a test: on a loaded machine an example may take any time.
settings.register_profile("windlass", deadline=None)
settings.load_profile("windlass")


SHARED = "tests/rollout/"
"""A folder whose files share engines, which take longer to start than most files to run."""

QUICK = "tests/data/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal files to the processes of `-n 2 --dist loadfile`, and the folder that shares engines as if it were one."""
    from xdist.scheduler import LoadFileScheduling

    class Dealer(LoadFileScheduling):
        """Which tests go to one process."""

        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return SHARED if scope.startswith(SHARED) else scope

    return Dealer(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the readers of data, which start nothing, for last: the two processes then end at about the same time."""
    items.sort(key=lambda item: item.nodeid.startswith(QUICK))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests passed and failed, and the skipped ones by reason."""
    stats = terminalreporter.stats
    skipped = Counter(_reason(report) for report in stats.get("skipped", []))
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"skipped: {count} ({reason})")
    failed = len(stats.get("failed", [])) + len(stats.get("error", []))
    terminalreporter.write_line(
        f"{len(stats.get('passed', []))} passed, {failed} failed, {sum(skipped.values())} skipped"
    )


def _reason(report: pytest.TestReport) -> str:
    longrepr = report.longrepr
    return str(longrepr[2]).removeprefix("Skipped: ") if isinstance(longrepr, tuple) else str(longrepr)
