"""Checks the machine before a measurement, and prints and writes the results."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.files import make_sure_of_file, write_beside


def check_machine(options: argparse.Namespace) -> None:
    """Sets the number of threads. Raises UserError if measuring or writing the output is impossible here."""
    if sys.platform != "linux":
        raise UserError(f"memory is read from /proc, which {sys.platform} does not have: run this on Linux")
    if options.output:
        make_sure_of_file("output", options.output)
    cores = len(os.sched_getaffinity(0))
    options.threads = options.threads or cores
    if options.threads > cores:
        raise UserError(f"threads={options.threads} is more than the {cores} cores of this process: lower it")
    torch.set_num_threads(options.threads)


def check_preload(library: str | None) -> None:
    """Raises UserError if the library cannot be loaded. The system's loader only prints a warning."""
    environment = {**os.environ, "LD_PRELOAD": library or ""}
    loaded = subprocess.run([sys.executable, "-S", "-c", ""], env=environment, capture_output=True)
    if warning := loaded.stderr.decode(errors="replace").strip():
        raise UserError(f"preload={library}: {warning.splitlines()[0]}")


def about_this_run(options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """What a reader needs to repeat the measurement. Prints the machine and torch's version."""
    packages = ["vanilla-transformer", "torch", "transformers", "datasets", "accelerate"]
    packages += [name for name in ("ctranslate2", "pymarian") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(f"{machine}; torch {versions['torch']}", flush=True)
    return {
        "machine": machine,
        "threads": options.threads,
        "versions": {"python": platform.python_version(), **versions},
        "command": shlex.join(["python", *sys.argv]),
        "cells": {},
    }


def tell(name: str, table: str, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints a cell's table and writes the JSON file, so that a stopped run keeps its measurements."""
    print(f"\n{name}\n{table}", flush=True)
    if options.output:
        write_beside(options.output, json.dumps(results, indent=1) + "\n")
