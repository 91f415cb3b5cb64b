"""Text in, text out: the `translation` task for transformers' `pipeline()`, which transformers 5 has dropped.

The model was trained on sentences. So a text is split into sentences, these are translated in batches of similar
length, and the translations are joined with the text's own white space.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline, TextIteratorStreamer

from .decoding_arguments import FLAG, GENERATION_OPTIONS, Rule, refuse_wrong_values, whole_number
from .loading import refuse_other_tokenizer, text_fault
from .pipeline_batches import batches_by_length, longest_sentence
from .pipeline_sentences import as_one_sentence, space_after, split_sentences


# Number of batches that are read ahead from a generator or a dataset, to sort their sentences by length.
READ_AHEAD = 16
# Options for models of several directions.
LANGUAGES = ("src_lang", "tgt_lang")
# Options that are refused, with the one value that is accepted (None: none) and the reason. Either generate() takes
# them with an entry for each row, but the pipeline makes its own rows; or transformers 4's pipeline had them.
NOT_TAKEN: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        ("decoder_input_ids", "decoder_attention_mask", "required_phrases", "forbidden_phrases"),
        (
            None,
            "has an entry for each row, but the pipeline makes its own rows from the sentences: call the model's "
            "generate()",
        ),
    ),
    "return_text": (True, "can only be True: the pipeline returns text"),
    "return_tensors": (False, "can only be False: call the model's generate() for token ids"),
    "return_type": (1, "can only be 1, text: call the model's generate() for token ids"),
    "stop_sequence": (None, "is not supported: give its id as eos_token_id"),
    "framework": ("pt", "can only be 'pt'"),
}
TRUNCATION = Rule(
    lambda value: value in (True, False, "longest_first", "only_first", "do_not_truncate"), "True or False"
)
LANGUAGE = Rule(
    lambda value: (
        isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
    ),
    "a language, or a list with one for each text",
)
OWN_OPTIONS = {
    **dict.fromkeys(LANGUAGES, LANGUAGE),
    "split_sentences": FLAG,
    "batch_tokens": whole_number(1),
    "return_scores": FLAG,
    "clean_up_tokenization_spaces": FLAG,
    "truncation": TRUNCATION,
}


class TranslationPipeline(Pipeline):
    """
    Translates texts of any length: `pipeline("translation", model=...)`.

    A call takes a string, a list of strings, or a generator, a column of a dataset or a torch `Dataset` of strings, and
    returns what the translation pipeline of transformers 4 returned: for a string, a list with one dictionary, whose
    `translation_text` is the translation; for a list, a list of dictionaries; otherwise an iterator that yields for
    each text what a string returns, and reads ahead to fill 16 batches. Sentences of all inputs are sorted by length
    and translated together. White space stays as it was.

    Each of these options can be given to a call, or to `pipeline()` as the default for all calls:
        split_sentences (`bool`): False translates each text as one sentence. Default: True.
        truncation (`bool`): truncates sentences that are too long for learned positions. Otherwise they are an error.
            Default: False.
        batch_tokens (`int`): number of source tokens, padding included, translated together. A longer sentence is
            translated alone. It replaces `batch_size`. Default: 4096.
        return_scores (`bool`): adds `score`, the sum of generate()'s `sequences_scores` over a text's sentences. Needs
            more than one beam. Default: False.
        num_return_sequences (`int`): if above 1, each input gives a list of its best translations. The second best
            joins the second best of each sentence, and so on.
        clean_up_tokenization_spaces (`bool`): as in the tokenizer's `decode`. Default: the tokenizer's.
        src_lang, tgt_lang (`str`): for a model of several directions, the languages to translate from and into; or for
            each input one, as a list. Default: those of the task's name, then those of the tokenizer.
        All other arguments of `generate()`, except those with an entry for each row (`decoder_input_ids`,
            `required_phrases`, `forbidden_phrases`).
    Languages in the task's name (`"translation_en_to_de"`), as in transformers 4, have no effect on other models.

    Raises:
        ValueError: a sentence is too long for learned positions, a text has half of a surrogate pair, an option is
            wrong, a language is unknown or not given, or the tokenizer belongs to another model.
        TypeError: an input is not a string.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        refuse_other_tokenizer(self.tokenizer, self.model.config)
        named = re.fullmatch(r"translation_(\w+)_to_(\w+)", self.task or "")
        if named and getattr(self.tokenizer, "languages", []):
            for name, language in zip(LANGUAGES, named.groups(), strict=True):
                self._preprocess_params.setdefault(name, language)

    def __call__(self, inputs: str | Iterable[str], **options: Any) -> list | Iterator:
        # The base class looks for chat templates in the first element, which is missing here.
        if inputs == []:
            return []
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        elif isinstance(inputs, Iterable) and not isinstance(inputs, str | list | dict | Dataset):
            # The base class accepts generators, but not columns of `datasets`.
            inputs = (text for text in inputs)
        results = super().__call__(inputs, **options)
        if isinstance(inputs, list) and all(len(best) == 1 for best in results):
            return [best[0] for best in results]
        return results

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """
        Yields the translation of a text in pieces while it is decoded, by greedy search or sampling.

        Args:
            text: one text of any length.
            options: as for a call, except `num_beams` and options that need it.

        Raises:
            ValueError: `num_beams` is not 1, or as in a call.
        """
        if options.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={options['num_beams']}: only one beam can be streamed, so leave num_beams out")
        preprocess_params, options, decoding = self._sanitize_parameters(**options)
        options = {**self._forward_params, **options}
        options.pop("batch_tokens", None)
        prepared = self._prepared(text, 1, {**self._preprocess_params, **preprocess_params})
        rows, decoding = iter(prepared["input_ids"]), {**self._postprocess_params, **decoding}
        for number, (sentence, space) in enumerate(prepared["pieces"], start=1):
            translation = ""
            for piece in self._stream_sentence(next(rows), options, decoding) if sentence else ():
                translation += piece
                yield piece
            if number < len(prepared["pieces"]):
                space = space_after(translation, space)
            if space:
                yield space

    def _stream_sentence(self, ids: list[int], options: dict, decode_options: dict) -> Iterator[str]:
        """Decodes one sentence in a thread, and yields the streamer's text."""
        batch = self.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
        streamer = _CharacterStreamer(self.tokenizer, skip_special_tokens=True, **decode_options)
        with ThreadPoolExecutor(max_workers=1) as pool:
            decoding = pool.submit(self.forward, batch, streamer=streamer, **options)
            # Also after an error, or the loop below would wait forever.
            decoding.add_done_callback(lambda _: streamer.end())
            yield from filter(None, streamer)
            decoding.result()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Saves model, tokenizer and this file, so that `pipeline(model=..., trust_remote_code=True)` finds the task even
        without this package. To save the model's code too, call `register_for_auto_class()` of its class and its config
        first.
        """
        super().save_pretrained(save_directory, **kwargs)
        # A later checkpoint of this model, saved without the code, must not refer to it.
        vars(self.model.config).pop("custom_pipelines", None)

    def _sanitize_parameters(
        self,
        split_sentences: bool | None = None,
        batch_tokens: int | None = None,
        return_scores: bool | None = None,
        truncation: bool | str | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        src_lang: str | Sequence[str] | None = None,
        tgt_lang: str | Sequence[str] | None = None,
        **generate_options: Any,
    ) -> tuple[dict, dict, dict]:
        """Sorts the options by the stage that takes them."""
        for name, (harmless, why) in NOT_TAKEN.items():
            value = generate_options.pop(name, None)
            if value is not None and (harmless is None or value != harmless):
                raise ValueError(f"{name} {why}")
        languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        for name, given in languages.items():
            if given is not None and not getattr(self.tokenizer, "languages", []):
                raise ValueError(f"{name} is not supported: this model was not trained on several directions")
        preprocessing = {"split": split_sentences, "truncation": truncation, **languages}
        own: dict[str, Any] = {"batch_tokens": batch_tokens, "return_scores": return_scores}
        decoding = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        refuse_wrong_values(
            OWN_OPTIONS, {"split_sentences": split_sentences, "truncation": truncation, **languages, **own, **decoding}
        )
        refuse_wrong_values(GENERATION_OPTIONS, generate_options)
        preprocess_params, own, postprocess_params = (
            {name: value for name, value in options.items() if value is not None}
            for options in (preprocessing, own, decoding)
        )
        return preprocess_params, {**own, **generate_options}, postprocess_params

    def run_single(self, inputs: str, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> list:
        """The translations of one text."""
        (best,) = self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)
        return best

    def get_iterator(
        self,
        inputs: Iterable[str],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[list[dict]]:
        """Yields the translations of each text in order. A list is read at once, other inputs in parts."""
        if batch_size != 1:
            raise ValueError(f"batch_size={batch_size}: batches are limited by tokens, so give batch_tokens instead")
        options = dict(forward_params)
        batch_tokens = options.pop("batch_tokens", 4096)
        most = math.inf if isinstance(inputs, list) else READ_AHEAD * batch_tokens
        if isinstance(inputs, Dataset):
            inputs = DataLoader(inputs, batch_size=None, num_workers=num_workers)
        refuse_other_number(preprocess_params, inputs)
        read, tokens = [], 0
        for number, text in enumerate(inputs, start=1):
            read.append(self._prepared(text, number, preprocess_params))
            tokens += sum(map(len, read[-1]["input_ids"]))
            if tokens >= most:
                yield from self._translations(read, batch_tokens, options, postprocess_params)
                read, tokens = [], 0
        yield from self._translations(read, batch_tokens, options, postprocess_params)

    def _prepared(self, text: str, number: int, preprocess_params: dict) -> dict[str, list]:
        """Checks a text and calls `preprocess`. Errors give the text's number."""
        if not isinstance(text, str):
            raise TypeError(
                f"text {number} is not a string, but of type {type(text).__name__}: of a dataset, give one column, "
                'such as dataset["source"] or KeyDataset(dataset, "source")'
            )
        if fault := text_fault(text):
            raise ValueError(f"text {number} {fault}")
        languages = {
            name: given if isinstance(given, str) else given[number - 1]
            for name in LANGUAGES
            if (given := preprocess_params.get(name)) is not None
        }
        prepared = self.preprocess(text, **{**preprocess_params, **languages})
        longest = longest_sentence(self.model.config)
        for sentence, ids in enumerate(prepared["input_ids"], start=1):
            if longest is not None and len(ids) > longest:
                raise ValueError(
                    f"sentence {sentence} of text {number} has {len(ids)} tokens, but the model has learned positions "
                    f"for max_position_embeddings={longest}: split the sentence, or set truncation=True"
                )
        return prepared

    def preprocess(
        self, text: str, split: bool = True, truncation: bool | str = False, **languages: str
    ) -> dict[str, list]:
        """Splits a text into sentences with the white space after them (`pieces`), and tokenizes the non-empty ones."""
        pieces = split_sentences(text) if split else as_one_sentence(text)
        sentences = [sentence for sentence, _ in pieces if sentence]
        cut = {"truncation": truncation, "max_length": longest_sentence(self.model.config)} if truncation else {}
        options = {"return_attention_mask": False, **cut, **languages}
        ids = self.tokenizer(sentences, **options)["input_ids"] if sentences else []
        return {"pieces": pieces, "input_ids": ids}

    def _translations(
        self, texts: list[dict], batch_tokens: int, options: dict, decoding: dict
    ) -> Iterator[list[dict]]:
        """Translates the sentences of prepared texts, longest first, and yields the translations of each text."""
        rows = [ids for text in texts for ids in text["input_ids"]]
        best: list[list[tuple[str, float]]] = [[] for _ in rows]
        for batch in batches_by_length([len(row) for row in rows], batch_tokens):
            padded = self.tokenizer.pad({"input_ids": [rows[row] for row in batch]}, return_tensors="pt")
            outputs = self.forward(padded, **options)
            translations = self.tokenizer.batch_decode(outputs["sequences"], skip_special_tokens=True, **decoding)
            count = len(translations) // len(batch)
            for i, scored in enumerate(zip(translations, outputs["scores"].tolist(), strict=True)):
                best[batch[i // count]].append(scored)

        generation = self._get_set_generation_params(self._prepare_generate_kwargs(options))
        count = generation.get("num_return_sequences") or 1
        return_scores = options.get("return_scores", False)
        translated = iter(best)
        for text in texts:
            sentences = [next(translated) for _ in text["input_ids"]]
            yield self.postprocess({"pieces": text["pieces"], "best": sentences}, count, return_scores)

    def _forward(
        self, batch: dict, return_scores: bool = False, streamer: TextIteratorStreamer | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        """Returns generate()'s `sequences` and their `scores`, which are 0 unless `return_scores` is set."""
        overrides: dict[str, Any] = {"return_dict_in_generate": return_scores}
        if streamer is not None:
            overrides["num_beams"] = 1
        outputs = self.model.generate(**batch, streamer=streamer, **self._prepare_generate_kwargs(options, **overrides))
        if not return_scores:
            return {"sequences": outputs, "scores": torch.zeros(len(outputs))}
        if outputs.get("sequences_scores") is None:
            raise ValueError(
                "return_scores=True, but generate() returns no sequences_scores: set num_beams above 1 (if "
                "transformers' own search decodes, also set output_scores=True)"
            )
        return {"sequences": outputs.sequences, "scores": outputs.sequences_scores}

    def postprocess(self, translated: dict[str, list], count: int = 1, return_scores: bool = False) -> list[dict]:
        """Joins the best translations of all sentences, then the second best, and so on: `count` dictionaries."""
        pieces, best = translated["pieces"], translated["best"]
        records = []
        for rank in range(count):
            sentences = iter(best)
            text = ""
            for number, (sentence, space) in enumerate(pieces, start=1):
                translation = next(sentences)[rank][0] if sentence else ""
                text += translation + (space_after(translation, space) if number < len(pieces) else space)
            record: dict[str, Any] = {"translation_text": text}
            if return_scores:
                record["score"] = math.fsum(of[rank][1] for of in best)
            records.append(record)
        return records


def refuse_other_number(preprocess_params: dict[str, Any], inputs: Iterable[str]) -> None:
    """
    Raises:
        ValueError: there is another number of languages than of inputs.
    """
    for name in LANGUAGES:
        given = preprocess_params.get(name)
        if given is None or isinstance(given, str):
            continue
        if not isinstance(inputs, list):
            raise ValueError(f"{name} is a list, but the inputs are not: give one language for all")
        if len(given) != len(inputs):
            raise ValueError(f"{name} has {len(given)} languages for {len(inputs)} texts: give one for each")


class _CharacterStreamer(TextIteratorStreamer):
    """
    Emits text as soon as its last character is complete.

    transformers' own streamer waits for the next space, which many scripts do not have, and starts over after a line
    feed, which loses a space.
    """

    print_len: int

    def put(self, value: torch.Tensor) -> None:
        """Takes the next tokens of the only row."""
        self.token_cache.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if not text.endswith("\ufffd"):
            self.on_finalized_text(text[self.print_len :])
            self.print_len = len(text)
