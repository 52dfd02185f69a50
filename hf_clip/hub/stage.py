"""A folder, made ready for the Hub: with the code that loads it and a card, in the layout that was asked for.

The folder itself stays as it is. What goes is put together in a temporary one, where weights are links.
"""

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
from .model_card import name_of
from .openai_cards import CHART, render_card, render_custom_card
from .upload import Upload, check_repo_id, list_uploads, publish_folder

LAYOUTS = ("hf_clip", "transformers")
"""The layouts in which a model is published."""

CARD = "README.md"


def link_all(source: Path, target: Path) -> None:
    """Fill a second folder with all files that are published. JSON and Python files are copied, all others linked."""
    for upload in list_uploads(source):
        (target / upload.name).parent.mkdir(parents=True, exist_ok=True)
        if upload.name.endswith((".json", ".py")):  # copied, since these are changed later
            shutil.copyfile(source / upload.name, target / upload.name)
        else:
            (target / upload.name).symlink_to((source / upload.name).resolve())


def write_card(folder: Path, repo_id: str, variant_name: str | None, stock: bool = False) -> None:
    """The card of one of OpenAI's models if these are known to be its weights; else one of the architecture alone."""
    if variant_name is None:
        text = render_custom_card(HfClipConfig.from_pretrained(folder), repo_id, stock=stock)
    else:
        text = render_card(variant_name, repo_id, stock=stock)
        (folder / CHART.name).unlink(missing_ok=True)  # what is staged may be a link to the user's own file
        shutil.copyfile(CHART, folder / CHART.name)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(text, encoding="utf-8")


@contextmanager
def staged(folder: Path, repo_id: str, layout: str, variant_name: str | None) -> Iterator[Path]:
    """A temporary folder with everything that goes to the Hub.

    variant_name: which of OpenAI's models these weights are; by default what the weights themselves say
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
        elif layout != "hf_clip":
            shutil.copyfile(folder / CARD, out / CARD)
        yield out


@dataclass
class Publication:
    """What goes to the Hub, or would go.

    Attributes:
        uploads: The files.
        card: The text of the model card.
        address: That of the commit, or of the repository where nothing had changed; None where nothing was sent.
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

    The folder itself stays as it is. After an error the same call goes on where it stopped.

    Args:
        folder: What `convert` or the trainer has written.
        repo_id: owner/name of the repository, which is created unless it is there.
        private: Whether a repository that is created is private; None leaves it to the owner's setting.
        dry_run: Whether nothing is sent.
        layout: One of `LAYOUTS`.
        variant_name: Which of OpenAI's models these weights are; by default what the weights themselves say.

    Returns:
        What was sent.

    Raises:
        FileNotFoundError: There is no such folder, or a file in it is missing.
        ValueError: The folder holds no model that can be published in this way.
        PublishingError: What the Hub or the network says.
    """
    if variant_name is not None:
        get_variant(variant_name)
    with staged(Path(folder), check_repo_id(repo_id), layout, variant_name) as out:
        found = Publication(list_uploads(out), (out / CARD).read_text(encoding="utf-8"))
        if not dry_run:
            found.address = publish_folder(out, repo_id, private=private, message=f"Upload {name_of(repo_id)}")
        return found


__all__ = ["CARD", "LAYOUTS", "Publication", "publish", "staged"]
