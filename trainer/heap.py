"""The C heap of a learner's process: what is freed stays mapped, up to blocks of a gibibyte.

A step frees what the step before it allocated, in blocks of megabytes. By default glibc gives them back to the kernel,
which has to clear every page again when the next step asks. A learner's process keeps them for as long as it lives; its
size is then what its largest step took, and the gaps between blocks. Larger blocks have a mapping of their own: a heap
that grows by what nobody may ever touch cannot be forked, because the kernel refuses a mapping beyond the memory.

This is the main thread's heap, in which learners work: those of other threads are pieces of 64 MiB.

Source: mallopt(3); M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX as in glibc's `malloc.h`.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
"""Of the trim threshold: the end of the heap is never given back."""
KEPT_BYTES = 2**30
"""Blocks from this size on have a mapping of their own, which goes with them."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, from now on.

    Nothing but time depends on it: where another allocator is preloaded, this sets glibc's, which nobody asks then.

    Returns:
        Whether blocks of `KEPT_BYTES` and more still go back. Older glibc takes no such size, and keeps all blocks.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, _NEVER)
    if mallopt(_MMAP_THRESHOLD, KEPT_BYTES):
        return True
    mallopt(_MMAP_MAX, 0)
    return False
