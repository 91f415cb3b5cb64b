"""The tables that the benchmark prints."""

import statistics
from typing import Any

from .contenders import contender_name


def table(rows: list[dict[str, str]]) -> str:
    """A table of `rows`, whose keys are the headers. The first column is left-aligned, the others right-aligned."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[word.rjust(width) for word, width in zip(line, widths, strict=True)] for line in lines]
    for words, line in zip(padded, lines, strict=True):
        words[0] = line[0].ljust(widths[0])
    return "\n".join(map("  ".join, padded))


def in_mib(size: int | None) -> str:
    """Bytes in MiB, or a dash if unknown."""
    return "-" if size is None else f"{size / 2**20:,.0f}"


def speed_table(result: dict[str, Any]) -> str:
    """One line for each contender, then the machine's limits."""
    rows = [
        {
            "": contender_name(entry),
            "target tokens/s": f"{entry['tokens_per_second']:,.0f}",
            **{f"x {peer}": f"{ratio:.2f}" for peer, ratio in entry["ratios"].items()},
            "MiB beyond state": in_mib(entry["memory_beyond_state"]),
            "of the limit": f"{entry['share_of_limit']:.1%}",
        }
        for entry in result["contenders"]
    ]
    ceilings = [
        f"limit: {statistics.median(rates) / 1e9:,.0f} GFLOP/s in matrix products of {dtype}"
        for dtype, rates in result["ceilings"].items()
    ]
    return "\n".join([table(rows), *ceilings])


def loss_table(result: dict[str, Any]) -> str:
    """One line for each contender; losses in nats per target token of the validation text."""
    return table([
        {
            "": contender_name(entry),
            "tokens": f"{entry['tokens']:,}",
            "updates": f"{entry['updates']:,}",
            "NLL before": f"{entry['before']['nll']:.4f}",
            "NLL after": f"{entry['after']['nll']:.4f}",
            "smoothed after": f"{entry['after']['smoothed']:.4f}",
        }
        for entry in result["contenders"]
    ])  # fmt: skip


def decoding_table(result: dict[str, Any]) -> str:
    """One line for each contender. Memory is the increase while decoding, and the total."""
    step, parts = ("step", result["new_tokens"]) if result["new_tokens"] else ("sentence", result["sentences"])
    return table([
        {
            "": contender_name(entry),
            "tokens/s": f"{entry['tokens_per_second']:,.1f}",
            f"ms/{step}": f"{1000 * entry['seconds'] / parts:.2f}",
            **{f"x {peer}": f"{ratio:.2f}" for peer, ratio in entry.get("ratios", {}).items()},
            "of the limit": f"{entry['share_of_limit']:.0%}",
            "MiB decoding": f"{entry['memory'] / 2**20:,.1f}",
            "MiB in all": f"{(entry['held'] + entry['memory']) / 2**20:,.0f}",
            **({"BLEU": f"{entry['bleu']:.2f}"} if "bleu" in entry else {}),
        }
        for entry in result["contenders"]
    ])  # fmt: skip


def memory_table(cells: dict[str, dict[str, Any]]) -> str:
    """One line for each cell, one column for each contender."""
    return table([
        {"MiB decoding": cell, **{contender_name(e): f"{e['memory'] / 2**20:,.1f}" for e in result["contenders"]}}
        for cell, result in cells.items()
    ])  # fmt: skip
