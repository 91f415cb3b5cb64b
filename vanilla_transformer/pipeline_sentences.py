"""Where the sentences of a text end, in any script, so that each can be translated by itself.

The rules are the sentence boundaries of Unicode's UAX #29, made more careful of abbreviations.
"""

import re


# Unicode's Sentence_Terminal that end a sentence wherever they stand: Chinese and Japanese, Devanagari, Arabic,
# Urdu, Armenian, Syriac, N'Ko, Ethiopic, Khmer, Myanmar, Mongolian.
UNSPACED = "。｡！？﹖﹗।॥\u061f\u061e\u06d4։\u0700\u0701\u0702\u07f9።፧፨។៕။᠃᠉"
# These do so before white space only, as they also stand in numbers and names, ...
TERMINATORS = ".!?‼‽⁇⁈⁉．﹒" + UNSPACED
# ... and with these between.
CLOSING = "\"'’”»«“›‹)]}」』】〉》）］｝｠｣〕〗〙〛"
OPENING = "\"'‘’“”„‚«»‹›([{¿¡「『"
# A sentence does not begin with these (rule SB8a of UAX #29), nor with what closes.
CONTINUING = ",;:-–—،、，；：)]}»›" + TERMINATORS
NO_BREAK_SPACES = "\u00a0\u2007\u202f"
# A word with its punctuation, or a stretch of unspaced text up to the end of a sentence; and the white space after it.
_FULL_STOP = rf"(?:[{UNSPACED}]|[．﹒](?!\d))"
_WORD = re.compile(rf"(\S*?{_FULL_STOP}++(?![{re.escape(TERMINATORS + CLOSING)}])|\S+)(\s*)")
_LINE_BREAK = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
# The full stop of these ends no sentence, though a capital letter follows: initials, ordinals, titles and the like. Two
# sentences in one do less harm than one cut in two, but the list needs not be complete.
_ABBREVIATION = re.compile(
    r"""(?:[^\W\d_]\.)*[^\W\d_] | \d{1,2}
    | Mr|Mrs|Ms|Mx|Dr|Prof|St|Mt|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|Fig|vs  # English
    | Hr|Fr|Frl|Nr|Abs|bzw|ca|Mme|Mlle|Mgr|Sr|Sra|Srta|Ing|Sig|Dhr|Mevr          # other languages
    """,
    re.VERBOSE,
)


def split_sentences(text: str) -> list[tuple[str, str]]:
    """
    The sentences of a text, each with the white space that follows it.

    A sentence ends at a line break; after `.`, `!`, `?` and closing quotes and brackets where white space follows, but
    not before a small letter, nor after an initial, an abbreviation with inner full stops, a number of one or two
    digits (`3. März`) or a title; and after the full stops of scripts that put no space behind them. This is the
    sentence boundary of Unicode's UAX #29, made more careful of abbreviations. No-break spaces end nothing.

    Returns:
        Sentence and white space in turns: their concatenation is the text. White space that the text begins with
        follows an empty sentence; no other sentence is empty.
    """
    start = len(text) - len(text.lstrip())
    pieces = [("", text[:start])] if start else []
    for match in _WORD.finditer(text, start):
        word, space = match.groups()
        following = text[match.end() : match.end() + 1]
        if not following or _ends_sentence(word, space, following):
            pieces.append((text[start : match.end(1)], space))
            start = match.end()
    return pieces


def _ends_sentence(word: str, space: str, following: str) -> bool:
    """Whether a sentence ends with this word, the white space after it, and the first character after that."""
    if not space or _LINE_BREAK.search(space):
        return True
    # Georgian has no capital letters, though Unicode has its letters as small ones.
    continues = following in CONTINUING or (following.islower() and not "\u10d0" <= following <= "\u10ff")
    word = word.rstrip(CLOSING)
    if continues or space[0] in NO_BREAK_SPACES or not word.endswith(tuple(TERMINATORS)):
        return False
    if not word.endswith(".") or word.endswith(".."):
        return True
    return not _ABBREVIATION.fullmatch(word[:-1].lstrip(OPENING))


def as_one_sentence(text: str) -> list[tuple[str, str]]:
    """As `split_sentences`, of a text that is one sentence."""
    sentence = text.strip()
    if not sentence:
        return [("", text)] if text else []
    before, _, after = text.partition(sentence)
    return [("", before), (sentence, after)] if before else [(sentence, after)]


def space_after(translation: str, space: str) -> str:
    """The white space before the next sentence: a blank where the source needed none, and the translation needs one."""
    if space or not translation or translation.rstrip(CLOSING).endswith(tuple(UNSPACED)):
        return space
    return " "
