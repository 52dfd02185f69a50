"""The publication of a run: in which repository, at which checkpoints, and what a push that fails does to the run."""

import sys
from pathlib import Path

from huggingface_hub import HfApi

from ..hub.upload import PublishingError, check_repo_id, publish_folder
from .config import TrainingConfig


def name_repository(config: TrainingConfig) -> str:
    """The repository that a run publishes in.

    Args:
        config: the options. Without `hub_model_id` the repository is the user's, named as the output folder.

    Returns:
        Its name, `owner/name`.

    Raises:
        ValueError: the Hub takes no such name, or the user is not known.
    """
    if config.hub_model_id is not None:
        return check_repo_id(config.hub_model_id)
    name = Path(config.output_dir).resolve().name
    try:
        owner = HfApi().whoami()["name"]
    except Exception as error:  # no token, one that the Hub does not know, no network
        raise ValueError(
            f"--push_to_hub would publish {name} in your account, which could not be found out "
            f"({str(error).strip().splitlines()[0]}): log in with `hf auth login`, or name the repository with "
            f"--hub_model_id."
        ) from None
    return check_repo_id(f"{owner}/{name}")


def publish(config: TrainingConfig, message: str) -> None:
    """Push the output folder, and print where it can be seen. The main process alone calls this.

    Args:
        config: the options, with a `hub_model_id`.
        message: of the commit.

    Raises:
        PublishingError: it was not published. What is on this machine stays as it is.
    """
    assert config.hub_model_id is not None
    print(publish_folder(config.output_dir, config.hub_model_id, message=message))


def publish_if_possible(config: TrainingConfig, message: str) -> None:
    """`publish`, in the midst of a run, which goes on where a push fails."""
    try:
        publish(config, message)
    except PublishingError as error:
        print(f"\nnote: {error}", file=sys.stderr)
