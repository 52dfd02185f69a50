"""Read a model of any layout: `read(source)` returns its configuration and tensors, and its processor.

    a file, or one of OpenAI's names ─ download ─ archive ─ original ──────────────┐
    a folder or     ┌ open_clip_config.json ─ open_clip ─ archive ─ original ──────┤
    repository ─────┴ config.json (ours, stock CLIP's) ─ archive ──────────────────┴─ StoredModel, HfClipProcessor

`archive` reads the tensors of a file of any kind, and `original` replaces OpenAI's tensor names by ours. The
configuration of a repository is read once.

The tensors are views of mapped files in the stored dtypes, so a model that is read and written again has the same bits.
Nothing is computed, and no model is built.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..model.checked_files import WEIGHT_FILES, find_file, list_shards, one_line, read_object, read_unchanged
from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig
from ..model.hub_repository import CHECKPOINT_SUFFIXES, read_config_object, refuse_checkpoint_file
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.stock_config import named_as_ours
from ..model.tokenization_hf_clip import HfClipTokenizer
from ..model.variants import OPENAI_VOCAB_SIZE, VARIANTS, refuse_unknown_variant
from .archive import Checkpoint
from .download import find_original
from .errors import MOST_SHOWN, CheckpointError
from .folders import check_folder, check_kind, in_one_line
from .keys import check_dtypes, expected_shapes
from .open_clip import OpenClipRepository, config_from_open_clip, find_open_clip, read_open_clip_config
from .original import open_checkpoint, read_original
from .safetensors_stream import read_metadata
from .vocabulary import find_vocabulary

MOST_NAMED = 6
PUBLISHED_KEY = "openai_checkpoint"
"""In the header of weights that come from a published file: its name. Whoever changes the weights writes a new file."""


@dataclass
class StoredModel:
    """The configuration and the tensors of a model, as they lie on disk.

    Attributes:
        config: The model's configuration.
        tensors: By our names, in the dtypes that are stored.
        checkpoints: The files behind them; none for a model in memory.
        published: Which of OpenAI's nine these weights are, where the file is known to be the published one; else None.
    """

    config: HfClipConfig
    tensors: dict[str, Tensor]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    published: str | None = None

    @classmethod
    def of(cls, model: HfClipModel) -> "StoredModel":
        """The same of a model in memory, in the dtype that it has there."""
        return cls(model.config, {name: tensor.cpu() for name, tensor in model.state_dict().items()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def forget_read_pages(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.forget_read_pages()


def read_config_file(path: str | Path) -> HfClipConfig:
    """A model's configuration from open_clip's file, or from a config.json of ours or of stock CLIP.

    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}; check the path.")
    values = read_object(path)
    if values.get("model_type") in ("hf_clip", "clip"):
        with in_one_line(path):
            return HfClipConfig.from_pretrained(path)
    try:
        return config_from_open_clip(read_open_clip_config(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as the configuration of a CLIP: {error}") from None


def _weight_files(source: Any, hub: dict[str, Any]) -> list[Path]:
    """The files that hold a repository's weights: one, or the shards that an index names."""

    def find(name: str) -> Path | None:
        return find_file(source, name, hub)

    for name in WEIGHT_FILES:
        if (whole := find(name)) is not None:
            return [whole]
        if (index := find(f"{name}.index.json")) is not None:
            shards = list_shards(index)
            files = [find(shard) for shard in shards]
            if missing := [shard for shard, file in zip(shards, files, strict=True) if file is None]:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which its {index.name} names.")
            return [file for file in files if file is not None]
    raise FileNotFoundError(f"{source} has no weights: none of {', '.join(WEIGHT_FILES)}, whole or in shards.")


def _published(files: list[Path]) -> str | None:
    found = {read_metadata(file).get(PUBLISHED_KEY) if file.suffix == ".safetensors" else None for file in files}
    return found.pop() if len(found) == 1 else None


def published_weights(folder: str | Path) -> str | None:
    """Return the name of the OpenAI model whose weights a folder holds, which the file says. None for other weights."""
    return _published(_weight_files(folder, {}))


def _check_layers(source: Any, tensors: dict[str, Tensor], config: HfClipConfig) -> None:
    """Refuse a configuration with more layers than there are tensors. Building all these layers could take hours."""
    vision = config.vision_config
    blocks = sum(vision.depths) if isinstance(vision, HfClipResNetConfig) else vision.num_hidden_layers
    if (layers := config.text_config.num_hidden_layers + blocks) > len(tensors):
        raise CheckpointError(
            f"{source} has {len(tensors)} tensors, too few for the {layers:,} layers of its config.json."
        )


def check_tensors(source: Any, tensors: dict[str, Tensor], config: HfClipConfig) -> dict[str, Tensor]:
    """The model's tensors alone. Repositories of before transformers 4.31 have counters of positions beside them."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    _check_layers(source, kept, config)
    shapes = expected_shapes(config)

    def listed(names: Iterable[str]) -> str:
        return ", ".join(sorted(one_line(name, MOST_SHOWN) for name in names)[:MOST_NAMED])

    if unknown := kept.keys() - shapes.keys():
        raise CheckpointError(f"{source} holds tensors that its configuration has no place for: {listed(unknown)}.")
    if missing := {n for n in shapes.keys() - kept.keys() if not n.endswith("num_batches_tracked")}:
        raise CheckpointError(f"{source} lacks tensors of the model: {listed(missing)}.")
    for name, tensor in kept.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{source} has {name} of shape {tuple(tensor.shape)} where its configuration needs {shapes[name]}."
            )
    try:
        check_dtypes(kept)
    except CheckpointError as error:
        raise CheckpointError(f"{source} {error}") from None
    return kept


def _own_tokenizer(tokenizer: HfClipTokenizer, context_length: int) -> HfClipTokenizer:
    """Build the tokenizer anew from its merges, unless it has added tokens.

    The tokenizer.json of a stock repository lacks the repair of quotes and ligatures, without which ids differ from
    OpenAI's. A loaded tokenizer also remembers where it was loaded from.
    """
    merges = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    own = HfClipTokenizer.from_merges(merges, min(tokenizer.model_max_length, context_length))
    return own if own.get_vocab() == tokenizer.get_vocab() else tokenizer


def _name_special_ids(config: HfClipTextConfig, tokenizer: HfClipTokenizer) -> None:
    """Name the end of text in a configuration that takes the highest id, if the tokenizer's end of text is that id."""
    if config.eos_token_id is None and tokenizer.eos_token_id == len(tokenizer) - 1:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def _describe(source: Any, hub: dict[str, Any]) -> tuple[HfClipConfig, OpenClipRepository | None]:
    """The configuration of a folder or repository, and its reader where it is in open_clip's layout."""
    described = check_folder(source) if Path(source).is_dir() else {}
    values = described.get("config.json", {})
    if not described:
        try:
            path = find_file(source, "config.json", hub)
        except OSError:
            return HfClipConfig.from_pretrained(source, **hub), None  # says what the Hub's refusal means
        values = {} if path is None else read_config_object(path)
    if "model_type" in values:
        check_kind(source, values)
        return HfClipConfig.from_dict(named_as_ours(values, source)), None
    if (repository := find_open_clip(source, hub, described)) is not None:
        return repository.config, repository
    return HfClipConfig.from_pretrained(source, **hub), None  # which says what is missing


def _read_weights(
    source: Any,
    config: HfClipConfig,
    repository: OpenClipRepository | None,
    hub: dict[str, Any],
    *,
    verify: bool,
    check_sums: bool = True,
) -> tuple[list[Checkpoint], dict[str, Tensor]]:
    """The files behind a repository's weights, and those under our names, which are all that `config` needs."""
    if repository is not None:
        checkpoint, _, tensors = read_original(repository.weights_file(), verify, check_sums=check_sums, config=config)
        return [checkpoint], tensors
    checkpoints = [open_checkpoint(path, verify, check_sums=check_sums) for path in _weight_files(source, hub)]
    tensors = {name: tensor for checkpoint in checkpoints for name, tensor in checkpoint.tensors.items()}
    return checkpoints, check_tensors(source, tensors, config)


def check_model(source: str | Path, hub: dict[str, Any] | None = None) -> HfClipConfig:
    """Refuse a folder or repository whose files are missing or damaged, or don't belong together; no tensor is read.

    Args:
        source: The folder, or the repository's name.
        hub: Arguments as `from_pretrained` takes them.

    Returns:
        Its configuration.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: The weights are damaged, or are those of another model.
        ValueError: Another file is damaged, or `source` is a checkpoint file, which is converted first.
    """
    refuse_checkpoint_file(source)
    with in_one_line(source):
        config, repository = _describe(source, hub or {})
        _read_weights(source, config, repository, hub or {}, verify=False, check_sums=False)
        return config


def _read_processor(source: Any, repository: OpenClipRepository | None, hub: dict[str, Any]) -> HfClipProcessor:
    if repository is not None:
        images = HfClipImageProcessor.from_dict(repository.image_processor_values())
        return HfClipProcessor(images, repository.tokenizer())
    return HfClipProcessor(
        HfClipImageProcessor.from_own_layout(source, **hub), HfClipTokenizer.from_pretrained(source, **hub)
    )


def _read_repository(source: Any, hub: dict[str, Any], verify: bool) -> tuple[StoredModel, HfClipProcessor]:
    """A folder or a repository on the Hub: ours, stock CLIP's or open_clip's. hub: as `from_pretrained` takes it"""
    with in_one_line(source):
        config, repository = _describe(source, hub)
        processor = _read_processor(source, repository, hub)
        for values in (config.__dict__, processor.image_processor.__dict__, processor.tokenizer.init_kwargs):
            values.pop("auto_map", None)  # the code isn't taken along
        checkpoints, tensors = _read_weights(source, config, repository, hub, verify=verify)
        published = _published([checkpoint.path for checkpoint in checkpoints])
        processor.tokenizer = _own_tokenizer(processor.tokenizer, config.text_config.max_position_embeddings)
        _name_special_ids(config.text_config, processor.tokenizer)
    return StoredModel(config, tensors, checkpoints, published), processor


def _read_file(
    path: Path,
    *,
    config: HfClipConfig | None,
    activation: str | None,
    weights: str | None,
    vocabulary: Path,
    verify: bool,
    note: Callable[[str], None],
) -> tuple[StoredModel, HfClipProcessor]:
    """A checkpoint file with OpenAI's tensor names, by whichever program it was written."""
    checkpoint, read_config, tensors = read_original(
        path, verify, config=config, activation=activation, weights=weights
    )
    if checkpoint.container in ("state dict", "safetensors") and config is None and activation is None:
        note(
            "the file doesn't say which activation its transformers have; OpenAI's quick_gelu is assumed. For a model "
            "of open_clip's that is not named -quickgelu, pass --activation gelu."
        )
    text = read_config.text_config
    tokenizer = HfClipTokenizer.from_vocabulary_file(
        vocabulary,
        # OpenAI's code and open_clip have this one tokenizer, however many rows a table has.
        vocab_size=min(text.vocab_size, OPENAI_VOCAB_SIZE),
        model_max_length=text.max_position_embeddings,
    )
    _name_special_ids(text, tokenizer)
    image_processor = HfClipImageProcessor.for_image_size(read_config.vision_config.image_size)
    is_as_published = verify and config is None and activation is None and weights is None
    verified = {variant.checkpoint: variant.name for variant in VARIANTS.values()} if is_as_published else {}
    model = StoredModel(read_config, tensors, [checkpoint], verified.get(path.name))
    return model, HfClipProcessor(image_processor, tokenizer)


def find_meant(name: str) -> str | None:
    """Guess what was meant: a file whose suffix was left out, or one of OpenAI's names."""
    for suffix in CHECKPOINT_SUFFIXES:
        if os.path.isfile(f"{name}{suffix}"):
            return f"{name}{suffix}"
    spelled = {re.sub(r"[^a-z0-9]", "", variant.lower()): variant for variant in VARIANTS}
    return spelled.get(re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("clip-")))


def read(
    source: str | Path,
    *,
    config: str | Path | None = None,
    activation: str | None = None,
    weights: str | None = None,
    vocabulary: str | Path | None = None,
    verify: bool = True,
    offline: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[StoredModel, HfClipProcessor]:
    """Read a model from wherever it is.

    Args:
        source: A checkpoint file with OpenAI's tensor names (OpenAI's own, a state dict, a training checkpoint of
            open_clip's), one of OpenAI's nine names, or a folder or repository of ours, stock CLIP's or open_clip's.
        config: For a checkpoint file that doesn't say: open_clip's configuration file, or a config.json.
        activation: For a checkpoint file that doesn't say: "quick_gelu" or "gelu".
        weights: "model" or "ema", for a training checkpoint that has both.
        vocabulary: OpenAI's vocabulary file, for checkpoint files; see `find_vocabulary`.
        verify: Whether a file that bears one of the nine published names must have that file's sha256, and one in the
            Hub's cache that which the Hub has.
        offline: Whether nothing may be downloaded.
        note: Called with a line that the user should read.

    Returns:
        The model as it lies on disk, and its processor.

    Raises:
        FileNotFoundError: There is no such file, folder or repository, or it lacks a part.
        ConnectionError: A download failed.
        CheckpointError: The weights are damaged, refused, or those of another model.
        ValueError: Another file is damaged, an argument doesn't fit the source, or the source is a name like those of
            OpenAI's models and none of them.
        TypeError: The source is no name.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"source is a {type(source).__name__}, but the name of a file, folder or repository is needed; save a "
            f"model in memory and its processor by save_pretrained first, and name that folder."
        )
    name, path = str(source), Path(source)
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise FileNotFoundError(f"{source} is no file and no folder, but a pipe or a device; name a checkpoint.")
    is_file = name in VARIANTS or path.is_file() or path.suffix in CHECKPOINT_SUFFIXES or "/" not in name
    if name not in VARIANTS and not os.path.exists(source) and (meant := find_meant(name)) is not None:
        raise FileNotFoundError(f"There is no checkpoint file or folder {source}; did you mean {meant}?")
    refuse_unknown_variant(source)
    if name.startswith((".", "/", "~")) and not path.exists():
        raise FileNotFoundError(f"There is no checkpoint file or folder {source}; check the path.")
    if path.is_dir() or not is_file:
        told = {"--config": config, "--activation": activation, "--weights": weights, "--vocab": vocabulary}
        if given := [flag for flag, value in told.items() if value is not None]:
            raise ValueError(f"{source} is a repository, which tells everything itself: leave out {', '.join(given)}.")
        hub = {"local_files_only": True} if offline else {}
        repository = read_unchanged(source, lambda: _read_repository(source, hub, verify))
        return cast(tuple[StoredModel, HfClipProcessor], repository)
    return _read_file(
        config=None if config is None else read_config_file(config),
        activation=activation,
        weights=weights,
        vocabulary=find_vocabulary(vocabulary, offline),
        path=find_original(source, offline),
        verify=verify,
        note=note,
    )


__all__ = ["PUBLISHED_KEY", "StoredModel", "check_model", "published_weights", "read", "read_config_file"]
