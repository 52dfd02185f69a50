"""Turn an original CLIP checkpoint into a folder that transformers loads.

    python -m conversion.convert ViT-L-14-336px.pt clip-vit-l14-336/

Reads OpenAI's TorchScript archives, state dicts and safetensors with OpenAI's names. Tensors keep their dtypes.
The folder appears only when it is whole.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from tqdm import tqdm

from hf_clip import VARIANTS, HfClipConfig, HfClipImageProcessor, HfClipProcessor, HfClipTokenizer
from hf_clip.original import CheckpointError, config_from_shapes, convert_names, identify_variant, read_checkpoint
from hf_clip.original.vocabulary import find_vocabulary
from hf_clip.whole_folder import check_destination, whole_folder

from .safetensors_stream import write_safetensors

CHUNK = 16 * 1024 * 1024


def progress(title: str, total: int) -> tqdm:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False)


def verify_published(path: Path) -> None:
    """When a file bears one of OpenAI's nine names, it must be that file: compare its sha256 with the table's."""
    expected = {variant.checkpoint: variant.sha256 for variant in VARIANTS.values()}.get(path.name)
    if expected is None or not path.is_file():
        return
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"Checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{path} has sha256 {digest.hexdigest()}, but the published {path.name} has {expected}. Download it again; "
            f"if it is a model of your own, rename it or pass --no-verify."
        )


def read_original(path: str | Path, verify: bool = True) -> tuple:
    """An original checkpoint, its configuration, and its tensors under our names (views of the mapped file)."""
    if verify:
        verify_published(Path(path))
    checkpoint = read_checkpoint(path)
    try:
        config = config_from_shapes(checkpoint.tensors)
        return checkpoint, config, convert_names(checkpoint.tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


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

    Raises FileNotFoundError, FileExistsError, CheckpointError or ValueError, and then nothing is written.
    """
    out = check_destination(out, overwrite)
    checkpoint, config, tensors = read_original(checkpoint_path, verify)
    text = config.text_config
    tokenizer = HfClipTokenizer.from_vocabulary_file(
        find_vocabulary(vocabulary, offline), vocab_size=text.vocab_size, model_max_length=text.max_position_embeddings
    )
    image_processor = HfClipImageProcessor.for_image_size(config.vision_config.image_size)
    config.architectures = ["HfClipModel"]
    config.dtype = "float32"  # what to compute in; the file keeps what the original stored
    size = sum(tensor.nbytes for tensor in tensors.values())
    with whole_folder(out) as folder, progress(f"Writing {out.name}", size) as bar:

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
    parser.add_argument("checkpoint", help="TorchScript archive, state-dict .pt, or safetensors with OpenAI's names")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if neither installed nor on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the model's files in an existing folder")
    parser.add_argument("--no-verify", action="store_true", help="don't compare a published file's sha256")
    parser.add_argument("--offline", action="store_true", help="never ask the Hub (also: HF_HUB_OFFLINE=1)")
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
            offline=options.offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {describe(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
