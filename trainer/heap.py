"""The C heap of a learner's process: what is freed stays mapped.

A step frees what the step before it allocated, in blocks of megabytes. By default glibc gives them back to the kernel,
which has to clear every page again when the next step asks: a fifth of a small step on CPU. A learner keeps them, so
that its process stays as large as its largest step made it.

Source: mallopt(3); M_TRIM_THRESHOLD and M_MMAP_THRESHOLD as in glibc's `malloc.h`.
"""

from __future__ import annotations

import ctypes

from data.errors import RunError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
"""Largest int of C: bytes at the end of the heap that are not given back, and those of a block with its own mapping."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, from now on.

    Raises:
        RunError: the C library refuses it.
    """
    # Where another allocator is preloaded this is still glibc's function, and changes nothing.
    mallopt = ctypes.CDLL(None).mallopt
    for name, option in (("M_TRIM_THRESHOLD", _TRIM_THRESHOLD), ("M_MMAP_THRESHOLD", _MMAP_THRESHOLD)):
        if mallopt(option, _MOST) != 1:
            raise RunError(f"mallopt refuses {name} = {_MOST}: the C library is not glibc as it is known")
