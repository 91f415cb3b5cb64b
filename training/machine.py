"""Describes the machine for model cards and benchmarks: hardware, memory, and how fast it reads memory."""

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


# Instruction sets that decide the speed of matrix products -> torch's names for them. VNNI has two encodings.
X86 = {
    "AVX2": ("avx2",),
    "FMA": ("fma3",),
    "AVX-512": ("avx512_bw",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_tile",),
}
ARM = {"NEON": ("neon",), "dot products": ("dot",), "i8mm": ("i8mm",), "bfloat16": ("bf16",), "SVE": ("sve",)}
# Larger than the caches of a server processor.
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
    """The processor in words, and torch's number of threads."""
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
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    limit = f" (torch is limited to {capability})" if capability else ""
    return f"{name}{family}, {cores} core{'s' if cores > 1 else ''}: {sets}{limit}"


def read_rate() -> float:
    """Memory bandwidth: bytes per second that all threads together read from an array much larger than the caches."""
    array = torch.ones(READ_BYTES // 4)
    return READ_BYTES / fastest(array.sum)


def fastest(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the fastest call, among as many as fit in `seconds`, after one warm-up call."""
    work()
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_of(device: torch.device) -> int:
    """Total memory in bytes: the accelerator's, if it has its own, else the machine's."""
    counts = memory_counts(device)
    return counts.mem_get_info(device)[1] if counts else psutil.virtual_memory().total


def memory_counts(device: torch.device) -> Any:
    """torch's module for a device that has its own memory (CUDA, XPU); None if it uses the machine's."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def peak_resident() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
