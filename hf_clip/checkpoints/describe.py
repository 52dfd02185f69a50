"""What a checkpoint file, folder or repository is, told from its descriptions and headers.

No weights are read, nothing that lies there is executed, and nothing but small files is downloaded.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..model.checked_files import WEIGHT_FILES, leads_outside, list_shards, one_line, read_object
from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from ..model.hub_repository import CHECKPOINT_SUFFIXES
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.tokenization_hf_clip import HfClipTokenizer
from ..model.variants import VARIANTS, refuse_unknown_variant
from .download import originals_folder
from .errors import CheckpointError
from .folders import in_one_line
from .headers import CONTAINERS, Headers, count_parameters, dtypes_of, hub_headers, naming_of, read_headers
from .keys import config_from_shapes, convert_names, identify_variant, without_wrappers
from .loaders import Loader, loaders_of_file, loaders_of_repository
from .open_clip import CONFIG_FILE, OpenClipRepository, config_from_open_clip, read_open_clip_config
from .open_clip import WEIGHT_FILES as OPEN_CLIP_WEIGHT_FILES
from .read import check_tensors, find_meant

Config = HfClipConfig | HfClipTextConfig | HfClipViTConfig | HfClipResNetConfig

TOWERS: dict[str, type[HfClipTextConfig] | type[HfClipViTConfig] | type[HfClipResNetConfig]] = {
    "hf_clip_text": HfClipTextConfig,
    "hf_clip_vit": HfClipViTConfig,
    "hf_clip_resnet": HfClipResNetConfig,
    "clip_text_model": HfClipTextConfig,
    "clip_vision_model": HfClipViTConfig,
}
"""Model types of a tower alone → the class that reads them."""

MODEL_FILES = [f"{name}{end}" for name in WEIGHT_FILES for end in ("", ".index.json")]
SMALL_FILES = ("*.json", "merges.txt")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass
class Description:
    """What a source is. What is not known is None or empty.

    Attributes:
        source: As it was named.
        layout: Whose layout it has, such as "hf_clip", "transformers", "open_clip" or "OpenAI, TorchScript archive".
        model: What kind of model it is, in words.
        variant: Which of OpenAI's nine architectures it has.
        parameters: How many numbers were learned: "all" and those of the "image" side.
        nbytes: The size of the stored tensors.
        dtypes: Floating-point dtypes and how many numbers are stored in each.
        embedding: The width D of the space that images and texts share.
        matryoshka_dims: Widths at which the first numbers of a feature are a feature too; None for the full width.
        text: The sizes of the text tower, by the names of the configuration.
        image: Those of the image tower.
        activation: That of the transformers.
        loss: What the model was trained by: "softmax" or "sigmoid".
        tokenizer: What is known of it, in words.
        images: How images are prepared.
        loaders: Who would load it, and how, or why not.
        problems: What is missing, damaged or contradictory, a line each.
        damage: The one of them by which the weights cannot be read.
    """

    source: str
    layout: str = "unknown"
    model: str | None = None
    variant: str | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    nbytes: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    embedding: int | None = None
    matryoshka_dims: Sequence[int] | None = None
    text: dict[str, int] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    activation: str | None = None
    loss: str | None = None
    tokenizer: str | None = None
    images: dict[str, Any] = field(default_factory=dict)
    loaders: list[Loader] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damage: str | None = None

    def attempt(self, read: Callable[[], Any], *, is_of_weights: bool = False) -> Any:
        """What `read` returns; where it fails, None, and the reason is one of the problems."""
        try:
            with in_one_line(self.source):
                return read()
        except (OSError, ValueError) as error:
            self.problems.append(one_line(error))
            if isinstance(error, CheckpointError) and is_of_weights:
                self.damage = self.problems[-1]
            return None

    def add_config(self, config: Config) -> None:
        towers = [config.text_config, config.vision_config] if isinstance(config, HfClipConfig) else [config]
        for tower in towers:
            if isinstance(tower, HfClipTextConfig):
                self.text = {
                    "layers": tower.num_hidden_layers,
                    "width": tower.hidden_size,
                    "heads": tower.num_attention_heads,
                    "tokens": tower.max_position_embeddings,
                    "vocabulary": tower.vocab_size,
                }
            elif isinstance(tower, HfClipResNetConfig):
                self.image = {
                    "kind": "ResNet",
                    "blocks": list(tower.depths),
                    "width": tower.hidden_size,
                    "heads": tower.num_attention_heads,
                    "pixels": tower.image_size,
                }
            else:
                self.image = {
                    "kind": "ViT",
                    "layers": tower.num_hidden_layers,
                    "width": tower.hidden_size,
                    "heads": tower.num_attention_heads,
                    "patch": tower.patch_size,
                    "pixels": tower.image_size,
                }
        self.activation = next((tower.hidden_act for tower in towers if hasattr(tower, "hidden_act")), None)
        self.embedding = config.projection_dim
        if isinstance(config, HfClipConfig):
            self.loss, self.matryoshka_dims = config.contrastive_loss, config.matryoshka_dims
            variant = identify_variant(config)
            self.variant = None if variant is None else variant.name
            self.model = f"a CLIP with a {self.image['kind']}"
        else:
            self.model = f"a {'text' if self.text else self.image['kind']} tower alone"

    def add_headers(self, headers: Headers) -> None:
        self.parameters, self.dtypes = count_parameters(headers.tensors), dtypes_of(headers.tensors)
        self.nbytes = headers.nbytes

    def add_image_processor(self, processor: HfClipImageProcessor) -> None:
        self.images = {
            "size": f"{processor.crop_size['height']}×{processor.crop_size['width']}",
            "fit": processor.fit,
            "resample": RESAMPLE.get(int(processor.resample), str(processor.resample)),
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
        }


def describe(source: str | Path, *, offline: bool = False) -> Description:
    """Find out what a source is.

    Args:
        source: A checkpoint file, a folder, a repository on the Hub, or one of OpenAI's nine names, whose file is not
            downloaded for this.
        offline: Whether a repository is looked for in the Hub's cache only.

    Returns:
        What is known of it, also where it is no CLIP.

    Raises:
        FileNotFoundError: There is no such source, or a folder or repository without a model.
        ConnectionError, PermissionError: The Hub refuses the repository.
        CheckpointError: A file is damaged, or no checkpoint.
        ValueError: It is a name like those of OpenAI's models, and none of them.
    """
    name, path = str(source), Path(os.path.expanduser(source))
    if name in VARIANTS and not path.exists():
        path = originals_folder() / VARIANTS[name].checkpoint
        return _describe_file(name, path) if path.is_file() else _describe_published(name)
    if path.is_file() and path.name in (*WEIGHT_FILES, *OPEN_CLIP_WEIGHT_FILES) and _is_described(path.parent):
        return _describe_folder(str(path.parent), path.parent)
    if path.is_file():
        return _describe_file(name, path)
    if path.is_dir():
        return _describe_folder(name, path)
    if os.path.lexists(path):
        raise FileNotFoundError(f"{name} is no file and no folder, but a link to nowhere, a pipe or a device.")
    if (meant := find_meant(name)) is not None:
        raise FileNotFoundError(f"There is no checkpoint file or folder {name}; did you mean {meant}?")
    refuse_unknown_variant(name)
    if name.startswith((".", "/", "~")) or path.suffix in CHECKPOINT_SUFFIXES or name.count("/") > 1:
        raise FileNotFoundError(f"There is no checkpoint file or folder {name}; check the path.")
    return _describe_hub(name, offline)


def _is_described(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / CONFIG_FILE).is_file()


def _describe_published(name: str) -> Description:
    """One of OpenAI's nine, whose file is not here: what the table says of it."""
    variant = VARIANTS[name]
    found = Description(name, layout="OpenAI, TorchScript archive, not downloaded yet")
    found.add_config(HfClipConfig.from_variant(name))
    found.parameters = {"all": variant.total_parameters, "image": variant.image_parameters}
    found.tokenizer = "OpenAI's, which comes apart from the file"
    found.add_image_processor(HfClipImageProcessor.for_image_size(variant.image_size))
    found.loaders = loaders_of_file(name, "torchscript", "OpenAI", None)
    return found


