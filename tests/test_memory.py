"""`hold_memory`: the allocator keeps freed memory, shown by the kernel's count of page faults."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest


PROGRAM = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[2])  # alone, without the package and torch
from memory import hold_memory
if sys.argv[1] == "held":
    assert hold_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    block = malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_memory_that_was_used_once_is_used_again_without_page_faults():
    folder, faults = Path(__file__).parents[1] / "training" / "loop", {}
    for kind in ("stock", "held"):
        command = [sys.executable, "-c", PROGRAM, kind, folder]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[kind] = int(result.stdout)
    assert faults["held"] < 0.01 * faults["stock"]
