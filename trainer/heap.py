"""The C heap of a learner's process: what is freed stays mapped.

A step frees what the step before it allocated, in blocks of megabytes. By default glibc gives them back to the kernel,
which has to clear every page again when the next step asks. A learner's process keeps them for as long as it lives; its
size is then what its largest step took, and the gaps between blocks.

Source: mallopt(3); M_TRIM_THRESHOLD and M_MMAP_MAX as in glibc's `malloc.h`.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_MOST = 2**31 - 1
"""Largest int of C."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, from now on.

    Nothing but time depends on it: where another allocator is preloaded, this sets glibc's, which nobody asks then.
    """
    mallopt = ctypes.CDLL(None).mallopt
    # No end of the heap is given back, and no block has a mapping of its own that would go with it. The threshold of
    # such blocks would say the same, but older glibc takes no more than 32 MiB for it.
    mallopt(_TRIM_THRESHOLD, _MOST)
    mallopt(_MMAP_MAX, 0)