def _describe_file(name: str, path: Path) -> Description:
    """A checkpoint file by itself."""
    headers = read_headers(path)
    naming = naming_of(headers.tensors)
    found = Description(name, layout=f"{naming or 'unknown'}, {CONTAINERS[headers.container]}")
    found.add_headers(headers)
    if not headers.tensors:
        found.problems.append("It has no tensors.")
    elif naming is None:
        some = ", ".join(one_line(tensor, 60) for tensor in list(headers.tensors)[:3])
        found.problems.append(f"Its tensors bear names of no model that is known here: {some}, …")
    elif naming == "OpenAI":
        tensors = without_wrappers(headers.tensors)
        config = found.attempt(lambda: config_from_shapes(tensors))
        if config is not None:
            found.add_config(config)
            found.attempt(lambda: convert_names(tensors, config))
            found.add_image_processor(HfClipImageProcessor.for_image_size(config.vision_config.image_size))
            found.tokenizer = "OpenAI's, which comes apart from the file"
        if headers.container != "torchscript":
            found.activation = None  # no tensor tells it
    elif naming == "transformers":
        found.problems.append("The file alone doesn't say all of the model: its folder's config.json is missing.")
    if headers.has_averages:
        found.problems.append("It holds moving averages of the weights too: choose with --weights when converting.")
    found.loaders = loaders_of_file(name, headers.container, naming, found.problems[0] if found.problems else None)
    return found


