"""Filters for bad training pairs, and the report of what they skip.

The tests follow Moses' clean-corpus-n.perl and fairseq's scripts for WMT (length, ratio, identical and duplicate
pairs), plus one for wrong encodings. Each test sees one pair, so streams can be filtered too.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import ftfy
import numpy as np
from datasets import Dataset

from ..errors import DataError
from ..settings.arguments import DataArguments
from ..words import counted


# Reasons, in the words of the report -> tests of (source, target), or of their numbers of tokens.
Tests = dict[str, Callable[[Any, Any], bool]]

CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # not tab, line feed, carriage return
# At this probability py3langid took none of 6,000 lines of Multi30k for another language, and found 88 % of the English
# lines where German was named.
SURE = 0.9
UNREADABLE = re.compile(f"\ufffd|{CONTROL}")


def is_empty(source: str, target: str) -> bool:
    """Whether a side is empty or only white space."""
    return not source.strip() or not target.strip()


def is_identical(source: str, target: str) -> bool:
    """Whether both sides are the same text, which was not translated."""
    return source.strip() == target.strip()


def is_badly_encoded(*texts: str) -> bool:
    """
    Whether one of the texts was decoded with the wrong encoding.

    The signs are U+FFFD (which decoders write for invalid bytes), control characters, and UTF-8 that was read as
    another encoding ("Ã¼" for "ü"), which the library ftfy detects.
    """
    return any(UNREADABLE.search(text) or ftfy.fix_encoding(text) != text for text in texts)


class Duplicates:
    """Detects repeated pairs. Stores a 64-bit hash of each pair, some 80 bytes of memory."""

    def __init__(self):
        self._seen: set[bytes] = set()

    def __call__(self, source: str, target: str) -> bool:
        pair = f"{len(source)} {source}{target}".encode()
        digest = hashlib.blake2b(pair, digest_size=8).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


def text_tests(data: DataArguments) -> Tests:
    """The tests of a pair's text that `data` asks for, in order. Each call starts with no known duplicates."""
    tests: Tests = {"an empty side": is_empty}
    if data.drop_bad_encoding:
        tests["a wrong encoding"] = is_badly_encoded
    if data.drop_identical:
        tests["identical sides"] = is_identical
    if data.drop_duplicates:
        tests["a pair that came before"] = Duplicates()
    return tests | language_tests(data)


def language_tests(data: DataArguments) -> Tests:
    """
    The tests of the languages of a pair, if `data` asks for them. py3langid identifies a language, 1 ms a text; a text
    fails if another language than the named one has a probability of SURE.

    Raises:
        DataError: py3langid is not installed, or does not know a language.
    """
    languages = {"source": data.source_lang, "target": data.target_lang} if data.identify_languages else {}
    tests: Tests = {}
    for index, (side, code) in enumerate(languages.items()):
        if code is None:
            continue
        language, known = re.split("[-_]", code)[0].lower(), _identifier().labels
        if language not in known:
            listed = ", ".join(sorted(known))
            raise DataError(f"identify_languages: {side}_lang={code} is unknown to py3langid: it knows {listed}")
        tests[f"a {side} in another language than {code}"] = partial(_is_in_another, index, language)
    return tests


def _is_in_another(index: int, language: str, *pair: str) -> bool:
    found, probability = _identifier().classify(pair[index])
    return bool(found != language and probability >= SURE)


@cache
def _identifier() -> Any:
    """The identifier of languages, which takes a second to load."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("identify_languages: install py3langid (pip install py3langid)") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def length_limits(data: DataArguments) -> Tests:
    """The tests of a pair's numbers of tokens, eos included, against the maximum lengths."""
    longest_source, longest_target = data.max_source_length, data.max_target_length
    return {
        f"more than max_source_length={longest_source} tokens": lambda source, _: source > longest_source,
        f"more than max_target_length={longest_target} tokens": lambda _, target: target > longest_target,
    }


def ratio_limit(data: DataArguments) -> Tests:
    """The test of a pair's numbers of tokens against each other, as in Moses without eos, if `data` asks for it."""
    ratio = data.max_length_ratio
    if ratio is None:
        return {}
    return {
        f"a length ratio over max_length_ratio={ratio:g}": lambda source, target: (
            max(source, target) - 1 > ratio * (min(source, target) - 1)
        )
    }


def find_fault(tests: Tests, source: Any, target: Any) -> str | None:
    """The first reason to skip a pair, or None."""
    return next((reason for reason, fails in tests.items() if fails(source, target)), None)


class FilterReport:
    """
    Counts rows, and for each reason the skipped rows and the number, from 1, of the first.

    Args:
        name: of what the rows are, in the log.
    """

    def __init__(self, name: str = "train"):
        self.name = name
        self.rows = 0
        self.left_out: dict[str, tuple[int, int]] = {}
        # Numbers of the remaining rows, for later tests; None before the first test.
        self.numbers: np.ndarray | None = None

    @property
    def kept(self) -> int:
        """How many rows are left."""
        return self.rows - sum(count for count, _ in self.left_out.values())

    def add(self, reason: str, row: int) -> None:
        """Counts a row that is left out."""
        count, first = self.left_out.get(reason, (0, row))
        self.left_out[reason] = count + 1, first

    def __str__(self) -> str:
        lines = [f"kept {self.kept:,} of {counted(self.rows, 'row')}"]
        if self.left_out:
            lines += ["  left out  first row  because of"]
        lines += [f"{count:>10} {first:>10}  {reason}" for reason, (count, first) in self.left_out.items()]
        return "\n".join(lines)


def filter_rows(rows: Dataset, tests: Tests, values: Iterable[tuple[Any, Any]], report: FilterReport) -> Dataset:
    """
    Leaves out the rows that fail a test.

    Args:
        rows: a data set.
        tests: of `text_tests` or `length_limits`.
        values: for each row the two that are tested: texts, or numbers of tokens.
        report: counts the skipped rows. A second call continues with the rows that the first one kept.

    Returns:
        Those of the rows that pass all tests.
    """
    if report.numbers is None:
        report.rows, report.numbers = len(rows), np.arange(1, len(rows) + 1)
    keep = np.ones(len(rows), dtype=bool)
    for index, (source, target) in enumerate(values):
        reason = find_fault(tests, source, target)
        if reason is not None:
            keep[index] = False
            report.add(reason, int(report.numbers[index]))
    report.numbers = report.numbers[keep]
    return rows if keep.all() else rows.select(np.flatnonzero(keep))
