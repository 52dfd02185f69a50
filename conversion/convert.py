"""Turn a CLIP into a folder that transformers loads, or into another library's layout.

    python -m conversion.convert ViT-L-14-336px.pt clip-vit-l14-336/
    python -m conversion.convert ViT-L/14@336px clip-vit-l14-336/       # downloads it
    python -m conversion.convert clip-vit-l14-336/ stock/ --format transformers

Reads OpenAI's TorchScript archives, state dicts and safetensors with OpenAI's names, open_clip's training checkpoints,
and folders or repositories of hf_clip, stock CLIP and open_clip. Tensors keep their dtypes and their bits. The folder
appears only when it is whole.
"""

import argparse
import sys
from pathlib import Path

from hf_clip import HfClipConfig
from hf_clip.checkpoints.download import byte_progress
from hf_clip.checkpoints.folders import DESCRIPTIONS
from hf_clip.checkpoints.keys import identify_variant
from hf_clip.checkpoints.read import read_model
from hf_clip.checkpoints.whole_folder import check_destination, whole_folder
from hf_clip.checkpoints.write import FORMATS, write_model
from hf_clip.hub.remote_code import add_remote_code
from hf_clip.model.checked_files import LONGEST_LINE, one_line
from hf_clip.model.configuration_hf_clip import OPENAI_VOCAB_SIZE


def check_leftovers(out: Path, folder: Path) -> None:
    """Refuse to write over a model of another layout: one of its files would go on to describe the old one.

    folder: what is about to be moved into `out`
    """
    written = [name for name in DESCRIPTIONS if (folder / name).is_file()]
    left = [name for name in DESCRIPTIONS if name not in written and (out / name).is_file()]
    if written and left:
        raise FileExistsError(
            f"{out} holds {', '.join(left)} of a model in another layout, which would be read with the new one's "
            f"files; name another folder, or remove it."
        )


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format_name: str = "hf_clip",
    config: str | Path | None = None,
    activation: str | None = None,
    weights: str | None = None,
    vocabulary: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    offline: bool = False,
    remote_code: bool = False,
) -> HfClipConfig:
    """Convert one model into the folder `out`; see the module. Returns the model's configuration.

    source:      a checkpoint file, one of OpenAI's nine names, a folder, or a repository on the Hub
    format_name: one of `hf_clip.checkpoints.write.FORMATS`
    config, activation, weights, vocabulary, verify, offline: see `hf_clip.checkpoints.read.read_model`
    remote_code: put the code beside the model that loads it where this package isn't installed

    Raises OSError (a file or folder that is missing, in use or full; a download that failed) or ValueError (what a
    file holds; CheckpointError is one), in one line, and then nothing is written to `out`.
    """
    if remote_code and format_name != "hf_clip":
        raise ValueError(f"--remote-code is for this package's own layout; --format {format_name} needs no code.")
    out = check_destination(out, overwrite)
    model = read_model(
        source,
        config=config,
        activation=activation,
        weights=weights,
        vocabulary=vocabulary,
        verify=verify,
        offline=offline,
        progress=lambda message: print(message, file=sys.stderr),
    )
    with (
        whole_folder(out, overwrite=overwrite, needed=model.nbytes) as folder,
        byte_progress(f"Writing {out.name}", model.nbytes) as bar,
    ):

        def after_each(written: int) -> None:
            bar.update(written)
            model.forget_read_pages()

        write_model(folder, model, format_name, after_each)
        if format_name == "open_clip" and model.config.text_config.vocab_size != OPENAI_VOCAB_SIZE:
            print(
                "note: the vocabulary is not OpenAI's. open_clip finds it in a folder; before a push, write the "
                "repository's name for hf_tokenizer_name into open_clip_config.json.",
                file=sys.stderr,
            )
        if remote_code:
            add_remote_code(folder)
        check_leftovers(out, folder)
    return model.config


def describe(config: HfClipConfig) -> str:
    variant = identify_variant(config)
    vision = config.vision_config
    kind = "ResNet" if vision.model_type == "hf_clip_resnet" else "ViT"
    return variant.name if variant else f"a custom {kind} CLIP of {vision.image_size} pixels"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Turn a CLIP into a folder that transformers loads, or into another library's layout.",
    )
    parser.add_argument(
        "source",
        help="checkpoint file, one of OpenAI's nine names, or a folder or repository (hf_clip, stock, open_clip)",
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="hf_clip", help="layout of the folder (default: %(default)s)"
    )
    parser.add_argument("--remote-code", action="store_true", help="add the code that loads it without this package")
    parser.add_argument("--config", help="open_clip_config.json or config.json of a checkpoint file that needs one")
    parser.add_argument(
        "--activation", choices=["quick_gelu", "gelu"], help="of a training checkpoint that comes without --config"
    )
    parser.add_argument("--weights", choices=["model", "ema"], help="of a training checkpoint that has both")
    parser.add_argument("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if neither installed nor on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the model's files in an existing folder")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="don't compare a file's sha256 with the published one, or with the Hub's",
    )
    parser.add_argument("--offline", action="store_true", help="download nothing (also: HF_HUB_OFFLINE=1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        config = convert(
            options.source,
            options.out,
            format_name=options.format,
            config=options.config,
            activation=options.activation,
            weights=options.weights,
            vocabulary=options.vocab,
            overwrite=options.overwrite,
            verify=not options.no_verify,
            offline=options.offline,
            remote_code=options.remote_code,
        )
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error, LONGEST_LINE)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.out}: {describe(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
