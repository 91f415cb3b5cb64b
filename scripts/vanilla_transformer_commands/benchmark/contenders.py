"""Who is measured: this package and its peers, each in a type of numbers. Needs no library, as --help does."""

from typing import Any, NamedTuple


class Contender(NamedTuple):
    """Who works, and how. `same_batches` gives the peer our batches instead of those that its Trainer makes."""

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
# What the others' speed is divided by: the fastest of these.
PEERS = {
    "CTranslate2 int8": ["ctranslate2 int8"],
    "CTranslate2 float32": ["ctranslate2 float32"],
    "MarianMTModel": ["MarianMTModel float32", "MarianMTModel bfloat16"],
    "Marian C++": ["Marian C++ float32", "Marian C++ intgemm8", "Marian C++ packed8"],
}
# Bytes of a weight, and the type that the machine's rate of products is measured in.
TYPES = {
    "float32": (4, "float32"),
    "bfloat16": (2, "bfloat16"),
    "int8": (1, "int8"),
    "intgemm8": (1, "int8"),
    "packed8": (1, "int8"),
}


def contender_name(entry: dict[str, Any]) -> str:
    """The contender of an entry in the JSON, as the tables name it."""
    return str(Contender(*(entry[name] for name in Contender._fields)))
