"""Several processes give the results of one: on one machine and on two, with a replicated or a sharded model."""

import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Process
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.commands.launch import main as main_of_launcher
from accelerate.utils.other import get_free_port
from distributed_worker import SPLITS, one_update
from processes import live, start
from safetensors.torch import load_file
from test_training import write_recipe
from transformers import AutoModelForSeq2SeqLM

from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.train import main


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "training" / "accelerate"
OPTIONS = {"max_steps": 20, "eval_steps": 10, "save_steps": 10, "logging_steps": 5, "per_device_train_batch_tokens": 30}
AVERAGE = {"average_checkpoints": 2, "load_best_model_at_end": False}
BEST = {"metric_for_best_model": "loss"}
# Of each kind: its configuration, what its run ends with, and what its processes do.
KINDS = {
    "many GPUs": ("many_gpus.yaml", AVERAGE, ["run", "updates"]),
    "FSDP2": ("fsdp.yaml", BEST, ["run, stop and resume", "updates"]),
    "two nodes": ("several_nodes.yaml", AVERAGE, ["run"]),
}


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Uses float64 in this process, as in the others."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recipe_in(folder: Path, **options) -> Path:
    folder.mkdir()
    recipe = write_recipe(folder)
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **OPTIONS, **options}))
    return recipe


def launch(*commands: list, seconds: int = 240) -> None:
    """
    Runs the commands side by side, until all have ended or one has failed. What fails is shown with all that was
    printed; what takes too long, with the stacks of its threads too.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(commands))]
        launchers = [
            start(live, accelerate_launch, (list(map(str, words)),), [output, output], str(ROOT), environment)
            for words, output in zip(commands, outputs, strict=True)
        ]
        end = time.monotonic() + seconds
        try:
            while any(each.exitcode is None for each in launchers) and not any(each.exitcode for each in launchers):
                if time.monotonic() > end:
                    signal_workers(launchers, signal.SIGABRT)
                    break
                time.sleep(0.2)
            codes = [launcher.exitcode for launcher in launchers]
            if any(code != 0 for code in codes):
                time.sleep(2)  # for the stacks, and for the others to say that they have lost one
        finally:
            signal_workers(launchers, signal.SIGKILL)
        if any(code != 0 for code in codes):
            printed = "\n==\n".join(output.read_text()[-8000:] for output in outputs)
            pytest.fail(f"exit codes {codes} (None: still running)\n{printed}")


def accelerate_launch(argv: list[str]) -> None:
    """`accelerate launch ARGV`."""
    sys.argv = ["accelerate launch", *argv]
    main_of_launcher()


def signal_workers(launchers: list[Process], number: int) -> None:
    """Sends a signal to all running descendants. torch starts the workers in new sessions."""
    for launcher in launchers:
        if launcher.exitcode is None:
            family = psutil.Process(launcher.pid)
            for process in [*family.children(recursive=True), family]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


@pytest.fixture(scope="module", params=KINDS)
def processes(request, tmp_path_factory) -> Path:
    """The folder of a finished run of two processes."""
    config, ending, parts = KINDS[request.param]
    folder = tmp_path_factory.mktemp("processes") / "two"
    recipe_in(folder, **ending)
    command = ["--config_file", CONFIGS / config, "--num_processes", 2]
    commands = [command]
    if request.param == "two nodes":
        rendezvous = ["--main_process_ip", "127.0.0.1", "--main_process_port", get_free_port()]
        commands = [[*command, *rendezvous, "--machine_rank", rank] for rank in range(2)]
    launch(*([*command, ROOT / "tests" / "distributed_worker.py", folder, *parts] for command in commands))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run of one process that accumulates two batches per update."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    main([str(recipe_in(folder, gradient_accumulation_steps=2, **AVERAGE))])
    return folder


def test_after_20_updates_the_weights_are_those_of_one_process(processes, alone):
    for checkpoint in ("checkpoint-10", "checkpoint-20"):
        expected = load_file(alone / "run" / checkpoint / "model.safetensors")
        found = load_file(processes / "run" / checkpoint / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=f"{checkpoint}: {name}")


def test_the_end_of_a_run_is_an_ordinary_model(processes):
    model, loading = AutoModelForSeq2SeqLM.from_pretrained(processes / "run", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.architectures == ["VanillaTransformerForConditionalGeneration"]
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight
    assert (processes / "run" / "metrics.json").exists()
    ends = [load_file(processes / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (10, 20)]
    averaged = "average_checkpoints" in (processes / "recipe.yaml").read_text()
    for name, value in load_file(processes / "run" / "model.safetensors").items():
        expected = torch.stack([end[name] for end in ends]).mean(dim=0) if averaged else ends[1][name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("processes", ["FSDP2"], indirect=True)
def test_a_checkpoint_of_a_sharded_model_is_resumed_by_sharded_models(processes):
    with pytest.raises(RecipeError, match="was written with FSDP, but this run is without"):
        main([str(processes / "recipe.yaml"), "--resume_from_checkpoint", "last", "--max_steps", "21"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The update over all rows in one batch."""
    return one_update(tmp_path_factory.mktemp("whole"), per_device_train_batch_size=8)


def assert_same_update(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.pop("fused").all(), "logits were made"
    for name, value in found.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("split", ["4 x 2", "2 x 4", "token budget"])
def test_one_update_is_the_same_however_one_process_splits_it(split, whole, tmp_path):
    rows = {"4 x 2": 4, "2 x 4": 2}.get(split)
    options = SPLITS[split] if rows is None else {"per_device_train_batch_size": rows}
    assert_same_update(one_update(tmp_path, **{**options, "gradient_accumulation_steps": 8}), whole)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("processes", ["many GPUs", "FSDP2"], indirect=True)
def test_one_update_is_the_same_however_two_processes_split_it(processes, split, whole):
    assert_same_update(torch.load(processes / "updates.pt")[split], whole)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_field_of_the_configurations(path):
    config = ClusterConfig.from_yaml_file(path)
    options = {action.dest for action in launch_command_parser()._actions}
    # accelerate's names of the nested fields.
    nested = {f"fsdp_{name.removeprefix('fsdp_')}" for name in config.fsdp_config} | set(config.deepspeed_config)
    assert nested <= options
    command = next(line for line in path.read_text().splitlines() if line.startswith("# accelerate launch "))
    assert f"--config_file {path.name}" in command
