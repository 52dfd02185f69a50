"""The three functions of OpenAI's `clip` module: `import hf_clip as clip` runs code that was written for it.

Example::

    import hf_clip as clip

    model, preprocess = clip.load("ViT-B/32", device="cpu")
    image = preprocess(Image.open("cat.jpg")).unsqueeze(0)
    text = clip.tokenize(["a cat", "a dog"])
    logits_per_image, logits_per_text = model(image, text)

Three things differ from the original. Weights are float32 on every device; `model.half()` gives the precision that the
original has on a GPU. The text tower computes no padding behind the longest text. TorchScript is never run.

`model.hf_model` is the HfClipModel, and the parameters of `model` have its names. Parts that are the same in both
models can be read and set by the original's names too, such as `logit_scale`, `token_embedding`, `visual.conv1` and
`visual.layer4`. For any other part of the original an AttributeError names the part that is like it. `load_state_dict`
takes the names of the original as well as those of `model`.

Dimensions: B batch, I images, T texts, L text length, W tower width, D embedding, C channels, Y × X pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints.download import fetch_original
from .checkpoints.in_memory import build_model
from .checkpoints.keys import convert_names
from .checkpoints.original import read_original
from .checkpoints.read import StoredModel
from .checkpoints.vocabulary import find_vocabulary
from .model.hub_repository import CHECKPOINT_SUFFIXES
from .model.image_processing_hf_clip import HfClipImageProcessor
from .model.modeling_hf_clip import HfClipModel, HfClipResNetModel
from .model.tokenization_hf_clip import HfClipTokenizer
from .model.variants import VARIANTS, get_variant, refuse_unknown_variant

UNLIMITED = 1 << 30


def available_models() -> list[str]:
    """List OpenAI's nine models.

    Returns:
        The names that `load` takes, such as "RN50" and "ViT-L/14@336px".
    """
    return list(VARIANTS)


class Preprocess:
    """Prepares one image for the model: a Pillow image becomes a tensor (3, Y, X), float32, normalised.

    It can be the transform of a data set.

    Args:
        image_processor: The processor with the model's image size.
    """

    def __init__(self, image_processor: HfClipImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> Tensor:
        given: Any = image
        many = isinstance(given, (list, tuple))
        pixel_values: Any = () if many else self.image_processor(given, return_tensors="pt")["pixel_values"]
        if len(pixel_values) != 1:
            raise TypeError(
                f"preprocess takes one image, but got a {type(given).__name__} of {len(given)}; for several, "
                f"torch.stack([preprocess(image) for image in images])."
            )
        return pixel_values[0]

    def __repr__(self) -> str:
        return f"Preprocess({dict(self.image_processor.crop_size)})"


class OriginalNames(nn.Module):
    """A module that also answers to the names of the original's parts.

    Args:
        same: From a name in the original to the path of the same part here. These parts can be read and set.
        moved: From a name in the original to a description of the part here that is like it. Reading or setting such a
            name raises an AttributeError with this description.
    """

    def __init__(self, same: dict[str, str], moved: dict[str, str]):
        super().__init__()
        self.same, self.moved = same, moved

    def __getattr__(self, name: str) -> Any:
        if place := self.__dict__.get("same", {}).get(name):
            return attrgetter(place)(self)
        self._refuse_moved(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if place := self.__dict__.get("same", {}).get(name):
            *owner, last = place.split(".")
            return setattr(attrgetter(".".join(owner))(self), last, value)
        self._refuse_moved(name)
        return super().__setattr__(name, value)

    def _refuse_moved(self, name: str) -> None:
        if place := self.__dict__.get("moved", {}).get(name):
            raise AttributeError(f"{name!r} of the original is not in hf_clip; what is like it is {place}.", name=name)


SAME_IN_VIT = {
    "conv1": "vision_model.embeddings.patch_embedding",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
}
MOVED_IN_VIT = {
    "transformer": "visual.vision_model.encoder, which takes (B, L, W)",
    "proj": "visual.visual_projection, whose weight is (D, W)",
}
SAME_IN_RESNET = {
    name: f"vision_model.{name}"
    for name in ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "layer1", "layer2", "layer3", "layer4"]
}
MOVED_IN_RESNET = {"attnpool": "visual.vision_model.attnpool, without its c_proj, which is visual.visual_projection"}


class Visual(OriginalNames):
    """The image tower with its projection, like `visual` of the original: pixel values (B, C, Y, X) → (B, D)."""

    def __init__(self, hf_model: HfClipModel):
        is_resnet = isinstance(hf_model.vision_model, HfClipResNetModel)
        super().__init__(*((SAME_IN_RESNET, MOVED_IN_RESNET) if is_resnet else (SAME_IN_VIT, MOVED_IN_VIT)))
        self.input_resolution: int = hf_model.config.vision_config.image_size
        self.output_dim: int = hf_model.config.projection_dim
        self.vision_model = hf_model.vision_model
        self.visual_projection = hf_model.visual_projection
        self.__dict__["hf_model"] = hf_model  # not registered: this module has the image tower's parameters alone
        self.training = hf_model.training

    def forward(self, image: Tensor) -> Tensor:
        """Encode images: (B, C, Y, X) → (B, D), not normalised."""
        return self.hf_model.encode_image(image)


class OriginalCLIP(OriginalNames):
    """An HfClipModel that is called like the original model.

    The HfClipModel, with its layers and `save_pretrained`, is the attribute `hf_model`. Parameters and the tensors of
    `state_dict` have its names. `visual` may be replaced by another module.

    Args:
        hf_model: The model.
    """

    def __init__(self, hf_model: HfClipModel):
        same = {
            "logit_scale": "hf_model.logit_scale",
            "token_embedding": "hf_model.text_model.embeddings.token_embedding",
            "positional_embedding": "hf_model.text_model.embeddings.position_embedding.weight",
            "ln_final": "hf_model.text_model.final_layer_norm",
        }
        moved = {
            "transformer": "hf_model.text_model.encoder, which takes (B, L, W) and a mask",
            "text_projection": "hf_model.text_projection, whose weight is (D, W)",
        }
        super().__init__(same, moved)
        self.hf_model = hf_model
        config = hf_model.config
        self.context_length: int = config.text_config.max_position_embeddings
        self.vocab_size: int = config.text_config.vocab_size
        self.__dict__["visual"] = Visual(hf_model)  # not registered: its tensors would have two names each
        self.register_load_state_dict_pre_hook(_take_original_names)

    def train(self, mode: bool = True) -> "OriginalCLIP":
        """Set training or evaluation mode, of a replaced `visual` too."""
        self.visual.train(mode)
        return super().train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, to which images are converted."""
        return self.hf_model.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images: (B, C, Y, X) → (B, D), not normalised."""
        return self.visual(image.to(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode texts: ids (B, L), padded with zeros → (B, D), not normalised."""
        used = text.ne(0).any(dim=0).nonzero()  # a column of padding changes no feature
        length = int(used.max()) + 1 if len(used) else text.shape[1]
        return self.hf_model.encode_text(text[:, :length])

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Compare images with texts.

        Args:
            image: (I, C, Y, X), from `preprocess`.
            text: Ids (T, L), from `tokenize`.

        Returns:
            logits_per_image (I, T) and logits_per_text (T, I).
        """
        image_features = nn.functional.normalize(self.encode_image(image), dim=-1)
        text_features = nn.functional.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        if self.hf_model.logit_bias is not None:
            logits_per_image = logits_per_image + self.hf_model.logit_bias
        return logits_per_image, logits_per_image.T


def _take_original_names(model: OriginalCLIP, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of a state dictionary of the original before they are loaded."""
    if f"{prefix}positional_embedding" not in state:
        return
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    for name, tensor in convert_names(own, model.hf_model.config).items():
        state[f"{prefix}hf_model.{name}"] = tensor


