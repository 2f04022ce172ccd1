"""Contract: a process that was told so keeps the memory that it frees: blocks of megabytes that are allocated and freed
again and again fault no pages in. Larger ones go back, so that its heap does not grow by what was never touched.

Not checked here: what it is worth in seconds.
"""

from __future__ import annotations

import subprocess
import sys

from launch.provenance import ROOT

PROGRAM = """
import resource, sys
import torch
from trainer.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    torch.ones(2**24)
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_is_freed_stays_mapped() -> None:
    # Above 32 MiB glibc never lets a block stay by itself; 64 MiB in 10 steps are 163,840 pages of 4 KiB.
    given_back, kept = faults("give_back"), faults("keep")
    assert kept < given_back / 2


LARGE = """
import ctypes
from trainer.heap import KEPT_BYTES, keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
goes_back = keep_freed_memory()
def size():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
def left(count, size_bytes):
    before = size()
    blocks = [libc.malloc(size_bytes) for _ in range(count)]
    assert None not in blocks and size() - before >= count * (size_bytes >> 10)
    for block in blocks:
        libc.free(block)
    return size() - before
print(left(1, KEPT_BYTES), left(3, KEPT_BYTES - 2**27), int(goes_back))
"""


def test_only_a_block_beyond_what_is_kept_goes_back() -> None:
    """Blocks that nobody touches; the smaller ones together are more than an int of C can say."""
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True)
    large_kib, smaller_kib, goes_back = map(int, done.stdout.split())
    assert large_kib < 2**10 if goes_back else large_kib >= 2**20
    assert smaller_kib > 2**21
