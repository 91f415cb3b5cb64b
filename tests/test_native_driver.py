"""The compiled program without Python: its arithmetic on every instruction set, and a short fuzz."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import needs_compiler


sys.path.insert(0, str(Path(__file__).parent / "native"))
import run as driver


pytestmark = needs_compiler


@pytest.mark.parametrize("name", driver.TARGETS)
def test_sums_of_products_in_8_bits_are_exact_on_every_instruction_set(name, tmp_path):
    target = driver.TARGETS[name]
    if missing := driver.why_not_run(target):
        pytest.skip(missing)
    subprocess.run(driver.build(tmp_path / "arithmetic", target, source="arithmetic.cpp"), check=True)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this processor does not have AVX2"
)
def test_emulated_instructions_are_the_processor_s(tmp_path):
    target = driver.Target(["-march=x86-64-v3"])
    subprocess.run(driver.build(tmp_path / "emulation", target, source="emulation.cpp"), check=True)


def test_random_networks_and_searches_end_well(tmp_path):
    """The same alone and together, by any number of threads; what goes wrong is told. `make sanitize` takes longer."""
    command = driver.build(tmp_path / "driver", driver.Target(driver.program.compiler_flags()))
    driver.fuzz(command, seconds=5, seed=0)
