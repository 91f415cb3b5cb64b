"""Keeps the process's memory between updates (glibc's mallopt(3))."""

import ctypes
import os
import platform


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def hold_memory() -> bool:
    """
    Tells glibc not to give freed blocks back to the kernel. An update frees and asks again for the same hundreds of
    megabytes, and each fresh page costs a fault and its clearing.

    Same as starting with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`, for this process alone. The process stays as
    large as it ever was. A preloaded allocator (docs/training.md) has ways of its own, and is left alone.

    Returns:
        Whether it was done: False where the C library is not glibc, or something is preloaded.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block by mmap, which a free would unmap; and a heap whose free top is never cut off.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
