"""Keeps the process's memory between updates (glibc's mallopt(3))."""

import ctypes
import os
import platform


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def hold_memory() -> bool:
    """
    Makes glibc keep freed blocks instead of returning them to the kernel. Each update frees and allocates the same
    hundreds of megabytes, and every fresh page costs a page fault and its zeroing.

    This equals a start with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`, for this process only. The process stays at
    its peak size. With a preloaded allocator (docs/training.md) nothing is changed.

    Returns:
        False if the C library is not glibc, or a library is preloaded; otherwise whether glibc accepted.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is allocated by mmap, since free() would unmap it, and the top of the heap is never trimmed.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
