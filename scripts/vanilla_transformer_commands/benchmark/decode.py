"""`vanilla-transformer benchmark decode`: compares speed and memory with transformers, Marian and CTranslate2."""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from vanilla_transformer.conversion.ctranslate2 import to_ctranslate2
from vanilla_transformer.conversion.marian import to_marian
from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.machine import threads_of_processor
from vanilla_transformer.training.saved_model import load_model

from .availability import leave_out, why_not_translated
from .cells import SEARCHES
from .contenders import DECODERS, PEERS, TYPES, Contender, contender_name
from .data import word_tokenizer
from .limits import least_seconds, measure_limits
from .marian import convert_for_marian
from .recipes import MULTI30K, parse, recipe_of
from .run import about_this_run, check_machine, tell
from .tables import decoding_table, memory_table
from .tasks import random_tasks, tasks_of_text
from .turns import Worker, take_turns


def compare(options: argparse.Namespace) -> None:
    """Measures all cells, prints a table for each, and writes the JSON file."""
    # 1. the options; errors are reported before anything is measured
    check_machine(options)
    if options.model and not options.multi30k_dir:
        raise UserError(f"--model translates the test set of {MULTI30K}")
    if options.memory and (options.model or options.cells):
        raise UserError("--memory has its own cells with random text: leave --model and --cells out")
    of_memory = ["ours float32", "ours float32, compiled", "stock float32"]
    names = options.contenders or (of_memory if options.memory else list(DECODERS))
    recipe = recipe_of("tiny" if options.model else "base", options)

    # 2. measurements
    results = about_this_run(options, threads_of_processor())
    found = leave_out([DECODERS[name] for name in names], why_not_translated)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, model_folder, tasks = prepare_translation(recipe, Path(folder), options)
        found = leave_out(found, partial(why_not_converted, model, tokenizer, Path(folder), bool(options.model)))
        job = {"folder": folder, "model": model_folder, "threads": options.threads}
        for cell, task in tasks.items():
            results["cells"][cell] = measure_translation(cell, job | {"task": task}, found, model, options.rounds)
            tell(cell, decoding_table(results["cells"][cell]), results, options)
    if options.memory:
        print(f"\n{memory_table(results['cells'])}")


def prepare_translation(
    argv: list[str], folder: Path, options: argparse.Namespace
) -> tuple[Any, Any, str, dict[str, dict[str, Any]]]:
    """The model, its tokenizer, their folder, and the tasks of the cells. A random model is written to `folder`."""
    recipe = parse(argv)
    if options.model:
        recipe.data.train_file = recipe.data.validation_file = None
        pairs = load_pairs(recipe.data)["test"]
        model, tokenizer = load_model(options.model)
        eos = model.generation_config.eos_token_id
        if not isinstance(eos, int):
            raise UserError(f"--model {options.model} has eos_token_id={eos}, but the peers support only one such id")
        tasks = tasks_of_text(tokenizer, pairs, recipe.decoding.bleu_tokenize, options.cells or list(SEARCHES))
        return model, tokenizer, options.model, tasks
    set_seed(recipe.training.seed)
    tokenizer = word_tokenizer(recipe.tokenizer.vocab_size)
    model = build_model(recipe, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return model, tokenizer, str(folder / "model"), random_tasks(tokenizer, options)


def why_not_converted(model: Any, tokenizer: Any, folder: Path, ends: bool, contender: Contender) -> str | None:
    """
    Converts the model for a peer. A peer with a format of its own finds the model in `folder`.

    Args:
        model, tokenizer: ours.
        folder: where to write the converted model.
        ends: whether Marian may end a sentence. Otherwise all outputs have the maximum length.
        contender: the peer.

    Returns:
        What the peer does not support; None if it can be used.
    """
    try:
        if contender.side == "ctranslate2" and not (folder / "ctranslate2").exists():
            to_ctranslate2(model, tokenizer.convert_ids_to_tokens(range(len(tokenizer))), folder / "ctranslate2")
        if contender.side == "MarianMTModel":
            to_marian(model)
        if contender.side == "Marian C++":
            return convert_for_marian(model, tokenizer, folder / "marian", ends, contender.dtype)
    except ValueError as error:
        return str(error)
    return None


def measure_translation(
    cell: str, job: dict[str, Any], found: list[Contender], model: Any, rounds: int
) -> dict[str, Any]:
    """Rounds in which each contender translates the same sentences, after one turn that is not timed."""
    task, entries = job["task"], []
    limits = measure_limits({TYPES[contender.dtype][1] for contender in found})
    jobs = [job | {"contender": contender} for contender in found]
    # Translating is measured on the CPU.
    starts = [partial(Worker, each, job["threads"], CUDA_VISIBLE_DEVICES="") for each in jobs]
    for contender, (first, *reported) in zip(found, take_turns(cell, starts, rounds), strict=True):
        least = least_seconds(model, task, first.pop("lengths"), contender.dtype, limits)
        entry = {**contender._asdict(), "rounds": reported, **first}
        entry["tokens_per_second"] = statistics.median(turn["tokens"] / turn["seconds"] for turn in reported)
        entry["seconds"] = statistics.median(turn["seconds"] for turn in reported)
        entry["share_of_limit"] = least / entry["seconds"]
        entries.append(entry)
    for peer, faster_of in PEERS.items():
        speeds = [entry["tokens_per_second"] for entry in entries if contender_name(entry) in faster_of]
        for entry in entries if speeds else []:
            entry.setdefault("ratios", {})[peer] = entry["tokens_per_second"] / max(speeds)
    sizes = {name: task[name] for name in ("beams", "batch", "new_tokens")}
    return {**sizes, "sentences": len(task["sources"]), "limits": limits, "contenders": entries}
