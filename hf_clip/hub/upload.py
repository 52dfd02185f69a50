"""Publish a folder as a repository on the Hub, in one commit, and explain the Hub's errors.

A push creates the repository if it is missing, finds the files that changed, uploads the large ones, and commits all of
them together. It can be repeated after a failure at any point. Large files that have arrived are not sent again, and an
unchanged folder makes no commit.

Invariant: a token is given to huggingface_hub and nothing else. No message contains it.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.remote_code import MODEL_MAPS, add_remote_code, described_in
from ..model.configuration_hf_clip import HfClipConfig
from .model_card import architecture_table, card_metadata, card_text, name_of, usage_section

STOCK_CARD_MARK = "This model card has been automatically generated."
"""Text of the card that transformers' `push_to_hub` writes for a repository without one."""

UNPUBLISHED = (
    "__pycache__",
    "checkpoints",
    "checkpoint-*",
    "frozen_features",
    "training_args.bin",
    "optimizer.pt",
    "training_config.json",
    "*.unfinished",
)
"""Files and folders that are never published, besides hidden ones: training programs leave them beside a model."""


class PublishingError(OSError):
    """A folder was not published. The message says why, and what to do."""


@dataclass(frozen=True)
class Upload:
    """A file that is published.

    Attributes:
        name: Path within the repository.
        size: Size in bytes.
    """

    name: str
    size: int


def check_repo_id(repo_id: str) -> str:
    """Return the name of a repository. Raises ValueError if the Hub does not accept it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error} Name it like org/clip-vit-b32.") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository: write owner/name, such as org/clip-vit-b32.")
    return repo_id


def _is_published(name: str) -> bool:
    if name.startswith("."):
        return name == ".gitattributes"
    return not any(fnmatch(name, pattern) for pattern in UNPUBLISHED)


def list_uploads(folder: str | Path) -> list[Upload]:
    """List the files of a folder that are published, sorted by name."""
    folder = Path(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if all(map(_is_published, path.relative_to(folder).parts))]
    return [Upload(path.relative_to(folder).as_posix(), path.stat().st_size) for path in kept]


def _without_token(text: str, token: str | None) -> str:
    return text.replace(token, "<token>") if token else text


def explain(error: BaseException, repo_id: str, token: str | None = None) -> PublishingError:
    """Turn an error of the Hub, or of the connection to it, into one that says what to do."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    endpoint = constants.ENDPOINT
    said = _without_token(
        getattr(error, "server_message", None) or str(error).strip().split("\n")[-1], token or get_token()
    )
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE=1 forbids all traffic; unset it, or look at what would go with --dry-run"
    elif isinstance(error, LocalTokenNotFoundError) or (status == 401 and not get_token()):
        reason = "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
    elif status == 401:
        reason = "the Hub doesn't know your token; make a new one that may write, and run `hf auth login`"
    elif status == 403:
        reason = f"your token may not write to {repo_id.split('/')[0]} ({said}); take one that may, or another name"
    elif status == 404 or isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository, or your token may not see it"
    elif status is not None:
        reason = f"the Hub answered {status} ({said}); try again later"
    else:
        reason = (
            f"the connection to {endpoint} failed ({said}); the same command goes on where it stopped, since what has "
            f"arrived isn't sent again"
        )
    return PublishingError(f"{repo_id} was not published: {reason}.")


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload model",
    revision: str | None = None,
    repo_type: str = "model",
) -> str:
    """Push a folder to the Hub in one commit. The repository is created if it is missing.

    The folder is never changed. After a failure the same call continues where the last one stopped.

    Args:
        folder: The folder.
        repo_id: Name of the repository, such as "org/clip-vit-b32".
        private: Whether a new repository is private. None: the default of its owner.
        token: A token that may write. None: that of `hf auth login`, or of `HF_TOKEN`.
        message: Message of the commit.
        revision: Branch. None: main.
        repo_type: "model", or "space" for a Space that Gradio runs.

    Returns:
        The address of the commit, or of the repository if nothing had changed.

    Raises:
        PublishingError: Nothing, or not everything, was published.
    """
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
        try:
            is_private = api.repo_info(repo_id, repo_type=repo_type).private
            if private and not is_private:
                raise PublishingError(
                    f"{repo_id} was not published: it is there already and public, though a private one was asked for. "
                    f"Make it private in its settings, or take another name."
                )
        except RepositoryNotFoundError as error:
            raise PublishingError(
                f"{repo_id} was not published: the name is taken, and not by a {repo_type} repository that your token "
                f"may see; choose another."
            ) from error
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            allow_patterns=[upload.name for upload in list_uploads(folder)],
        )
        return str(commit.commit_url)
    except PublishingError:
        raise
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise explain(error, repo_id, token) from error
    except RuntimeError as error:  # the client's error for a failed upload of a large file
        if error.__cause__ is None:
            raise
        raise explain(error.__cause__, repo_id, token) from error
    except ValueError as error:  # e.g. a card that the Hub does not accept
        reason = _without_token(" ".join(str(error).split()), token or get_token())
        raise PublishingError(f"{repo_id} was not published: {reason}.") from error


def card_of_folder(folder: str | Path, repo_id: str) -> str:
    """Write the card of a model of which only the configuration is known."""
    config = HfClipConfig.from_pretrained(folder)
    body = "\n\n".join(
        [
            f"# {name_of(repo_id)}",
            "A CLIP model: two towers, one for images and one for texts, that map into the same space.",
            architecture_table(config),
            "## How to use it",
            usage_section(config, repo_id),
        ]
    )
    return card_text(card_metadata(repo_id), body)


def prepare_for_hub(folder: str | Path, repo_id: str) -> None:
    """Add to a folder, before `push_to_hub`, the code that loads it, and a card in place of transformers' empty one."""
    folder = Path(folder)
    described = described_in(folder)
    config = described.get("config.json")
    if not described or (config is not None and config.get("model_type") not in MODEL_MAPS):
        return
    add_remote_code(folder)
    card = folder / "README.md"
    is_whole = config is not None and config["model_type"] == "hf_clip"
    if is_whole and card.is_file() and STOCK_CARD_MARK in card.read_text(encoding="utf-8"):
        card.write_text(card_of_folder(folder, repo_id), encoding="utf-8")


__all__ = [
    "PublishingError",
    "Upload",
    "card_of_folder",
    "check_repo_id",
    "list_uploads",
    "prepare_for_hub",
    "publish_folder",
]
