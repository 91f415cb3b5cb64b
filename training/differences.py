"""The rows that two systems translate most differently, judged by the chrF of each sentence, as tables to read.

chrF judges one sentence better than BLEU does, which was made for a whole text, and works for words as for phones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import sacrebleu

from .files import write_beside
from .metrics import References


# Rows that are printed for each of the two systems, and rows of a Markdown table.
PRINTED, IN_MARKDOWN = 3, 50
SUFFIXES = (".tsv", ".md")


class Difference(NamedTuple):
    """One row: its number from 1, the sentence's chrF for each system, and the texts."""

    row: int
    our_chrf: float
    their_chrf: float
    source: str
    references: list[str]
    ours: str
    theirs: str

    @property
    def gain(self) -> float:
        """By how much ours is better."""
        return self.our_chrf - self.their_chrf


def find_differences(
    sources: Sequence[str], references: References, ours: Sequence[str], theirs: Sequence[str]
) -> list[Difference]:
    """The rows with different translations, the largest difference of chrF first, whichever system is better."""
    chrf, found = sacrebleu.CHRF(), []
    for row, (source, given, our, their) in enumerate(zip(sources, references, ours, theirs, strict=True), 1):
        if our != their:
            texts = [given] if isinstance(given, str) else [text for text in given if text is not None]
            our_chrf, their_chrf = (chrf.sentence_score(text, texts).score for text in (our, their))
            found.append(Difference(row, our_chrf, their_chrf, source, texts, our, their))
    return sorted(found, key=lambda difference: -abs(difference.gain))


def format_differences(name: str, other: str, differences: Sequence[Difference]) -> str:
    """The largest differences as text to print: first where our system is better, then where the other is."""
    width = max(len(name), len(other), len("reference"))
    lines = [f"{len(differences):,} rows with different translations"]
    for better, worse, sign in ((name, other, 1), (other, name, -1)):
        chosen = [difference for difference in differences if sign * difference.gain > 0][:PRINTED]
        for found in chosen:
            lines.append(
                f"row {found.row}: {better} is better than {worse} by {abs(found.gain):.1f} chrF "
                f"({found.our_chrf:.1f} and {found.their_chrf:.1f})"
            )
            texts = [("source", found.source), *(("reference", text) for text in found.references)]
            lines += [
                f"  {label:<{width}}  {text}" for label, text in [*texts, (name, found.ours), (other, found.theirs)]
            ]
    return "\n".join(lines)


def write_differences(path: str | Path, name: str, by_other: dict[str, list[Difference]]) -> None:
    """
    Writes the differences from each other system as one table.

    Args:
        path: ends in .tsv, which gets all rows; or in .md, which gets the first `IN_MARKDOWN` of each system.
        name: our system.
        by_other: what `find_differences` found, by the other's name.
    """
    markdown = Path(path).suffix == ".md"
    header = [
        "other",
        "row",
        "gain in chrF",
        "chrF",
        "other's chrF",
        "source",
        "references",
        name,
        "other's translation",
    ]
    rows = [header] + ([["---"] * len(header)] if markdown else [])
    for other, differences in by_other.items():
        for found in differences[: IN_MARKDOWN if markdown else None]:
            numbers = (f"{found.gain:+.1f}", f"{found.our_chrf:.1f}", f"{found.their_chrf:.1f}")
            references = " / ".join(found.references)
            rows.append([other, str(found.row), *numbers, found.source, references, found.ours, found.theirs])
    # A cell is one line, and holds no separator.
    lines = [[" ".join(cell.split()) for cell in row] for row in rows]
    if markdown:
        lines = [["", *(cell.replace("|", "\\|") for cell in row), ""] for row in lines]
    separator = " | " if markdown else "\t"
    write_beside(path, "".join(separator.join(row).strip(" ") + "\n" for row in lines))
