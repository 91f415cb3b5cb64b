"""The engines once more with instruction sets hidden, so that no processor passes what another one fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


# What torch finds here -> what torch and oneDNN are limited to.
HIDDEN = {"AVX512": ("avx2", "AVX2"), "AVX2": ("default", "SSE41")}
# Products, networks and searches by the packed engine and by the compiled program.
TESTS = (
    "test_engine_products or test_engine_packed and (modules or alike or type)"
    " or test_engine_compiled and (every_network or panels or TestInt8)"
)
FILES = ("test_engine_products.py", "test_engine_packed.py", "test_engine_compiled.py")


@pytest.mark.timeout(900)
def test_engines_are_right_with_fewer_instructions():
    found = torch.backends.cpu.get_cpu_capability()
    if found not in HIDDEN:
        pytest.skip(f"torch finds {found} here, of which it can hide nothing")
    environment = dict(zip(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"), HIDDEN[found], strict=True))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS]
    command += [Path(__file__).with_name(file) for file in FILES]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
