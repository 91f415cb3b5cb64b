"""Many languages in one model: a token before the source names the language to translate into (Johnson et al., 2017).

`<2de> Hello world </s>` asks for German. The token is written as in that paper (https://arxiv.org/abs/1611.04558,
section 3). It is in the source and not, as in M2M100 or mBART, the first token of the target: so the direction of a row
is in its `input_ids`, a batch may mix directions, and no search needs to know of languages.

Text cannot write such a token: `<2de>` in a text is encoded as text.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import processors
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Such as de, pt-BR, zh_Hans, sr@latin.
LANGUAGE_CODE = re.compile(r"[\w@-]+")


def language_token(code: str) -> str:
    """The token that asks for a language."""
    return f"<2{code}>"


def multilingual(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer of any kind has languages, so that it needs the target language."""
    return bool(getattr(tokenizer, "languages", []))


class MultilingualTokenizer(PreTrainedTokenizerFast):
    """
    A tokenizer that puts the token of the target language before each source.

        tokenizer.tgt_lang = "de"
        tokenizer(["Hello", "Good morning"])
        tokenizer(["Hello", "Good morning"], tgt_lang=["de", "fr"])  # a language for each row

    `tgt_lang` is the default of all calls, as in transformers' multilingual tokenizers, and is saved. An argument of a
    call overrides it. `src_lang` is checked but does not change the ids: the model reads the language from the text.
    Targets (`text_target=`) have no such token. Without languages this is an ordinary tokenizer.

    Args:
        languages: codes of the languages that the model translates into.
        source_languages: codes of those that it translates from.
        src_lang, tgt_lang: the default direction.

    Raises:
        ValueError: a language is unknown, or not a code; in a call also: no target language is given.
    """

    def __init__(
        self,
        *args: Any,
        languages: Iterable[str] = (),
        source_languages: Iterable[str] = (),
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,
    ):
        self.languages: list[str] = []
        self.source_languages: list[str] = []
        self._source_language: str | None = None
        self._target_language: str | None = None
        self._encodes_targets = False
        super().__init__(*args, **options)
        self.add_languages(languages, source_languages)
        if src_lang is not None:
            self.src_lang = src_lang
        if tgt_lang is not None:
            self.tgt_lang = tgt_lang

    def add_languages(self, languages: Iterable[str], source_languages: Iterable[str] = ()) -> int:
        """
        Adds target languages, each with a token of its own, and source languages, which need none.

        If a model has no room for the new tokens: `model.resize_token_embeddings(len(tokenizer))`.

        Returns:
            The number of tokens that are new.

        Raises:
            ValueError: a language is not a code.
        """
        languages, source_languages = list(languages), list(source_languages)
        for language in languages + source_languages:
            if not isinstance(language, str) or not LANGUAGE_CODE.fullmatch(language):
                raise ValueError(f"language {language!r} is not a code such as de, pt-BR or zh_Hans")
        self.languages += [code for code in dict.fromkeys(languages) if code not in self.languages]
        self.source_languages += [code for code in dict.fromkeys(source_languages) if code not in self.source_languages]
        if not self.languages:
            return 0
        tokens = len(self)
        self.add_tokens([language_token(code) for code in self.languages], special_tokens=True)
        # Saved in tokenizer_config.json, with the present values.
        self.init_kwargs |= dict.fromkeys(("languages", "source_languages", "src_lang", "tgt_lang"))
        self._set_mode(targets=False)
        return len(self) - tokens

    @property
    def src_lang(self) -> str | None:
        """The default source language."""
        return self._source_language

    @src_lang.setter
    def src_lang(self, language: str | None) -> None:
        self._refuse_unknown("src_lang", language, self.source_languages)
        self._source_language = language

    @property
    def tgt_lang(self) -> str | None:
        """The default target language."""
        return self._target_language

    @tgt_lang.setter
    def tgt_lang(self, language: str | None) -> None:
        self._refuse_unknown("tgt_lang", language, self.languages)
        self._target_language = language
        if self.languages:
            self._set_mode(targets=False)

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The id of each target language's token."""
        return {code: self.get_lang_id(code) for code in self.languages}

    def get_lang_id(self, lang: str) -> int:
        """The id of a target language's token."""
        self._refuse_unknown("language", lang, self.languages)
        return self.convert_tokens_to_ids(language_token(lang))

    def _refuse_unknown(self, name: str, given: str | Sequence[str] | None, known: list[str]) -> None:
        """Raises a ValueError that lists the known languages."""
        if given is None:
            return
        if not self.languages:
            raise ValueError(f"{name}={given!r}, but this model translates in one direction only: leave {name} out")
        for language in dict.fromkeys([given] if isinstance(given, str) else given):
            # The source languages of a tokenizer may be unknown.
            if known and language not in known:
                raise ValueError(f"{name}={language!r} is unknown: choose one of {', '.join(known)}")

    def _switch_to_input_mode(self) -> None:
        """Called by transformers before it encodes sources."""
        if self._encodes_targets:
            self._set_mode(targets=False)

    def _switch_to_target_mode(self) -> None:
        """Called by transformers before it encodes `text_target`."""
        if self.languages:
            self._set_mode(targets=True)

    def _set_mode(self, targets: bool) -> None:
        """Sets the special tokens around a text: a language's before a source, and eos after it."""
        self._encodes_targets = targets
        before = [] if targets else [language_token(self._target_language or self.languages[0])]
        eos = str(self.eos_token)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", eos],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in (*before, eos)],
        )

    def _build_translation_inputs(
        self, raw_inputs: Any, *args: Any, src_lang: str | None = None, tgt_lang: str | None = None, **options: Any
    ) -> BatchEncoding:
        """The inputs of `generate()`, for code that is written for transformers' multilingual tokenizers."""
        return self(raw_inputs, *args, src_lang=src_lang, tgt_lang=tgt_lang, **options)

    def _encode_plus(
        self,
        text: Any,
        *args: Any,
        src_lang: str | Sequence[str] | None = None,
        tgt_lang: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """As in transformers. `src_lang` and `tgt_lang` are a language for all rows, or one for each."""
        self._refuse_unknown("src_lang", src_lang, self.source_languages)
        self._refuse_unknown("tgt_lang", tgt_lang, self.languages)
        if not self.languages or self._encodes_targets or not options.get("add_special_tokens", True):
            return super()._encode_plus(text, *args, **options)
        if tgt_lang is None:
            if self._target_language is None:
                raise ValueError(f"tgt_lang is not set: choose one of {', '.join(self.languages)}")
            return super()._encode_plus(text, *args, **options)
        tensors = options.pop("return_tensors", None)
        encoded = super()._encode_plus(text, *args, **options)
        return self._redirected(encoded, tgt_lang, tensors)

    def _redirected(self, encoded: BatchEncoding, tgt_lang: str | Sequence[str], tensors: Any) -> BatchEncoding:
        """
        Replaces the token of the default language by that of each row's own.

        Shared state stays as it is, so that threads may translate into different languages.
        """
        default = self.get_lang_id(self._target_language or self.languages[0])
        is_batch = bool(encoded["input_ids"]) and isinstance(encoded["input_ids"][0], list)
        rows = encoded["input_ids"] if is_batch else [encoded["input_ids"]]
        # A text that was split at max_length has several rows.
        owners = encoded.get("overflow_to_sample_mapping", range(len(rows)))
        texts = max(owners, default=-1) + 1
        codes = [tgt_lang] * texts if isinstance(tgt_lang, str) else tgt_lang
        if len(codes) != texts:
            raise ValueError(
                f"tgt_lang has {len(codes)} languages for {texts} texts: give one for each, or one for all"
            )
        encodings = []
        for row, owner, encoding in zip(rows, owners, encoded.encodings or (), strict=True):
            token = language_token(codes[owner])
            # No text holds this id, so it is the token before the text.
            place = row.index(default)
            row[place] = self.convert_tokens_to_ids(token)
            encodings.append(_Redirected(encoding, row, place, token))
        return BatchEncoding(dict(encoded), encodings, tensor_type=tensors, prepend_batch_axis=not is_batch)


class _Redirected:
    """An encoding of the library `tokenizers`, whose objects cannot be changed, with another token at one place."""

    def __init__(self, encoding: Any, ids: list[int], place: int, token: str):
        self.encoding, self.ids, self.place, self.token = encoding, ids, place, token

    @property
    def tokens(self) -> list[str]:
        """The token of each id."""
        return [*self.encoding.tokens[: self.place], self.token, *self.encoding.tokens[self.place + 1 :]]

    def __getattr__(self, name: str) -> Any:
        # Looked up by pickle before there is an `encoding`.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.encoding, name)