def _describe_hub(name: str, offline: bool) -> Description:
    """A repository on the Hub, of which the small files are downloaded."""
    with in_one_line(name):
        try:
            folder = snapshot_download(name, allow_patterns=list(SMALL_FILES), local_files_only=offline)
            files = None if offline else HfApi().list_repo_files(name)
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no checkpoint file or folder {name}, and the Hub could not be asked for a model of that "
                f"name ({'offline' if offline else 'no connection'}). Check the name; what was downloaded before is "
                f"found without a connection."
            ) from error
    return _describe_folder(name, Path(folder), files)


def _weight_files(folder: Path, names: tuple[str, ...], files: list[str]) -> list[str]:
    """The files that hold the weights: one, or the shards that an index names; none if there are none."""
    for name in names:
        if name in files:
            return [name]
        if f"{name}.index.json" in files:
            return [shard for shard in list_shards(folder / f"{name}.index.json") if not leads_outside(shard)]
    return []


def _describe_folder(name: str, folder: Path, on_the_hub: list[str] | None = None) -> Description:
    """A folder, or the small files of a repository on the Hub, of which `on_the_hub` lists all files."""
    files = on_the_hub or [path.name for path in folder.iterdir()]
    found = Description(name)
    values = found.attempt(lambda: read_object(folder / "config.json")) if "config.json" in files else {}
    kind = (values or {}).get("model_type")
    kind = kind if isinstance(kind, str) else None
    config: Config | None = None
    weights: tuple[str, ...] = WEIGHT_FILES
    if kind in ("hf_clip", "clip"):
        found.layout = "hf_clip" if kind == "hf_clip" else "transformers"
        config = found.attempt(lambda: HfClipConfig.from_pretrained(folder))
    elif kind in TOWERS:
        found.layout = "hf_clip" if kind.startswith("hf_clip") else "transformers"
        config = found.attempt(lambda: TOWERS[kind].from_pretrained(folder))
    elif kind is None and CONFIG_FILE in files:
        found.layout, weights = "open_clip", OPEN_CLIP_WEIGHT_FILES
        config = found.attempt(lambda: config_from_open_clip(read_open_clip_config(folder / CONFIG_FILE)))
    else:
        found.layout, found.model = _name_stranger(files, values or {})
        if found.layout == "unknown" and "config.json" not in files and not set(MODEL_FILES) & set(files):
            raise FileNotFoundError(
                f"{name} holds no model: it has neither config.json nor {CONFIG_FILE}. Name a checkpoint file such as "
                f"ViT-B-32.pt, or the folder or repository of a model."
            )
    stored = found.attempt(lambda: _weight_files(folder, weights, files)) or []
    if config is not None:
        found.add_config(config)
        if not stored:
            found.problems.append(f"It has no weights: none of {', '.join(weights)}, whole or in shards.")
    is_unknown = bool(stored) and not _add_weights(found, folder, stored, config, on_the_hub is not None)
    if (architectures := (values or {}).get("architectures")) and isinstance(architectures, list):
        found.model = f"{found.model or 'a model'} ({one_line(architectures[0], 60)})"
    problem = found.problems[0] if found.problems else None
    found.loaders = loaders_of_repository(name, found.layout, config, values or {}, files, problem)
    if config is not None:
        _add_processor(found, folder, config, files)  # without which the model loads all the same
    if is_unknown and problem is None:
        found.problems.append("Its weights are pickled: their sizes and dtypes are known after a download only.")
    return found


