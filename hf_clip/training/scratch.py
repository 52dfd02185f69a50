"""An untrained model and its processor, for training from scratch.

The same arguments give the same model, whatever was drawn at random before. Nothing that is drawn later changes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..checkpoints.folders import in_one_line
from ..checkpoints.vocabulary import find_vocabulary
from ..model.checked_files import read_object
from ..model.configuration_hf_clip import HfClipConfig, HfClipTextConfig
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.tokenization_hf_clip import HfClipTokenizer
from ..model.variants import VARIANTS


def read_config(source: str | Path) -> HfClipConfig:
    """Read the configuration of a model that is to be made.

    Args:
        source: One of OpenAI's nine names, a config.json, or a folder that has one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such name, or the file is not the configuration of an HfClipModel.
    """
    path = Path(source)
    looks_like_a_path = str(source).startswith((".", "/", "~")) or path.suffix == ".json" or path.exists()
    if str(source) in VARIANTS or not looks_like_a_path:
        return HfClipConfig.from_variant(str(source))
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no configuration {file}; check the path, or name one of {', '.join(VARIANTS)}."
        )
    read_object(file)
    values, _ = HfClipConfig.get_config_dict(str(file))
    if (kind := values.get("model_type", HfClipConfig.model_type)) != HfClipConfig.model_type:
        raise ValueError(
            f"{file} is the configuration of a {kind!r}, but one of a {HfClipConfig.model_type!r} is needed."
        )
    values.pop("auto_map", None)  # names files that another folder carries
    if isinstance(text := values.get("text_config"), dict):
        # The tokenizer's take their place; until then, ids that a vocabulary of this size has.
        size = text.get("vocab_size", HfClipTextConfig.vocab_size)
        values["text_config"] = text | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": size}
    with in_one_line(file):
        config = HfClipConfig.from_dict(values, name_or_path=str(file))  # for the words of an error
    config.name_or_path = ""
    return config


def _build_tokenizer(
    config: HfClipConfig, captions: Iterable[str] | None, tokenizer: str | Path | None, vocabulary: str | Path | None
) -> Any:
    length, vocab_size = config.text_config.max_position_embeddings, config.text_config.vocab_size
    if captions is not None:
        return HfClipTokenizer.train_from_iterator(captions, vocab_size, model_max_length=length)
    if tokenizer is None:
        return HfClipTokenizer.from_vocabulary_file(find_vocabulary(vocabulary), model_max_length=length)
    if not any((Path(tokenizer) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"There is no tokenizer in {tokenizer}; name a folder that save_pretrained has written."
        )
    if (Path(tokenizer) / "tokenizer.json").is_file():
        read_object(Path(tokenizer) / "tokenizer.json")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = length
    if loaded.eos_token_id is None or loaded.eos_token_id not in loaded("a").input_ids:
        raise ValueError(
            f"The tokenizer in {tokenizer} doesn't end a text with an end-of-text token, where CLIP takes its feature."
        )
    return loaded


def build_from_scratch(
    source: str | Path,
    *,
    captions: Iterable[str] | None = None,
    tokenizer: str | Path | None = None,
    vocabulary: str | Path | None = None,
    seed: int = 0,
) -> tuple[HfClipModel, HfClipProcessor]:
    """Make an untrained HfClipModel and its processor.

    The vocabulary comes from one of three places, or from OpenAI's file where that is installed. The configuration gets
    the tokenizer's vocabulary size and special ids.

    Args:
        source: One of OpenAI's nine names ("RN50"), a config.json of model_type hf_clip, or a folder that has one.
        captions: Texts to learn a vocabulary from. It has at most the configuration's `vocab_size` ids.
        tokenizer: Instead, a folder with a tokenizer.
        vocabulary: Instead, OpenAI's vocabulary file.
        seed: Of the weights.

    Returns:
        The model and its processor.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read, or several vocabularies were named.
    """
    given = {"captions": captions, "tokenizer": tokenizer, "vocabulary": vocabulary}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"A model has one tokenizer, but {' and '.join(named)} were given; give one of them.")
    config = read_config(source)
    text_tokenizer = _build_tokenizer(config, captions, tokenizer, vocabulary)
    config.text_config.vocab_size = len(text_tokenizer)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, special, getattr(text_tokenizer, special))
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # whatever another model of this configuration was saved in
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = HfClipModel(config)
    image_processor = HfClipImageProcessor.for_image_size(config.vision_config.image_size)
    return model, HfClipProcessor(image_processor, text_tokenizer)
