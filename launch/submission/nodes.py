"""Waits for the nodes of a Ray cluster that is just starting: `python -m launch.submission.nodes HOST:PORT N`.

the head's port takes no connection, or fewer than N nodes are alive: wait, at most DEADLINE_S
"""

from __future__ import annotations

import logging
import socket
import sys
import time

from data.errors import RunError

DEADLINE_S = 300.0
POLL_S = 0.5


def await_nodes(address: str, count: int, *, deadline_s: float = DEADLINE_S) -> None:
    """Return when `count` nodes of the cluster at `address` are alive.

    Raises:
        RunError: they are not within the deadline; says how many are.
    """
    import ray

    deadline = time.monotonic() + deadline_s
    host, _, port = address.rpartition(":")
    while not _listens(host, int(port)):
        if time.monotonic() > deadline:
            raise RunError(f"nobody listens at {address} after {deadline_s:.0f} s: the Ray head did not start")
        time.sleep(POLL_S)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise RunError(
            f"the Ray head at {address} refuses: {str(error.__cause__ or error).splitlines()[-1]}"
        ) from error
    try:
        while (alive := sum(node["Alive"] for node in ray.nodes())) < count:
            if time.monotonic() > deadline:
                raise RunError(f"{alive} of {count} nodes joined the Ray cluster at {address} in {deadline_s:.0f} s")
            time.sleep(POLL_S)
    finally:
        ray.shutdown()


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=POLL_S).close()
    except OSError:
        # Not yet.
        return False
    return True


if __name__ == "__main__":
    try:
        await_nodes(sys.argv[1], int(sys.argv[2]))
    except RunError as error:
        sys.exit(f"windlass: {error}")
