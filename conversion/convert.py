"""Turn an original CLIP checkpoint into a folder that transformers loads.

    python -m conversion.convert ViT-L-14-336px.pt clip-vit-l14-336/
    python -m conversion.convert ViT-L/14@336px clip-vit-l14-336/       # downloads it

Reads OpenAI's TorchScript archives, state dicts and safetensors with OpenAI's names. Tensors keep their dtypes.
The folder appears only when it is whole.
"""

import argparse
import sys
from pathlib import Path

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipProcessor, HfClipTokenizer
from hf_clip.original import identify_variant, read_original
from hf_clip.original.download import byte_progress, find_original
from hf_clip.original.vocabulary import find_vocabulary
from hf_clip.whole_folder import check_destination, whole_folder

from .safetensors_stream import write_safetensors


def convert(
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    vocabulary: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    offline: bool = False,
) -> HfClipConfig:
    """Convert one checkpoint into the folder `out`; see the module. Returns the model's configuration.

    checkpoint_path: a file, or one of OpenAI's nine names, which is downloaded unless it is in the cache

    Raises FileNotFoundError, FileExistsError, ConnectionError, CheckpointError or ValueError, and then nothing is
    written to `out`.
    """
    out = check_destination(out, overwrite)
    vocabulary = find_vocabulary(vocabulary, offline)
    checkpoint, config, tensors = read_original(find_original(checkpoint_path, offline), verify)
    text = config.text_config
    tokenizer = HfClipTokenizer.from_vocabulary_file(
        vocabulary, vocab_size=text.vocab_size, model_max_length=text.max_position_embeddings
    )
    image_processor = HfClipImageProcessor.for_image_size(config.vision_config.image_size)
    config.architectures = ["HfClipModel"]
    config.dtype = "float32"  # what to compute in; the file keeps what the original stored
    size = sum(tensor.nbytes for tensor in tensors.values())
    with whole_folder(out) as folder, byte_progress(f"Writing {out.name}", size) as bar:

        def after_each(written: int) -> None:
            bar.update(written)
            checkpoint.forget_read_pages()

        write_safetensors(folder / "model.safetensors", tensors, after_each)
        config.save_pretrained(folder)
        HfClipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return config


def describe(config: HfClipConfig) -> str:
    variant = identify_variant(config)
    vision = config.vision_config
    kind = "ResNet" if vision.model_type == "hf_clip_resnet" else "ViT"
    return variant.name if variant else f"a custom {kind} CLIP of {vision.image_size} pixels"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Turn an original CLIP checkpoint into a folder that transformers loads.",
    )
    parser.add_argument("checkpoint", help="TorchScript archive, state-dict .pt, safetensors, or one of the nine names")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if neither installed nor on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the model's files in an existing folder")
    parser.add_argument("--no-verify", action="store_true", help="don't compare a published file's sha256")
    parser.add_argument("--offline", action="store_true", help="download nothing (also: HF_HUB_OFFLINE=1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        config = convert(
            options.checkpoint,
            options.out,
            vocabulary=options.vocab,
            overwrite=options.overwrite,
            verify=not options.no_verify,
            offline=options.offline,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.out}: {describe(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
