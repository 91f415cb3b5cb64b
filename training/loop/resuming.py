"""Decides what may change when a run is resumed. A change of any other field is an error that names it.

A checkpoint restores the optimizer with its learning rate, the schedule, the position in the data and the best score:
new settings for them would be ignored, or make scores incomparable. So the recipe is compared, field by field, with the
one in the run's folder. Data is compared by its content, since files may have moved.
"""

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..data.pairs import ENCODED, expand_path
from ..errors import RecipeError
from ..files import missing
from ..settings.arguments import DataArguments, TrainingArguments
from ..settings.corpora import Corpus, places_apart
from ..settings.recipe import Recipe, read_recipe, recipe_of_run, recipe_parser
from ..settings.rules import REFUSED
from .checkpoints import damage, newest_checkpoint, settle


logger = logging.getLogger(__name__)

# Fields that may change: they apply from then on. Those that name data are not compared as text.
LASTING = {
    "where things are, and what they are called": "output_dir dataset data_dir train_file validation_file test_file "
    "data_name run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "how long, and what is done on the way": "max_steps num_train_epochs early_stopping_patience average_checkpoints "
    "eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps per_device_eval_batch_tokens "
    "save_strategy save_steps save_total_limit save_only_model save_on_each_node "
    "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica "
    "log_on_each_node disable_tqdm report_to skip_memory_metrics debug "
    "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision",
    "how the finished model translates, and is scored": "num_beams metrics group_column",
    "on what it is computed, and how": "use_cpu bf16 tf32 attn_implementation torch_compile torch_compile_backend "
    "torch_compile_mode hold_memory activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs torch_empty_cache_steps full_determinism dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout",
}
# Fields of this call of the program, not of the run. Their changes are not logged.
PASSING = "output_dir resume_from_checkpoint ignore_data_skip check local_rank do_train do_eval do_predict"
# Fields without effect, which recipes of older runs may contain. rules.py refuses them.
IDLE = (*REFUSED, "per_device_eval_batch_size")
MAY_CHANGE = frozenset([*" ".join(LASTING.values()).split(), *PASSING.split(), *IDLE])


def refuse_changes(recipe: Recipe) -> None:
    """
    Compares a recipe with the recipe.yaml of the run that it resumes, if there is one.

    Raises:
        RecipeError: a field that must not change is different.
    """
    path = recipe_of_run(recipe.training)
    if path is None:
        return
    parser = recipe_parser()
    defaults = vars(parser.parse_args([]))
    began, now = defaults | read_recipe(str(path), None, parser), defaults | recipe.given
    changed = [name for name in parser.hints if _comparable(name, began[name]) != _comparable(name, now[name])]
    for name in changed:
        if name not in MAY_CHANGE:
            raise RecipeError(
                f"{name}={now[name]}, but the run to resume began with {name}={began[name]} ({path}): keep it, or "
                "start a new run in another output_dir; model=CHECKPOINT starts from the weights of a checkpoint"
            )
    for name in changed:
        if name not in PASSING.split():
            logger.info("from now on %s=%s; the run began with %s", name, now[name], began[name])


def _comparable(name: str, value: Any) -> Any:
    """A field's value as it is compared: of corpora, without the places where they are."""
    return places_apart(value) if name == "corpora" else value


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: the one that the arguments name, or for "last" the newest intact one in the run's
    folder. None for a new run, and for one that ended before its first checkpoint.

    Raises:
        RecipeError: there is no checkpoint, or a new run would overwrite the one in the folder.
        CheckpointError: no checkpoint is intact.
    """
    run, asked = Path(args.output_dir), args.resume_from_checkpoint
    begun = (run / "recipe.yaml").exists()
    if asked is None:
        if args.process_index == 0 and begun:
            raise RecipeError(
                f"output_dir={run} already holds a run: continue it with --resume_from_checkpoint last, or choose "
                "another output_dir"
            )
        return None
    if asked != "last":
        if not Path(asked).is_dir():
            raise RecipeError(f"resume_from_checkpoint={missing(asked)}")
        if wrong := damage(Path(asked)):
            raise RecipeError(f"resume_from_checkpoint={asked} is not an intact checkpoint: {wrong}")
        refuse_model_alone(Path(asked))
        return asked
    with args.main_process_first(local=args.save_on_each_node, desc="looking for a checkpoint"):
        if args.should_save and not args.check:
            settle(run)
    last = newest_checkpoint(run)
    if last is None and not begun:
        raise RecipeError(f"output_dir={run} has no checkpoint to resume from")
    if last is None:
        logger.warning("output_dir=%s has no checkpoint yet: the run starts from the beginning", run)
        return None
    refuse_model_alone(last)
    return str(last)


def refuse_model_alone(checkpoint: Path) -> None:
    """
    Raises:
        RecipeError: the checkpoint was written with save_only_model=true, without what resuming needs.
    """
    # Every process writes one of these files, whatever the optimizer.
    if not any(checkpoint.glob("rng_state*.pth")):
        raise RecipeError(
            f"{checkpoint} has only the model (save_only_model=true), without the states of optimizer and schedule, so "
            f"no run can resume from it: start a new run with model={checkpoint} in another output_dir"
        )


def fingerprint(corpora: Sequence[Corpus], tables: dict[str, pa.Table]) -> dict[str, str]:
    """
    Identifies the data of a run, independent of its location: each split by the number of rows and a checksum of their
    ids; a stream, which is not read to its end, by the names and sizes of its files.
    """
    found = {split: _rows_in_words(table) for split, table in tables.items()}
    if corpora[0].data.streaming:
        found["train"] = ", ".join(_files_in_words(corpus.data) for corpus in corpora)
    return found


def _files_in_words(data: DataArguments) -> str:
    paths = [expand_path(name, data.data_dir) for name in data.train_file or []]
    files = [f"{path.name} of {path.stat().st_size:,} bytes" for path in paths]
    return ", ".join(files) or Path(data.dataset or "").name


def _rows_in_words(table: pa.Table) -> str:
    checksum = 0
    for name in ENCODED:
        column = table[name]
        for values in (pc.list_value_length(column), pc.list_flatten(column)):
            checksum = zlib.crc32(values.to_numpy().tobytes(), checksum)
    return f"{len(table):,} rows with the checksum {checksum:08x}"
