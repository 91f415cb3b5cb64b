"""Finds what the name of a model or a tokenizer means: a folder on this machine, or a repository of the Hub."""

import os
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers.utils import CONFIG_NAME

from .errors import UserError, message_of
from .files import likely_names, missing


# How many models of a folder a message lists.
LISTED = 10


def find_model(name: str, field: str = "") -> str:
    """
    Checks that there is a model of this name, before a library looks for it: transformers would ask the Hub for a
    missing folder, for half a minute.

    Args:
        name: a folder, or the Hub name of a model.
        field: what an error writes before the name, such as `model=`.

    Returns:
        The folder, with `~` expanded, or the Hub name.

    Raises:
        UserError: there is no such folder, it holds no model, or the Hub has no such repository or cannot be reached.
    """
    found = find_folder_or_repository(name, CONFIG_NAME, field)
    if os.path.isdir(found) and not os.path.isfile(os.path.join(found, CONFIG_NAME)):
        there = models_in(found)
        advice = f"; {there}" if there else ": give the folder of a trained model, such as the output_dir of a run"
        raise UserError(f"{field}{name}: holds no model (no {CONFIG_NAME}){advice}")
    return found


def find_folder_or_repository(name: str, file: str, field: str = "") -> str:
    """
    Finds a folder, or a repository of the Hub.

    Args:
        name: the folder, or the Hub name.
        file: the file by which the Hub is asked for the repository.
        field: what an error writes before the name, such as `tokenizer=`.

    Returns:
        The folder, with `~` expanded, or the Hub name.

    Raises:
        UserError: it is a file, there is no such folder, or the Hub has no such repository or cannot be reached.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        folder = os.path.dirname(path)
        there = os.path.isfile(os.path.join(folder, CONFIG_NAME))
        advice = (
            f"give {folder or '.'}, the folder that it is in" if there else f"with {CONFIG_NAME} and its other files"
        )
        raise UserError(f"{field}{name}: is a file, but a folder is needed{': ' if there else ', '}{advice}")
    if is_path(name):
        raise UserError(f"{field}{missing(path)}")
    if (reason := _why_not_from_the_hub(name, file)) is not None:
        likely = likely_names(path)
        hint = f" (did you mean {likely}?)" if likely else ""
        raise UserError(f"{field}{name or repr(name)}: no such folder here{hint}, and {constants.ENDPOINT} {reason}")
    return name


def is_path(name: str) -> bool:
    """Whether a name is that of a folder, there or not, and not of the Hub: `owner/name` is one if `owner` is here."""
    above = os.path.dirname(name)
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or os.path.isdir(above)


def _why_not_from_the_hub(name: str, file: str) -> str | None:
    """Why the Hub does not give this repository, as words that follow the Hub's address; None if it does."""
    try:
        # Unlike hf_hub_download, it does not repeat a request that failed.
        if try_to_load_from_cache(name, file) is None:
            get_hf_file_metadata(hf_hub_url(name, file))
    except RemoteEntryNotFoundError:
        return None  # the repository is there; whoever needs the file will say that it is not
    except HFValidationError:
        return "has no such names: they have the form NAME or OWNER/NAME"
    except GatedRepoError:
        return f"shows it only to those who asked for access at {constants.ENDPOINT}/{name}"
    except RepositoryNotFoundError:
        return "has no model of this name, or it is private: `hf auth login` logs in"
    except OfflineModeIsEnabled:
        return "is not asked, because HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return f"answers with an error ({message_of(error)})"
    except (HTTPError, OSError) as error:
        return f"cannot be reached ({message_of(error) or type(error).__name__})"
    return None


def models_in(folder: str | Path) -> str:
    """The models that the folders in `folder` hold, as words with an advice; "" if there are none."""
    if not os.path.isdir(folder):
        return ""
    holds = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, CONFIG_NAME))]
    # checkpoint-9 before checkpoint-10
    names = sorted(holds, key=lambda name: (len(name), name))
    if not names:
        return ""
    first = Path(folder, names[0])
    if len(names) == 1:
        return f"it holds the model {names[0]}: give {first}"
    more = ", ..." if len(names) > LISTED else ""
    return f"it holds the models {', '.join(names[:LISTED])}{more}: name one of them, such as {first}"
