"""Publish a converted or fine-tuned model on the Hub: its files, the code that loads them, and a model card.

    python -m conversion.publish clip-vit-l14-336/ org/clip-vit-l14-336 --dry-run
    python -m conversion.publish clip-vit-l14-336/ org/clip-vit-l14-336 --private

One commit. The folder itself stays as it is. After an error the same command goes on where it stopped.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_clip import HfClipConfig
from hf_clip.checkpoints.keys import identify_variant
from hf_clip.checkpoints.read import check_model, published_weights, read_model
from hf_clip.checkpoints.stock import why_not_stock
from hf_clip.checkpoints.write import write_model
from hf_clip.hub.model_card import name_of
from hf_clip.hub.publish import Upload, check_repo_id, link_all, list_uploads, publish_folder
from hf_clip.hub.remote_code import add_remote_code, described_in
from hf_clip.model.checked_files import LONGEST_LINE, one_line
from hf_clip.model.variants import get_variant
from model_cards import CHART, render_card, render_custom_card

FORMATS = ("hf_clip", "transformers")
CARD = "README.md"
WIDTH = 98


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
def staged(folder: Path, repo_id: str, format_name: str, variant_name: str | None) -> Iterator[Path]:
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
    if stored not in ("hf_clip", "clip") or (stored == "clip" and format_name == "hf_clip"):
        advice = "pass --format transformers" if stored == "clip" else "whole CLIP models alone can be published"
        found = "a config.json without a model_type" if stored is None else f"a {stored!r} model"
        raise ValueError(f"{folder} holds {found}; {advice}.")
    config = check_model(folder)
    if format_name == "transformers" and (reason := why_not_stock(config)):
        raise ValueError(f"{folder} cannot be published as --format transformers: {reason}.")
    variant_name = variant_name or published_weights(folder)
    if variant_name is not None and identify_variant(config) != get_variant(variant_name):
        raise ValueError(f"{folder} is no {variant_name}: its architecture is another. Leave out --variant.")
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        out = Path(temporary)
        if format_name == "hf_clip":
            link_all(folder, out)
            add_remote_code(out)
        else:
            write_model(out, read_model(folder), format_name)
        if not (folder / CARD).is_file():
            write_card(out, repo_id, variant_name, stock=format_name == "transformers")
        elif format_name != "hf_clip":
            shutil.copyfile(folder / CARD, out / CARD)
        yield out


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.2f} GB"


def listing(uploads: list[Upload]) -> str:
    width = max(len(upload.name) for upload in uploads)
    lines = [f"  {upload.name:<{width}}  {_size(upload.size):>9}" for upload in uploads]
    total = _size(sum(upload.size for upload in uploads))
    return "\n".join([*lines, f"  {f'{len(uploads)} files':<{width}}  {total:>9}"])


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    format_name: str = "hf_clip",
    variant_name: str | None = None,
) -> str | None:
    """Publish a folder; see the module. Returns the address of the commit, or None for a dry run.

    Raises FileNotFoundError, ValueError, or PublishingError for what the Hub or the network says.
    """
    folder = Path(folder)
    if variant_name is not None:
        get_variant(variant_name)
    with staged(folder, check_repo_id(repo_id), format_name, variant_name) as out:
        uploads = list_uploads(out)
        if dry_run:
            kind = "private " if private else ""
            print(f"Would push to the {kind}model repository {repo_id}, in one commit:\n{listing(uploads)}")
            print(f"Its card, {CARD}:")
            body = (out / CARD).read_text(encoding="utf-8").split("\n---\n", 1)[-1].strip()
            lines = [line for line in body.splitlines()[:8] if line and not line.startswith("|")]
            print("\n".join(f"  {line if len(line) <= WIDTH else line[: WIDTH - 1] + '…'}" for line in lines))
            return None
        return publish_folder(out, repo_id, private=private, message=f"Upload {name_of(repo_id)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.publish",
        description="Publish a model on the Hub with the code that loads it and a model card, in one commit.",
    )
    parser.add_argument("folder", help="folder that convert or finetune.py has written")
    parser.add_argument("repo_id", help="owner/name of the repository, which is created unless it is there")
    parser.add_argument("--private", action="store_true", help="make a repository that is created private")
    parser.add_argument("--dry-run", action="store_true", help="show what would go; nothing is sent")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf_clip",
        help="transformers: a stock repository for servers that take no code, ViTs only (default: %(default)s)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="say that these are the weights of that model of OpenAI's, for its card "
        "(known by itself when they were converted from the published file)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        address = publish(
            options.folder,
            options.repo_id,
            private=options.private or None,
            dry_run=options.dry_run,
            format_name=options.format,
            variant_name=options.variant,
        )
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error, LONGEST_LINE)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if address is not None:
        print(address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
