"""Runs transformers' own model tests on this package and on Marian, its nearest relative: `make conformance`.

The tests ship in the source distribution of transformers, which pip downloads once for the installed version into
.conformance/. They are never committed. Arguments go on to pytest, such as `-k save_load` or `-n 2`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).parents[2] / ".conformance"
TESTS = CACHE / "transformers_tests"

# What the common tests import, but the source distribution leaves out: tests of export to other formats and of
# `generate()`. The mixins stand empty; tests/test_generation_vanilla_transformer.py covers `generate()`.
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}


def fetch_tests() -> None:
    """Unpacks the common tests of the installed transformers as the package `transformers_tests`."""
    release = f"transformers-{version('transformers')}"
    source = CACHE / f"{release}.tar.gz"
    if not source.exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", CACHE, release.replace("-", "==")], check=True)
    if not TESTS.exists():
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.name.startswith(f"{release}/tests/")]
            archive.extractall(CACHE, members, filter="data")
        for path, text in LEFT_OUT.items():
            file = CACHE / release / "tests" / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        (CACHE / release / "tests").rename(TESTS)


if __name__ == "__main__":
    fetch_tests()
    command = [sys.executable, "-m", "pytest", Path(__file__).parent, "-q", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CACHE)}).returncode)
