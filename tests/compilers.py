"""What the compiled program of `generate(compiled=True)` needs of a machine."""

import shutil

import pytest
import torch


HAS_COMPILER = shutil.which("g++") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="the program is compiled by g++, which is missing")
needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="the program's int8 needs AVX-512 VNNI instructions"
)
