"""Prepare a folder for the Hub: add the code that loads it and a card, and write the layout that was asked for.

The folder itself is not changed. The files are put together in a temporary folder, in which weights are links.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.keys import identify_variant
from ..checkpoints.read import check_model, published_weights, read
from ..checkpoints.remote_code import add_remote_code, described_in
from ..checkpoints.stock import why_not_stock
from ..checkpoints.write import write
from ..model.configuration_hf_clip import HfClipConfig
from ..model.variants import get_variant
from .model_card import name_of, named_for_repository
from .openai_cards import CHART, render_card, render_custom_card
from .upload import Upload, check_repo_id, list_uploads, publish_folder

LAYOUTS = ("hf_clip", "transformers")
"""The layouts in which a model is published."""

CARD = "README.md"

PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)\n*")
"""A picture in a card. Its place is the group."""


def link_all(source: Path, target: Path) -> None:
    """Fill a second folder with all files that are published. JSON and Python files are copied, all others linked."""
    for upload in list_uploads(source):
        (target / upload.name).parent.mkdir(parents=True, exist_ok=True)
        if upload.name.endswith((".json", ".py")):  # copied, since these are changed later
            shutil.copyfile(source / upload.name, target / upload.name)
        else:
            (target / upload.name).symlink_to((source / upload.name).resolve())


def write_card(folder: Path, repo_id: str, variant_name: str | None, stock: bool = False) -> None:
    """Write a card into a folder. Without `variant_name` it describes the architecture alone."""
    if variant_name is None:
        text = render_custom_card(HfClipConfig.from_pretrained(folder), repo_id, stock=stock)
    else:
        text = render_card(variant_name, repo_id, stock=stock)
        (folder / CHART.name).unlink(missing_ok=True)  # it may be a link to a file in the user's folder
        shutil.copyfile(CHART, folder / CHART.name)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(text, encoding="utf-8")


def take_card(folder: Path, out: Path, config: HfClipConfig, repo_id: str, *, stock: bool) -> None:
    """Take a folder's own card along, with the pictures beside it. The trainer's is written for the repository."""
    text = (folder / CARD).read_text(encoding="utf-8")
    for name in PICTURE.findall(text):
        if Path(name).name == name and (folder / name).is_file() and not (out / name).exists():
            (out / name).symlink_to((folder / name).resolve())
    renamed = named_for_repository(text, config, repo_id, stock=stock)
    (out / CARD).unlink(missing_ok=True)  # it may be a link to the user's
    if renamed is None:
        shutil.copyfile(folder / CARD, out / CARD)
        return
    kept = PICTURE.sub(lambda found: found[0] if "/" in found[1] or (out / found[1]).exists() else "", renamed)
    (out / CARD).write_text(kept, encoding="utf-8")


@contextmanager
def staged(folder: Path, repo_id: str, layout: str, variant_name: str | None) -> Iterator[Path]:
    """Make a temporary folder with all files that are published, for a `with` block.

    Args:
        folder: Folder of the model.
        repo_id: Name of the repository.
        layout: One of `LAYOUTS`.
        variant_name: Name of OpenAI's model whose weights these are. None: it is found out from the weights.

    Yields:
        The temporary folder.

    Raises:
        FileNotFoundError: There is no such folder, or it has no config.json.
        ValueError: The folder holds no model that can be published in this layout.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; name a folder that convert or finetune.py has written, in the layout of "
            f"hf_clip or transformers."
        )
    stored = described_in(folder)["config.json"].get("model_type")
    if stored not in ("hf_clip", "clip") or (stored == "clip" and layout == "hf_clip"):
        advice = "pass --format transformers" if stored == "clip" else "whole CLIP models alone can be published"
        found = "a config.json without a model_type" if stored is None else f"a {stored!r} model"
        raise ValueError(f"{folder} holds {found}; {advice}.")
    config = check_model(folder)
    if layout == "transformers" and (reason := why_not_stock(config)):
        raise ValueError(f"{folder} cannot be published as --format transformers: {reason}.")
    variant_name = variant_name or published_weights(folder)
    if variant_name is not None and identify_variant(config) != get_variant(variant_name):
        raise ValueError(f"{folder} is no {variant_name}: its architecture is another. Leave out --variant.")
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        out = Path(temporary)
        if layout == "hf_clip":
            link_all(folder, out)
            add_remote_code(out)
        else:
            write(*read(folder), out, layout)
        if not (folder / CARD).is_file():
            write_card(out, repo_id, variant_name, stock=layout == "transformers")
        else:
            take_card(folder, out, config, repo_id, stock=layout == "transformers")
        yield out


@dataclass
class Publication:
    """The result of publishing, or of a dry run.

    Attributes:
        uploads: Files that are published.
        card: Text of the model card.
        address: Address of the commit, or of the repository if nothing had changed. None for a dry run.
    """

    uploads: list[Upload]
    card: str
    address: str | None = None


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    layout: str = "hf_clip",
    variant_name: str | None = None,
) -> Publication:
    """Publish a model in one commit: its files, the code that loads them, and a model card.

    The folder itself is not changed. After an error the same call continues where the last one stopped.

    Args:
        folder: A folder that `convert` or the trainer wrote.
        repo_id: Name of the repository, as owner/name. It is created if it is missing.
        private: Whether a new repository is private. None: the default of its owner.
        dry_run: Whether to send nothing.
        layout: One of `LAYOUTS`.
        variant_name: Name of OpenAI's model whose weights these are. None: it is found out from the weights.

    Returns:
        The files, the card, and the address.

    Raises:
        FileNotFoundError: There is no such folder, or a file in it is missing.
        ValueError: The folder holds no model that can be published in this way.
        PublishingError: The Hub refused, or the connection failed.
    """
    if variant_name is not None:
        get_variant(variant_name)
    with staged(Path(folder), check_repo_id(repo_id), layout, variant_name) as out:
        found = Publication(list_uploads(out), (out / CARD).read_text(encoding="utf-8"))
        if not dry_run:
            found.address = publish_folder(out, repo_id, private=private, message=f"Upload {name_of(repo_id)}")
        return found


__all__ = ["CARD", "LAYOUTS", "Publication", "publish", "staged"]
