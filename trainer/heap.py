"""The C heap of a learner's process: what is freed stays mapped, up to blocks of a gibibyte.

A step frees what the step before it allocated, in blocks of megabytes. By default glibc gives them back to the kernel,
which has to clear every page again when the next step asks. A learner's process keeps them for as long as it lives; its
size is then what its largest step took, and the gaps between blocks. Larger blocks have a mapping of their own: a heap
that grows by what nobody may ever touch cannot be forked, because the kernel refuses a mapping beyond the memory.

Source: mallopt(3); M_TRIM_THRESHOLD and M_MMAP_THRESHOLD as in glibc's `malloc.h`.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
"""Largest int of C."""
KEPT_BYTES = 2**30
"""Blocks from this size on have a mapping of their own, which goes with them."""
_OLDER_GLIBC_BYTES = 2**25
"""The largest such size that glibc before 2.35 takes."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, from now on.

    Nothing but time depends on it: where another allocator is preloaded, this sets glibc's, which nobody asks then.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, _NEVER)
    if not mallopt(_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(_MMAP_THRESHOLD, _OLDER_GLIBC_BYTES)