def _name_stranger(files: list[str], values: dict[str, Any]) -> tuple[str, str | None]:
    """Layout and kind of what is no CLIP that is read here."""
    if "adapter_config.json" in files:
        return "PEFT", "an adapter, which needs its base model"
    if "model_index.json" in files:
        return "diffusers", "a diffusion pipeline, whose text tower lies in text_encoder/"
    if "architecture" in values:
        return "timm", f"an image model, {one_line(values['architecture'], 60)}"
    if "model_type" in values:
        return "transformers", f"a model of the type {one_line(repr(values['model_type']), 60)}"
    return "unknown", None


def _add_weights(
    found: Description, folder: Path, stored: list[str], config: Config | None, may_be_remote: bool
) -> bool:
    """Add what the headers of the weights say; returns whether these can be read."""
    # A folder whose files are missing may be named as somebody's repository, which is not asked about then.
    is_here = not may_be_remote or all((folder / name).is_file() for name in stored)
    headers = found.attempt(
        lambda: read_headers(*[folder / n for n in stored]) if is_here else hub_headers(found.source, stored),
        is_of_weights=True,
    )
    if headers is None:
        return False
    found.add_headers(headers)
    if isinstance(config, HfClipConfig) and not found.problems:
        if found.layout == "open_clip":
            found.attempt(lambda: convert_names(without_wrappers(headers.tensors), config))
        else:
            found.attempt(lambda: check_tensors(found.source, headers.tensors, config))
    return True


def _add_processor(found: Description, folder: Path, config: Config, files: list[str]) -> None:
    if found.image:
        has_settings = {"preprocessor_config.json", "processor_config.json", CONFIG_FILE} & set(files)
        if not has_settings:
            found.problems.append(
                "It has no image processor: neither preprocessor_config.json nor processor_config.json."
            )
        elif (read := found.attempt(lambda: _image_processor(folder, config, found.layout))) is not None:
            found.add_image_processor(read)
    if found.text:
        if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files):
            tokenizer = found.attempt(lambda: HfClipTokenizer.from_pretrained(folder))
            if tokenizer is not None:
                found.tokenizer = f"{len(tokenizer):,} tokens, texts of at most {tokenizer.model_max_length:,}"
        elif found.layout == "open_clip":
            found.tokenizer = "OpenAI's, which comes apart from the repository"
        else:
            found.problems.append("It has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt.")


def _image_processor(folder: Path, config: Config, layout: str) -> HfClipImageProcessor:
    if layout == "open_clip" and isinstance(config, HfClipConfig):
        values = read_open_clip_config(folder / CONFIG_FILE)
        fields = OpenClipRepository(folder, {}, values, config).image_processor_values()
        return HfClipImageProcessor.from_dict(fields)
    return HfClipImageProcessor.from_pretrained(folder)


__all__ = ["CheckpointError", "Description", "describe"]
