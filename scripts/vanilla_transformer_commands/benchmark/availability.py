"""Finds the contenders that cannot be measured on this machine, and the reasons."""

import importlib.util
from collections.abc import Callable, Sequence

import torch

from vanilla_transformer.engine_products import is_native
from vanilla_transformer.engine_program import ProgramError, load
from vanilla_transformer.training.errors import UserError

from .contenders import Contender


def leave_out(found: Sequence[Contender], why_not: Callable[[Contender], str | None]) -> list[Contender]:
    """
    The contenders that can be measured here. The others are printed, each with the reason.

    Raises:
        UserError: no contender is left.
    """
    reasons = {contender: why_not(contender) for contender in found}
    for contender, reason in reasons.items():
        if reason:
            print(f"left out: {contender}: {reason}", flush=True)
    if all(reasons.values()):
        raise UserError("no contender can be measured on this machine")
    return [contender for contender, reason in reasons.items() if not reason]


def why_not_trained(contender: Contender) -> str | None:
    """The reason why this contender cannot train on this machine; None if it can."""
    if contender.side == "Marian C++":
        return "it would use the CPU, but the others use the GPU" if torch.cuda.is_available() else why_no_marian()
    if torch.cuda.is_available() or is_native(contender.dtype, torch.device("cpu")):
        return None
    return f"this processor has no instructions for {contender.dtype}, and would emulate it"


def why_not_translated(contender: Contender) -> str | None:
    """The reason why this contender cannot translate on this machine; None if it can."""
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
    """How to install Marian; None if it is installed."""
    return None if importlib.util.find_spec("pymarian") else "pip install pymarian (a download of 600 MB)"


def why_no_ctranslate2(compute_type: str) -> str | None:
    """The reason why CTranslate2 cannot compute in this type; None if it can."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "pip install '.[bench]'"
    import ctranslate2

    found = ctranslate2.get_supported_compute_types("cpu")
    return None if compute_type in found else f"CTranslate2 supports only {', '.join(sorted(found))} here"


def why_no_program() -> str | None:
    """The reason why there is no compiled program; None if there is one. It is compiled first if necessary."""
    try:
        load()
    except ProgramError as error:
        return str(error)
    return None
