"""`vanilla-transformer benchmark train`: compares training speed, or losses, with MarianMTModel and Marian."""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vanilla_transformer.conversion.marian import to_marian
from vanilla_transformer.conversion.marian_npz import marian_options
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.machine import machine

from .availability import leave_out, why_not_trained
from .cells import CELLS
from .contenders import Contender, contender_name
from .data import prepare
from .limits import matmul_rate
from .recipes import MULTI30K, parse, recipe_of
from .run import about_this_run, check_machine, check_preload, tell
from .tables import loss_table, speed_table
from .turns import Worker, take_turns


def compare(options: argparse.Namespace) -> None:
    """Measures all cells, prints a table for each, and writes the JSON file."""
    # 1. the options; errors are reported before anything is measured
    check_machine(options)
    everything = ["tiny"] if options.loss_tokens else ["tiny", "base"] + ["big"] * torch.cuda.is_available()
    cells = options.cells or everything
    if options.loss_tokens and cells != ["tiny"]:
        raise UserError("--loss_tokens compares the losses of tiny, which has real text: leave --cells out")
    if "tiny" in cells and not options.multi30k_dir:
        raise UserError(f"the cell tiny needs {MULTI30K}, or leave the cell out with --cells base")
    check_preload(options.preload)
    recipes = {name: recipe_of(name, options) for name in cells}

    # 2. measurements
    results = about_this_run(options, machine())
    found = leave_out(trained(of_losses=bool(options.loss_tokens)), why_not_trained)
    measure, show = (compare_losses, loss_table) if options.loss_tokens else (compare_speed, speed_table)
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = prepare(recipe, Path(folder))
            held = leave_out(found, partial(why_not_held, build_model(parse(recipe), tokenizer)))
            results["cells"][name] = measure(name, recipe, Path(folder), options, held)
        tell(name, show(results["cells"][name]), results, options)


def trained(of_losses: bool) -> list[Contender]:
    """The contenders of a comparison by speed (on a GPU also compiled) or by losses."""
    both = "ours", "MarianMTModel"
    if of_losses:
        ours = [Contender("ours", dtype) for dtype in ("bfloat16", "float32")]
        return [*ours, *(Contender("MarianMTModel", "float32", same_batches=same) for same in (False, True))]
    found = [Contender(side, dtype) for dtype in ("bfloat16", "float32") for side in both]
    if torch.cuda.is_available():
        found += [Contender(side, "bfloat16", compiled=True) for side in both]
    return [*found, Contender("Marian C++", "float32")]


def start(
    contender: Contender, recipe: list[str], folder: Path, options: argparse.Namespace, max_steps: int, **orders: int
) -> Worker:
    """A worker that trains like `contender`."""
    bf16 = contender.dtype == "bfloat16"
    fields = {"output_dir": folder, "max_steps": max_steps, "bf16": bf16, "torch_compile": contender.compiled}
    argv = recipe + [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    job = {"recipe": argv, "folder": str(folder), "contender": contender, "orders": orders, "threads": options.threads}
    preloaded = contender.side == "ours" and options.preload
    return Worker(job, options.threads, **({"LD_PRELOAD": options.preload} if preloaded else {}))


def why_not_held(model: Any, contender: Contender) -> str | None:
    """The setting of our `model` that the peer does not support; None if it supports all."""
    try:
        if contender.side == "MarianMTModel":
            to_marian(model)
        if contender.side == "Marian C++":
            marian_options(model.config)
    except ValueError as error:
        return str(error)
    return None


def compare_speed(
    cell: str, recipe: list[str], folder: Path, options: argparse.Namespace, found: list[Contender]
) -> dict[str, Any]:
    """Rounds in which the machine's limits are measured, then each contender in turn."""
    warmup, updates = options.warmup or CELLS[cell].warmup, options.updates or CELLS[cell].updates
    orders = {"max_steps": warmup + options.rounds * updates, "warmup": warmup, "updates": updates}
    # tiny has batches of many shapes, and each would be compiled.
    found = [contender for contender in found if not (contender.compiled and cell == "tiny")]
    ceilings: dict[str, list[float]] = {contender.dtype: [] for contender in found}

    def measure_ceilings() -> None:
        for dtype, rates in ceilings.items():
            rates.append(matmul_rate(dtype))

    starts = [partial(start, contender, recipe, folder, options, **orders) for contender in found]
    # In one more turn they report their memory.
    reports = take_turns(cell, starts, options.rounds + 1, measure_ceilings)
    entries = [
        {**contender._asdict(), "rounds": reported[1:-1], **reported[-1]}
        for contender, reported in zip(found, reports, strict=True)
    ]
    return {"warmup": warmup, "updates": updates, "ceilings": ceilings, "contenders": summarise(entries, ceilings)}


def summarise(entries: list[dict[str, Any]], ceilings: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Adds the medians over the rounds, their ratios to those of the peers, and the shares of the limit."""
    for entry in entries:
        rounds = entry["rounds"]
        entry["tokens_per_second"] = statistics.median(turn["tokens"] / turn["seconds"] for turn in rounds)
        flops = statistics.median(turn["flops"] / turn["seconds"] for turn in rounds)
        entry["share_of_limit"] = flops / statistics.median(ceilings[entry["dtype"]])
    speeds = {contender_name(entry): entry["tokens_per_second"] for entry in entries}
    for entry in entries:
        peers = {
            "MarianMTModel, same dtype": Contender("MarianMTModel", entry["dtype"], entry["compiled"]),
            "MarianMTModel, float32": Contender("MarianMTModel", "float32"),
            "Marian C++": Contender("Marian C++", "float32"),
        }
        entry["ratios"] = {
            name: entry["tokens_per_second"] / speeds[str(peer)] for name, peer in peers.items() if str(peer) in speeds
        }
    return entries


def compare_losses(
    cell: str, recipe: list[str], folder: Path, options: argparse.Namespace, found: list[Contender]
) -> dict[str, Any]:
    """Validation losses after the same number of target tokens, from the same weights, with the recipe's schedule."""
    entries = []
    for contender in tqdm(found, desc=f"{cell}, losses", disable=None):
        # Every update has at least one token, so the run reaches loss_tokens before max_steps.
        orders = {"max_steps": options.loss_tokens, "loss_tokens": options.loss_tokens}
        with start(contender, recipe, folder, options, **orders) as worker:
            entries.append({**contender._asdict(), **worker.report()})
    return {"loss_tokens": options.loss_tokens, "contenders": entries}
