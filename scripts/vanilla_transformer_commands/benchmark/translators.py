"""Functions that translate a task with each contender."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationMixin

from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS
from vanilla_transformer.training.metrics import score_texts
from vanilla_transformer.training.saved_model import load_model

from .contenders import Contender
from .meters import clock, memory, reset_peak


def build_decoder(contender: Contender, model_folder: str, folder: Path, threads: int) -> tuple[Any, Any]:
    """The tokenizer, and a function that turns a task into a function that translates it into rows of ids."""
    if contender.side == "ctranslate2":
        import ctranslate2

        # It converts the weights to this type when it loads them.
        options = {"compute_type": contender.dtype, "inter_threads": 1, "intra_threads": threads}
        translator = ctranslate2.Translator(str(folder / "ctranslate2"), **options)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        return tokenizer, partial(by_ctranslate2, translator, tokenizer)
    if contender.side == "Marian C++":
        from pymarian import Translator

        form = "npz" if contender.dtype == "float32" else "bin"
        vocabulary = str(folder / "marian" / "vocabulary.txt")
        translator = Translator(
            models=str(folder / "marian" / f"{contender.dtype}.{form}"),
            vocabs=[vocabulary, vocabulary],
            cpu_threads=threads,
            quiet="true",
        )
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        return tokenizer, partial(by_marian, translator, tokenizer)
    model, tokenizer = load_model(model_folder)
    if contender.side == "MarianMTModel":
        from vanilla_transformer.conversion.marian import to_marian

        model = to_marian(model).eval().to(getattr(torch, contender.dtype))
    generate = model.generate
    if contender.side == "stock":
        generate = partial(GenerationMixin.generate, model)
    elif contender.side == "ours":
        generate = partial(generate, compute_type=contender.dtype, compiled=contender.compiled)
    return tokenizer, partial(by_transformers, generate, tokenizer)


def by_transformers(generate: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Makes batches in the order of the sentences. The search is the one that CTranslate2 has."""
    options = {"num_beams": task["beams"], "min_new_tokens": task["new_tokens"]}
    if task["beams"] > 1:
        options |= {"length_penalty": 1.0, "early_stopping": True}
    batches = []
    for first in range(0, len(task["sources"]), task["batch"]):
        rows = task["sources"][first : first + task["batch"]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        limit = task["new_tokens"] or inputs["input_ids"].shape[1] + MAX_EXTRA_TOKENS
        batches.append({**inputs, **options, "max_new_tokens": limit})
    eos = tokenizer.eos_token_id

    def translate() -> list[list[int]]:
        rows = [row[1:] for inputs in batches for row in generate(**inputs).tolist()]
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    return translate


def by_ctranslate2(translator: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Makes one call: CTranslate2 itself makes batches of sentences of similar length."""
    sources = [tokenizer.convert_ids_to_tokens(row) for row in task["sources"]]
    options = {
        "beam_size": task["beams"],
        "max_batch_size": task["batch"],
        "length_penalty": 1,
        "return_end_token": True,
        "min_decoding_length": task["new_tokens"] or 0,
        "max_decoding_length": task["new_tokens"] or max(map(len, sources)) + MAX_EXTRA_TOKENS,
    }

    def translate() -> list[list[int]]:
        results = translator.translate_batch(sources, **options)
        return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return translate


def by_marian(translator: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Makes one call for all batches; each thread takes a batch. Cells of batch 1 make a call for each sentence."""
    eos, unknown = tokenizer.eos_token_id, str(tokenizer.unk_token_id)
    # As in `write_vocabulary`.
    texts = [" ".join("<unk>" if str(i) == unknown else str(i) for i in row[:-1]) for row in task["sources"]]
    longest = max(map(len, task["sources"]))
    limit = task["new_tokens"] or longest + MAX_EXTRA_TOKENS
    options = {
        "beam-size": task["beams"],
        "mini-batch": task["batch"],
        "normalize": 1.0,
        "allow-unk": "true",
        # The limit is a multiple of the longest source in the batch.
        "max-length-factor": (limit - 0.5) / longest,
    }
    calls = [[text] for text in texts] if task["batch"] == 1 else [texts]

    def translate() -> list[list[int]]:
        lines = [line for call in calls for line in translator.translate(call, **options)]
        rows = [[int(word.replace("<unk>", unknown)) for word in line.split()] for line in lines]
        return [row if len(row) == limit else [*row, eos] for row in rows]

    return translate


def translate_in_turns(tokenizer: Any, prepare: Any, task: dict[str, Any], report: Any) -> None:
    """Translates the task once and reports memory and outputs, then again for each line from the parent, for time."""
    # One sentence loads the kernels and packs the weights.
    prepare({**task, "sources": task["sources"][:1]})()
    translate, held = prepare(task), reset_peak()
    outputs = translate()
    figures = {"held": held, "memory": memory("VmHWM") - held, "lengths": [len(row) for row in outputs]}
    if "references" in task:
        texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        figures["bleu"] = score_texts(texts, task["references"], task["bleu_tokenize"])["bleu"]
    report(figures)
    for _ in sys.stdin:
        started = clock()
        tokens = sum(map(len, translate()))
        report({"seconds": clock() - started, "tokens": tokens})
