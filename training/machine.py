"""The machine: in words, for model cards and benchmarks; how fast it reads memory; and how much memory it has."""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


# What decides how fast products are: torch's names, and those that people know. VNNI has two encodings.
X86 = {
    "AVX2": ("avx2",),
    "FMA": ("fma3",),
    "AVX-512": ("avx512_bw",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_tile",),
}
ARM = {"NEON": ("neon",), "dot products": ("dot",), "i8mm": ("i8mm",), "bfloat16": ("bf16",), "SVE": ("sve",)}
# Larger than the caches of a server's processor that one process gets.
READ_BYTES = 1 << 29


def machine() -> str:
    """The hardware in words: the accelerator's name, or the processor and torch's threads."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        device = torch.get_device_module(kind)
        name = device.get_device_name() if hasattr(device, "get_device_name") else kind.upper()  # MPS has none
        return f"{torch.accelerator.device_count()} x {name}"
    return threads_of_processor()


def threads_of_processor() -> str:
    """The processor in words, and how many threads torch has there."""
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()}"


def processor() -> str:
    """
    The processor in words, such as "AMD EPYC (family 23), 2 cores: AVX2, FMA; no AVX-512, VNNI, bfloat16, AMX".

    The family, which tells generations apart where a virtual machine hides the model, is known on Linux only.
    """
    capabilities = torch.cpu.get_capabilities()
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^cpu family\s*: (\d+)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    family = f" (family {found[1]})" if found else ""
    cores = os.cpu_count() or 1
    known = ARM if platform.machine().lower() in ("aarch64", "arm64") else X86
    has = [words for words, names in known.items() if any(capabilities.get(name) for name in names)]
    lacks = [words for words in known if words not in has]
    sets = "; ".join([", ".join(has)] * bool(has) + [f"no {', '.join(lacks)}"] * bool(lacks))
    told = os.environ.get("ATEN_CPU_CAPABILITY")
    limit = f" (torch is told to use {told} only)" if told else ""
    return f"{name}{family}, {cores} core{'s' if cores > 1 else ''}: {sets}{limit}"


def read_rate() -> float:
    """Bytes a second that all threads together read from an array much larger than the caches, as memory gives now."""
    array = torch.ones(READ_BYTES // 4)
    return READ_BYTES / fastest(array.sum)


def fastest(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the fastest of several calls, made for half a second, after one that is not counted."""
    work()
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_of(device: torch.device) -> int:
    """Bytes of memory of an accelerator that has its own, or of the machine."""
    counts = memory_counts(device)
    return counts.mem_get_info(device)[1] if counts else psutil.virtual_memory().total


def memory_counts(device: torch.device) -> Any:
    """torch's module for a device that counts memory of its own (CUDA, XPU); None where it is the machine's."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
