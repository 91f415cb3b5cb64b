"""The compiled program without Python: fuzzed under sanitizers, and with instructions that this machine may lack."""

import platform
import shutil
import subprocess

import pytest
from native.run import (
    FOLDER,
    SANITIZERS,
    SCORES_AGREE,
    SHAPES,
    TARGETS,
    Case,
    Target,
    agrees,
    build,
    error_of_int8,
    fuzz,
    lively_model,
    random_calls,
    why_not_run,
)

from vanilla_transformer import engine_program as program


pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="the driver and its emulations are built by g++ on Linux and x86-64",
)

WARNINGS = ("-Wall", "-Wextra", "-Werror")
# None of these can be run everywhere.
COMPILED_ONLY = {
    "AVX-512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX-512 VNNI": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vnni"],
    "AVX-VNNI": ["-march=x86-64-v3", "-mavxvnni"],
}


def needed(target: Target) -> Target:
    if missing := why_not_run(target):
        pytest.skip(missing)
    return target


@pytest.mark.parametrize("name", TARGETS)
def test_products_in_8_bits_are_exact(tmp_path, name):
    """Every state times every weight, added to the largest possible sums, in 64 bits."""
    command = build(tmp_path / "arithmetic", needed(TARGETS[name]), "-O1", *WARNINGS, source="arithmetic.cpp")
    subprocess.run(command, check=True)


def test_the_emulated_instructions_are_those_of_the_processor(tmp_path):
    command = build(tmp_path / "emulation", needed(TARGETS["AVX2"]), "-O1", *WARNINGS, source="emulation.cpp")
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", COMPILED_ONLY)
def test_what_cannot_be_run_here_compiles_without_warnings(name):
    command = ["g++", *program.FLAGS, *COMPILED_ONLY[name], *WARNINGS, "-I", str(program.SOURCE.parent)]
    subprocess.run([*command, "-fsyntax-only", str(program.SOURCE)], check=True)
    subprocess.run([*command, "-c", str(FOLDER / "arithmetic.cpp"), "-o", "/dev/null"], check=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The driver for any x86-64 processor. Like the emulated instructions it has no fused multiplication."""
    return build(tmp_path_factory.mktemp("driver") / "plain", TARGETS["x86-64"], "-O1")


@pytest.mark.parametrize("name", ["AVX-512 VNNI", "NEON with dot products"])
def test_outputs_do_not_depend_on_the_instructions(tmp_path, plain, name):
    """Whole networks and searches. `make arm` compares more of them, on every instruction set."""
    command = build(tmp_path / "driver", needed(TARGETS[name]), "-O1")
    model = lively_model(0, **SHAPES["pre-norm, GELU"])
    calls = random_calls(model, 6)
    exact, rounded = (Case(model, compute_type, calls) for compute_type in ("float32", "int8"))
    expected = exact.search(plain), rounded.search(plain)
    different = {tuple(output.tokens) for each in expected[0] for output in each}
    assert len(different) > 12, "too few to compare"
    assert agrees(exact.compare(expected[0], exact.search(command), plain), "float32", SCORES_AGREE)
    error = error_of_int8(*expected)
    assert error > 1e-3, "int8 changes nothing"
    assert agrees(rounded.compare(expected[1], rounded.search(command), plain), "int8", error)


@pytest.mark.parametrize("name", SANITIZERS)
def test_a_short_fuzz_finds_nothing(tmp_path, name):
    """`make sanitize` takes longer."""
    flags = SANITIZERS[name]
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() {}\n")
    if subprocess.run(["g++", *flags, str(trivial), "-o", str(tmp_path / "trivial")], check=False).returncode:
        pytest.skip(f"g++ is without {name} (on Debian it comes with libgcc-*-dev)")
    # GCC takes five times as long with optimisation and line numbers for instrumented code.
    command = build(tmp_path / "driver", Target([*program.compiler_flags(), *flags]), "-O0")
    fuzz(command, seconds=4, seed=0)
