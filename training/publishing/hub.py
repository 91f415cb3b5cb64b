"""The Hub: a run's model with its documents, and with the code that loads it where the package is not installed.

All of it goes up in one commit, after everything that could be wrong with it has been looked at. So whatever happens on
the way, the repository holds the whole of the revision before, or the whole of this one.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token, run_as_future
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vanilla_transformer import (
    TranslationPipeline,
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
)

from ..errors import UserError
from ..saved_model import read_model
from ..settings.options import as_yaml, plain
from ..settings.recipe import public, read_recipe, recipe_parser
from .audit import CardError, read_card


logger = logging.getLogger(__name__)

CARD = "README.md"
METRICS = "metrics.json"
RECIPE = "recipe.yaml"
DOCUMENTS = (CARD, METRICS, "loss_curve.png", RECIPE)
# Where an example of a card names the model that it loads.
MODEL_NAME = re.compile(r'(from_pretrained\(|model=)"[^"]*"')


class HubError(UserError):
    """What keeps a model from the Hub."""


def push_run(
    run: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload of a run",
) -> CommitInfo:
    """
    Pushes the folder of a finished run, in one commit.

    The repository then holds model, generation config and tokenizer, code, model card, metrics.json, recipe.yaml and
    loss_curve.png. Other files of the run's folder, such as checkpoints, stay where they are.

    Args:
        run: its `output_dir`.
        repo_id: `NAME/MODEL`, or `MODEL` for one of the token's owner. What does not exist is made.
        private: True makes the repository a private one; None leaves that to the Hub.
        revision: the branch to push to, which is made where it does not exist. Default: main.
        message: of the commit.

    Raises:
        HubError: the folder is not that of a finished run, or the Hub cannot be reached or refuses.
        UserError: the model cannot be loaded, or the card claims what metrics.json does not hold.
    """
    run = Path(run)
    check_run(run)
    with TemporaryDirectory() as staged:
        stage(run, Path(staged))
        repo_id = create_repository(repo_id, private)
        return commit(Path(staged), repo_id, revision, message)


def check_run(run: Path) -> None:
    """
    Looks at the documents of a run.

    Raises:
        HubError: the folder is not that of a finished run.
        CardError: its card claims what metrics.json does not hold.
    """
    missing = [name for name in (*DOCUMENTS, "config.json") if not (run / name).is_file()]
    if missing:
        raise HubError(
            f"{run} is not the folder of a finished run: it holds no {', '.join(missing)}. Give the output_dir of a "
            "run that has ended"
        )
    try:
        metrics = json.loads((run / METRICS).read_text(encoding="utf-8"))
        read_card(run / CARD, metrics)
    except CardError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{run / METRICS} is not what a run writes: {error!r}") from error


def stage(folder: Path, target: Path) -> None:
    """
    Writes what goes up: a model and its tokenizer, freshly saved, so that nothing travels that only lay beside them;
    their code; and the documents, as far as the folder has them.

    Args:
        folder: a run or a checkpoint.
        target: an empty folder.

    Raises:
        UserError: the model cannot be loaded.
    """
    model, tokenizer = read_model(str(folder))
    # transformers notes the class that it saves, and that of the config. AutoModel is to load the repository too.
    network = VanillaTransformerModel
    model.config.auto_map = {"AutoModel": f"{network.__module__.rpartition('.')[2]}.{network.__name__}"}
    with saving_code():
        pipeline = TranslationPipeline(model=model, tokenizer=tokenizer, task="translation", device="cpu")
        pipeline.save_pretrained(target)
    for name in DOCUMENTS:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    if (folder / RECIPE).exists():
        recipe = read_recipe(str(folder / RECIPE), None, recipe_parser())
        shared = {name: plain(value) for name, value in public(recipe).items()}
        (target / RECIPE).write_text(as_yaml(shared), encoding="utf-8")


@contextmanager
def saving_code() -> Iterator[None]:
    """Inside, whatever is saved has its modules beside it, which no checkpoint should."""
    VanillaTransformerConfig.register_for_auto_class()
    VanillaTransformerForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
    try:
        yield
    finally:
        VanillaTransformerConfig._auto_class = VanillaTransformerForConditionalGeneration._auto_class = None


def create_repository(repo_id: str, private: bool | None) -> str:
    """
    Makes sure of the repository.

    Returns:
        Its whole name, `NAME/MODEL`.

    Raises:
        HubError: the Hub cannot be reached or refuses, or the repository is public and was to be private.
    """
    api = HfApi()
    if get_token() is None:
        raise HubError(f"no token for {api.endpoint}: log in by `hf auth login`, or set the environment's HF_TOKEN")
    with explained(repo_id, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # What exists keeps its visibility, whatever is asked for.
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public: make it private in its settings, or choose another name")
        return repo_id


def commit(folder: Path, repo_id: str, revision: str | None, message: str) -> CommitInfo:
    """
    Sends what `stage` has written. Not by `upload_folder`, which may make several commits.

    Raises:
        HubError: the Hub cannot be reached or refuses. What it held before it still holds.
    """
    api = HfApi()
    contents: dict[str, bytes | Path] = {path.name: path for path in sorted(folder.iterdir())}
    if CARD in contents:
        text = (folder / CARD).read_text(encoding="utf-8")
        contents[CARD] = MODEL_NAME.sub(rf'\1"{repo_id}"', text).encode()
    with explained(repo_id, api.endpoint):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return api.create_commit(repo_id, additions, commit_message=message, revision=revision)


def push_checkpoint(checkpoint: str | Path, repo_id: str, revision: str | None, message: str) -> Future[None]:
    """
    Pushes the model of a checkpoint while the run goes on: a copy of it, since the checkpoint may be removed meanwhile.
    Several go up one after the other. A push that fails is told, and ends no run.

    Args: as those of `push_run`; the repository must exist.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    staged = TemporaryDirectory()
    stage(Path(checkpoint), Path(staged.name))

    def send() -> None:
        with staged:
            try:
                commit(Path(staged.name), repo_id, revision, message)
            except HubError as error:
                logger.warning("%s was not pushed: %s. The run goes on", checkpoint, error)

    return run_as_future(send)


@contextmanager
def explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """
    Turns what the Hub and its client raise into one line that says what to do.

    Raises:
        HubError: with that line.
    """
    try:
        yield
    except HubError:
        raise
    except RuntimeError as error:
        # A file on its way to the Hub's storage; the cause says why.
        said = " ".join(str(error.__cause__ or error).split())
        raise HubError(
            f"a file did not get to {endpoint} ({said}): push again. What was in {repo_id} before is whole"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(_advice(error, repo_id, endpoint)) from error


def _advice(error: Exception, repo_id: str, endpoint: str) -> str:
    """What went wrong, and what to do about it."""
    said = " ".join(str(error).split())
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not the name of a repository, NAME/MODEL: {said}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch: {said}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist at {endpoint}, or is private and closed to your token: {said}"
    if status == 401:
        return f"{endpoint} refuses your token: log in anew by `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"your token may not write to {repo_id}: take a name of your own, or a token that may write. {said}"
    if status is None and isinstance(error, HTTPError | OfflineModeIsEnabled):
        return (
            f"the connection to {endpoint} failed ({said or type(error).__name__}): push again when it is back. "
            f"What was in {repo_id} before is whole"
        )
    return f"{endpoint} did not take {repo_id}: {said}"
