"""The contenders: this package and its peers, each in a data type. Imports no library, for --help."""

from typing import Any, NamedTuple


class Contender(NamedTuple):
    """A program and its data type. With `same_batches` the peer gets our batches instead of those of its Trainer."""

    side: str
    dtype: str
    compiled: bool = False
    same_batches: bool = False

    def __str__(self) -> str:
        extras = [", compiled"] * self.compiled + [", our batches"] * self.same_batches
        return f"{self.side} {self.dtype}{''.join(extras)}"


DECODERS = {
    str(contender): contender
    for contender in (
        *(Contender("ours", dtype) for dtype in ("float32", "bfloat16", "int8")),
        *(Contender("ours", dtype, compiled=True) for dtype in ("float32", "int8")),
        Contender("stock", "float32"),
        *(Contender("MarianMTModel", dtype) for dtype in ("float32", "bfloat16")),
        *(Contender("Marian C++", dtype) for dtype in ("float32", "intgemm8", "packed8")),
        *(Contender("ctranslate2", dtype) for dtype in ("float32", "int8")),
    )
}
# The peers in tables of ratios -> the contenders of which the fastest counts.
PEERS = {
    "CTranslate2 int8": ["ctranslate2 int8"],
    "CTranslate2 float32": ["ctranslate2 float32"],
    "MarianMTModel": ["MarianMTModel float32", "MarianMTModel bfloat16"],
    "Marian C++": ["Marian C++ float32", "Marian C++ intgemm8", "Marian C++ packed8"],
}
# Bytes of a weight, and the type in which the machine's rate of products is measured.
TYPES = {
    "float32": (4, "float32"),
    "bfloat16": (2, "bfloat16"),
    "int8": (1, "int8"),
    "intgemm8": (1, "int8"),
    "packed8": (1, "int8"),
}


def contender_name(entry: dict[str, Any]) -> str:
    """The name of an entry's contender, as in the tables."""
    return str(Contender(*(entry[name] for name in Contender._fields)))
