"""Keeps the process's memory between updates (glibc's mallopt(3))."""

import ctypes
import os
import platform


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def hold_memory() -> bool:
    """
    Makes glibc keep freed blocks instead of returning them to the kernel. Each update frees and allocates the same
    hundreds of megabytes, and every fresh page costs a page fault and its zeroing.

    It is the same as starting with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`, for this process only. The process
    stays at its peak size. A preloaded allocator (docs/training.md) is left alone.

    Returns:
        False if the C library is not glibc, or a library is preloaded; otherwise whether glibc accepted.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Allocate no block by mmap, which free() would unmap, and never trim the top of the heap.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
