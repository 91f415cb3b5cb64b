"""What this machine lacks, in words: the contenders that it cannot measure are left out by name."""

import importlib.util
from collections.abc import Callable, Sequence

import torch

from vanilla_transformer.engine_products import is_native
from vanilla_transformer.engine_program import ProgramError, load
from vanilla_transformer.training.errors import UserError

from .contenders import Contender


def leave_out(found: Sequence[Contender], why_not: Callable[[Contender], str | None]) -> list[Contender]:
    """
    Those that this machine can measure. The others are printed, each with the reason.

    Raises:
        UserError: none is left.
    """
    reasons = {contender: why_not(contender) for contender in found}
    for contender, reason in reasons.items():
        if reason:
            print(f"left out: {contender}: {reason}", flush=True)
    if all(reasons.values()):
        raise UserError("no contender is left")
    return [contender for contender, reason in reasons.items() if not reason]


def why_not_trained(contender: Contender) -> str | None:
    """Why this machine does not train like this, in words; None if it does."""
    if contender.side == "Marian C++":
        return "it would have the CPU where the others have the GPU" if torch.cuda.is_available() else why_no_marian()
    if torch.cuda.is_available() or is_native(contender.dtype, torch.device("cpu")):
        return None
    return f"this processor has no instructions for {contender.dtype}, and emulates them"


def why_not_translated(contender: Contender) -> str | None:
    """Why this machine does not translate like this, in words; None if it does."""
    if contender.side == "ctranslate2":
        return why_no_ctranslate2(contender.dtype)
    if contender.side == "Marian C++":
        avx2 = torch.cpu.get_capabilities().get("avx2")
        return "it needs AVX2" if contender.dtype == "packed8" and not avx2 else why_no_marian()
    if contender.compiled:
        return why_no_program()
    if not is_native(contender.dtype, torch.device("cpu")):
        return f"torch has no fast product for {contender.dtype} on this processor"
    return None


def why_no_marian() -> str | None:
    """None where Marian is installed."""
    return None if importlib.util.find_spec("pymarian") else "pip install pymarian (a download of 600 MB)"


def why_no_ctranslate2(compute_type: str) -> str | None:
    """None where CTranslate2 is installed and computes so."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "pip install '.[bench]'"
    import ctranslate2

    found = ctranslate2.get_supported_compute_types("cpu")
    return None if compute_type in found else f"CTranslate2 has only {', '.join(sorted(found))} on this processor"


def why_no_program() -> str | None:
    """None where the compiled program can be had, which is compiled if need be."""
    try:
        load()
    except ProgramError as error:
        return str(error)
    return None
