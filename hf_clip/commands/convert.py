"""`hf-clip convert`: a checkpoint of any layout into a folder of any layout."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..model.configuration_hf_clip import HfClipConfig


class Layout(str, Enum):
    hf_clip = "hf_clip"
    transformers = "transformers"
    open_clip = "open_clip"
    openai = "openai"
    diffusers = "diffusers"
    comfyui = "comfyui"


class Activation(str, Enum):
    quick_gelu = "quick_gelu"
    gelu = "gelu"


class Weights(str, Enum):
    model = "model"
    ema = "ema"


def describe(config: "HfClipConfig") -> str:
    """Which of OpenAI's models a configuration is, or which kind of model otherwise."""
    from ..checkpoints.keys import identify_variant

    variant = identify_variant(config)
    vision = config.vision_config
    kind = "ResNet" if vision.model_type == "hf_clip_resnet" else "ViT"
    return variant.name if variant else f"a custom {kind} CLIP of {vision.image_size} pixels"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint file, one of OpenAI's nine names, or a folder or repository (hf_clip, stock, open_clip)."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    layout: Annotated[Layout, typer.Option("--format", "--layout", help="Layout of the folder.")] = Layout.hf_clip,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add the code that loads the model without this package.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(help="open_clip_config.json or config.json of a checkpoint file that needs one.", metavar="FILE"),
    ] = None,
    activation: Annotated[
        Activation | None, typer.Option(help="Of a training checkpoint that comes without --config.")
    ] = None,
    weights: Annotated[Weights | None, typer.Option(help="Of a training checkpoint that has both.")] = None,
    vocab: Annotated[
        str | None,
        typer.Option(help="bpe_simple_vocab_16e6.txt.gz, if neither installed nor on the Hub.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model's files in an existing folder.")
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Don't compare a file's sha256 with the published one, or with the Hub's."),
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing (also: HF_HUB_OFFLINE=1).")] = False,
) -> None:
    """Turn a CLIP into a folder that transformers loads, or into another library's layout.

    Reads OpenAI's TorchScript archives, state dicts and safetensors with OpenAI's names, open_clip's training
    checkpoints, and folders or repositories of hf_clip, stock CLIP and open_clip. Tensors keep their dtypes and their
    bits. The folder appears only when it is whole.

    Examples:

        hf-clip convert ViT-L-14-336px.pt clip-vit-l14-336/

        hf-clip convert clip-vit-l14-336/ stock/ --format transformers
    """
    from ..checkpoints.conversion import convert as convert_checkpoint

    try:
        described = convert_checkpoint(
            source,
            out,
            layout.value,
            config=config,
            activation=activation and activation.value,
            weights=weights and weights.value,
            vocabulary=vocab,
            overwrite=overwrite,
            verify=not no_verify,
            offline=offline,
            remote_code=remote_code,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
    print(f"{out}: {describe(described)}")
