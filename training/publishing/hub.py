"""Pushes a run to the Hub: the model, its documents, and the code that loads it without this package.

Everything is checked first and then uploaded in one commit. So after an interrupted push the repository holds the
complete previous revision.
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
from vanilla_transformer.tokenization_languages import multilingual

from ..errors import UserError, message_of
from ..files import missing
from ..model_names import models_in
from ..saved_model import read_model
from ..settings.options import as_yaml, plain
from ..settings.recipe import public, read_recipe, recipe_parser
from .audit import CardError, read_card


logger = logging.getLogger(__name__)

CARD = "README.md"
METRICS = "metrics.json"
RECIPE = "recipe.yaml"
DOCUMENTS = (CARD, METRICS, "loss_curve.png", RECIPE)
# The name of the model in a card's code examples.
MODEL_NAME = re.compile(r'(from_pretrained\(|model=)"[^"]*"')


class HubError(UserError):
    """A model that cannot be pushed to the Hub."""


def push_run(
    run: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload of a run",
) -> CommitInfo:
    """
    Pushes the folder of a finished run in one commit.

    The repository then holds model, generation config, tokenizer, code, model card, metrics.json, recipe.yaml and
    loss_curve.png. Other files of the run's folder, such as checkpoints, are not uploaded.

    Args:
        run: its `output_dir`.
        repo_id: `NAME/MODEL`, or `MODEL` in the account of the token's owner. It is created if it does not exist.
        private: True creates a private repository; None takes the account's default.
        revision: the branch to push to (default: main). It is created if it does not exist.
        message: the commit message.

    Raises:
        HubError: the folder is not that of a finished run, or the Hub cannot be reached or refuses.
        UserError: the model cannot be loaded, or the card has figures that are not in metrics.json.
    """
    run = Path(run)
    check_run(run)
    with TemporaryDirectory() as staged:
        stage(run, Path(staged))
        repo_id = create_repository(repo_id, private)
        return commit(Path(staged), repo_id, revision, message)


def check_run(run: Path) -> None:
    """
    Checks the documents of a run.

    Raises:
        HubError: the folder is not that of a finished run.
        CardError: the card cannot be read, or has figures that are not in metrics.json.
    """
    if not run.exists():
        raise HubError(missing(run))
    lacking = [name for name in (*DOCUMENTS, "config.json") if not (run / name).is_file()]
    if "config.json" in lacking and (there := models_in(run)):
        raise HubError(f"{run} is not the folder of a finished run; {there}")
    if lacking:
        raise HubError(
            f"{run} is not the folder of a finished run: it has no {', '.join(lacking)}. Give the output_dir of a "
            "finished run"
        )
    try:
        metrics = json.loads((run / METRICS).read_text(encoding="utf-8"))
        read_card(run / CARD, metrics)
    except CardError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{run / METRICS} was not written by a run, or is damaged: {error!r}") from error


def stage(folder: Path, target: Path) -> None:
    """
    Writes the files to upload: the model and its tokenizer, loaded and saved again so that no stray file comes along;
    their code; and the documents that the folder has.

    Args:
        folder: a run or a checkpoint.
        target: an empty folder.

    Raises:
        UserError: the model cannot be loaded.
    """
    model, tokenizer = read_model(str(folder))
    if multilingual(tokenizer):
        # Without its code a tokenizer could not be told the language. Others are plain ones of transformers'.
        tokenizer._auto_class = "AutoTokenizer"
    # transformers adds the entries of the saved class and of the config. This one is for AutoModel.
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
    """Inside the `with`, saving a model also writes the modules of its code. Checkpoints are saved without them."""
    VanillaTransformerConfig.register_for_auto_class()
    VanillaTransformerForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
    try:
        yield
    finally:
        VanillaTransformerConfig._auto_class = VanillaTransformerForConditionalGeneration._auto_class = None


def create_repository(repo_id: str, private: bool | None) -> str:
    """
    Creates the repository if it does not exist.

    Returns:
        Its full name, `NAME/MODEL`.

    Raises:
        HubError: the Hub cannot be reached or refuses, or `private` is True and the repository exists and is public.
    """
    api = HfApi()
    if get_token() is None:
        raise HubError(f"no token for {api.endpoint}: run `hf auth login`, or set the environment variable HF_TOKEN")
    with explained(repo_id, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # create_repo does not change the visibility of an existing repository.
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public: make it private in its settings, or choose another name")
        return repo_id


def commit(folder: Path, repo_id: str, revision: str | None, message: str) -> CommitInfo:
    """
    Uploads the files that `stage` has written. (`upload_folder` may make several commits.)

    Raises:
        HubError: the Hub cannot be reached or refuses. The repository's previous revision is intact.
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
    Pushes the model of a checkpoint in the background, one push at a time. It uploads a copy, since the checkpoint may
    be deleted meanwhile. A failed push is logged, and the run continues.

    Args: as in `push_run`; the repository must exist.

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
                logger.warning("%s was not pushed: %s. The run continues", checkpoint, error)

    return run_as_future(send)


@contextmanager
def explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """
    Turns errors of the Hub and its client into one line that says what to do.

    Raises:
        HubError: with that line.
    """
    try:
        yield
    except HubError:
        raise
    except RuntimeError as error:
        # The upload of a file to the Hub's storage failed; the cause has the reason.
        said = message_of(error.__cause__ or error)
        raise HubError(
            f"the upload of a file to {endpoint} failed ({said}): push again. The previous revision of {repo_id} is "
            "intact"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(_advice(error, repo_id, endpoint)) from error


def _advice(error: Exception, repo_id: str, endpoint: str) -> str:
    """The message for an error of the Hub: what is wrong, and what to do."""
    said = message_of(error)
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid repository name, NAME/MODEL: {said}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch: {said}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist at {endpoint}, or is private and your token has no access to it: {said}"
    if status == 401:
        return f"{endpoint} refuses your token: run `hf auth login` again, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"your token may not write to {repo_id}: use a name in your own account, or another token. {said}"
    if status is None and isinstance(error, HTTPError | OfflineModeIsEnabled):
        return (
            f"the connection to {endpoint} failed ({said or type(error).__name__}): push again when it is back. "
            f"The previous revision of {repo_id} is intact"
        )
    return f"{endpoint} refused the push to {repo_id}: {said}"
