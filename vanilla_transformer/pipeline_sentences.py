"""Splits a text in any script into sentences, so that each can be translated by itself.

The rules are the sentence boundaries of Unicode's UAX #29, with more care for abbreviations.
"""

import re


# Characters of Unicode's Sentence_Terminal that always end a sentence: Chinese and Japanese, Devanagari, Arabic,
# Urdu, Armenian, Syriac, N'Ko, Ethiopic, Khmer, Myanmar, Mongolian.
UNSPACED = "。｡！？﹖﹗।॥\u061f\u061e\u06d4։\u0700\u0701\u0702\u07f9።፧፨។៕။᠃᠉"
# These end a sentence only before white space, because they also occur in numbers and names. Between them and the white
# space there may be characters of CLOSING.
TERMINATORS = ".!?‼‽⁇⁈⁉．﹒" + UNSPACED
CLOSING = "\"'’”»«“›‹)]}」』】〉》）］｝｠｣〕〗〙〛"
OPENING = "\"'‘’“”„‚«»‹›([{¿¡「『"
# A sentence does not begin with these (rule SB8a of UAX #29), nor with closing brackets.
CONTINUING = ",;:-–—،、，；：)]}»›" + TERMINATORS
NO_BREAK_SPACES = "\u00a0\u2007\u202f"
# A word with its punctuation, or unspaced text up to the end of a sentence; then the white space after it.
_FULL_STOP = rf"(?:[{UNSPACED}]|[．﹒](?!\d))"
_WORD = re.compile(rf"(\S*?{_FULL_STOP}++(?![{re.escape(TERMINATORS + CLOSING)}])|\S+)(\s*)")
_LINE_BREAK = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
# A full stop after these ends no sentence, even before a capital letter: initials, ordinals, titles and the like. The
# list need not be complete. Joining two sentences does less harm than splitting one.
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
    not before a lower-case letter, nor after an initial, an abbreviation with inner full stops, a number of one or two
    digits (`3. März`) or a title; and after the full stops of scripts without spaces. No-break spaces never end a
    sentence.

    Returns:
        Pairs of sentence and white space, whose concatenation is the text. White space at the start of the text follows
        an empty sentence. No other sentence is empty.
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
    # Georgian has no capital letters, but Unicode classifies its letters as lower case.
    continues = following in CONTINUING or (following.islower() and not "\u10d0" <= following <= "\u10ff")
    word = word.rstrip(CLOSING)
    if continues or space[0] in NO_BREAK_SPACES or not word.endswith(tuple(TERMINATORS)):
        return False
    if not word.endswith(".") or word.endswith(".."):
        return True
    return not _ABBREVIATION.fullmatch(word[:-1].lstrip(OPENING))


def as_one_sentence(text: str) -> list[tuple[str, str]]:
    """As `split_sentences`, but treats the text as one sentence."""
    sentence = text.strip()
    if not sentence:
        return [("", text)] if text else []
    before, _, after = text.partition(sentence)
    return [("", before), (sentence, after)] if before else [(sentence, after)]


def space_after(translation: str, space: str) -> str:
    """The white space after a translation: `space`, or a space if the source needed none but the translation does."""
    if space or not translation or translation.rstrip(CLOSING).endswith(tuple(UNSPACED)):
        return space
    return " "
