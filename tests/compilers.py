"""What the compiled program of `generate(compiled=True)` needs of a machine."""

import shutil

import pytest

from vanilla_transformer.engine_program import COMPILERS


HAS_COMPILER = any(map(shutil.which, COMPILERS))
needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason=f"no C++ compiler on this machine ({', '.join(COMPILERS)})"
)
