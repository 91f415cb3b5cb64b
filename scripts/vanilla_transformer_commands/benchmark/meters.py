"""Measures time and memory of this process."""

import ctypes
import gc
import re
import time
from pathlib import Path

import torch


def reset_peak() -> int:
    """Returns freed memory to the system and resets the peak. Returns the bytes that the process holds now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # "5" resets the peak (man 5 proc).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(which: str) -> int:
    """Bytes that the process holds now ("VmRSS") or at its peak ("VmHWM"); on a GPU, the bytes of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{which}:\s+(\d+) kB", status)[0]) * 1024


def clock() -> float:
    """The time in seconds, after the GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