def _usable_device(device: str | int | torch.device | None) -> torch.device:
    """Return the device that was asked for; for None the GPU, else the CPU. Raises ValueError for a missing device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = default if device is None else device
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"device={device!r} cannot be used here: {reason}. Leave device out for {default!r}, or name another."
        ) from None


def _model_of_checkpoint(path: Path, verify: bool) -> HfClipModel:
    """Read an original checkpoint and convert it to float32 in memory. With `verify`, checksums are compared."""
    checkpoint, config, tensors = read_original(path, verify, check_sums=verify)
    return build_model(StoredModel(config, tensors, [checkpoint]))


def load(
    name: str | Path,
    device: str | int | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
) -> tuple[OriginalCLIP, Preprocess]:
    """Load a model and the function that prepares images for it, as `clip.load` does.

    Args:
        name: One of `available_models()`, which is downloaded once from OpenAI; the path of an original checkpoint; the
            folder of a converted one; or a repository on the Hub.
        device: Device of the model. None: the GPU if there is one, else the CPU.
        jit: Only False is possible, since TorchScript is never run.
        download_root: Folder in which the checkpoint of a name is looked for, and into which it is downloaded. None: a
            folder in the Hugging Face cache.

    Returns:
        The model, in evaluation mode and float32; and `preprocess`, which turns a Pillow image into a tensor (3, Y, X).

    Raises:
        FileNotFoundError: There is no such checkpoint or repository. Offline (`HF_HUB_OFFLINE=1`) the message says
            where to put the file.
        CheckpointError: The file is no CLIP checkpoint, or it is damaged.
        ConnectionError: The download failed.
        ValueError: The name is unknown, the device is missing, or `jit` is True.

    Example::

        model, preprocess = clip.load("RN50x4")
        features = model.encode_image(preprocess(Image.open("cat.jpg")).unsqueeze(0))  # (1, 640)
    """
    if jit:
        raise ValueError("jit=True would run a program out of the checkpoint, which hf_clip never does; leave it out.")
    place = _usable_device(device)
    path, known, processor = Path(name), str(name), None
    refuse_unknown_variant(known)
    if known in VARIANTS and not path.exists():
        model = _model_of_checkpoint(fetch_original(VARIANTS[known], folder=download_root), verify=False)
    elif path.is_file():
        model = _model_of_checkpoint(path, verify=True)
    elif path.is_dir() or (known.count("/") == 1 and path.suffix not in CHECKPOINT_SUFFIXES):
        try:
            model = HfClipModel.from_pretrained(name, dtype=torch.float32)
            processor = HfClipImageProcessor.from_pretrained(name)
        except OSError as error:
            if path.is_dir():
                raise
            raise FileNotFoundError(
                f"{known!r} is no name of OpenAI's ({', '.join(VARIANTS)}), no file and no folder here, and no "
                f"repository that could be read: {str(error).splitlines()[0]}"
            ) from error
    elif path.suffix or "/" in known:
        raise FileNotFoundError(
            f"There is no checkpoint {known}; check the path, or name one of {', '.join(VARIANTS)}."
        )
    else:
        get_variant(known)  # raises, with the nearest name
        raise AssertionError
    processor = processor or HfClipImageProcessor.for_image_size(model.config.vision_config.image_size)
    return OriginalCLIP(model.to(place)).eval(), Preprocess(processor)


@lru_cache(maxsize=1)
def _tokenizer() -> HfClipTokenizer:
    return HfClipTokenizer.from_vocabulary_file(find_vocabulary(), model_max_length=UNLIMITED)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Turn texts into token ids, padded with zeros, as the original does.

    The vocabulary is taken from an installed `openai-clip` or `open_clip_torch`, else from the Hub.

    Args:
        texts: A text, or T texts.
        context_length: Number of ids per text. The nine models have 77.
        truncate: Whether to cut a text that is too long. Its last id is then the end of text.

    Returns:
        Ids (T, context_length), int32.

    Raises:
        RuntimeError: A text is too long, and `truncate` is False.
        TextError: A text cannot be tokenized. A ValueError; its `index` is the text's place.

    Example::

        clip.tokenize(["a cat", "a dog"]).shape  # (2, 77)
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = torch.zeros(len(texts), context_length, dtype=torch.int32)
    if not texts:
        return ids
    tokenizer = _tokenizer()
    encoded = tokenizer(texts, return_tensors="pt")
    lengths = encoded["attention_mask"].sum(dim=1)
    if not truncate and (longest := int(lengths.max())) > context_length:
        text = texts[int(lengths.argmax())]
        raise RuntimeError(
            f"The text {text[:80]!r} has {longest} tokens, start and end included, but the context length is "
            f"{context_length}. Shorten it, or pass truncate=True."
        )
    kept = (encoded["input_ids"] * encoded["attention_mask"])[:, :context_length]
    ids[:, : kept.shape[1]] = kept
    ids[lengths > context_length, -1] = tokenizer.eos_token_id
    return ids


__all__ = ["available_models", "load", "tokenize"]
