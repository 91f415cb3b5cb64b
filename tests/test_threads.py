"""The number of threads follows the cgroup's quota, tested in other processes."""

import os
import re
import subprocess
import sys

import pytest
from processes import WITHOUT_PACKAGE

from vanilla_transformer.training.threads import cpu_quota


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # The host's path, in a container that sees its own part alone.
        ("0::/docker/0123", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/a\n2:memory:/b", {"cpu/a/cpu.cfs_quota_us": "25000", "cpu/a/cpu.cfs_period_us": "10000"}, 2.5),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)  # fmt: skip
def test_the_quota_is_the_least_of_the_cgroups_above_the_process(tmp_path, own, files, quota):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "own") == quota


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "missing") is None


def answer(program: str, **environment: str) -> str:
    """The output of another process with these environment variables, without OpenMP's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


FITTED = f"""
{WITHOUT_PACKAGE}
import torch
from vanilla_transformer.training import threads
from vanilla_transformer.training.program import run_program
before = torch.get_num_threads()
print(before)
threads.cpu_quota = lambda: 0.5
threads.fit_threads()
print(torch.get_num_threads())
torch.set_num_threads(before)
run_program(lambda _: print(torch.get_num_threads()), [])
"""


def test_a_program_has_as_many_threads_as_the_quota_holds():
    _, fitted, of_program = answer(FITTED).split()
    assert fitted == of_program == "1"


def test_the_user_s_own_number_of_threads_stays():
    torchs_own, fitted, of_program = answer(FITTED, OMP_NUM_THREADS="2").split()
    assert fitted == of_program == torchs_own


# The package's first lines are run, then torch is loaded.
WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
try:
    import vanilla_transformer
except ImportError:
    import torch
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="torch brings GNU's OpenMP, which reads GOMP_SPINCOUNT, on Linux only"
)
@pytest.mark.parametrize(
    ("environment", "turns", "program"),
    [
        ({}, "3000", "import vanilla_transformer"),
        ({"GOMP_SPINCOUNT": "5"}, "5", WITHOUT_TRANSFORMERS),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0", WITHOUT_TRANSFORMERS),
    ],
    ids=["ours", "the user's own number", "the user's own policy"],
)
def test_openmp_reads_how_long_a_thread_may_spin(environment, turns, program):
    """According to OpenMP, which prints it when torch is loaded."""
    settings = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    settings |= {"OMP_DISPLAY_ENV": "verbose"} | environment
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told)) == {turns}
