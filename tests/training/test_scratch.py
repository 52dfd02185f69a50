"""Models without training: the nine variants or one's own configuration, with a tokenizer old or new."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from hf_clip import HfClipConfig, HfClipModel, HfClipTokenizer
from hf_clip.training import scratch
from hf_clip.training.optim import create_optimizer
from hf_clip.training.scratch import build_from_scratch, read_config

from .steps import changed, weights_of

CAPTIONS = ["a red seven", "a green four on blue paper", "nothing at all"] * 20
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "vit": {"model_type": "hf_clip_vit", "image_size": 32, "patch_size": 8} | LAYERS,
    "resnet": {
        "model_type": "hf_clip_resnet",
        "image_size": 32,
        "depths": [1, 1, 1, 1],
        "stem_width": 8,
        "num_attention_heads": 4,
    },
}


@pytest.fixture
def configuration(tower: str, tmp_path: Path) -> Path:
    """As a user may write one, from the file of a model that was saved in bfloat16 with its code."""
    text = LAYERS | {"vocab_size": 560, "max_position_embeddings": 24, "eos_token_id": 1}
    values = {"model_type": "hf_clip", "projection_dim": 16, "text_config": text, "vision_config": VISION[tower]}
    values |= {"dtype": "bfloat16", "auto_map": {"AutoModel": "modeling_hf_clip.HfClipModel"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


def test_own_configuration_with_a_new_tokenizer_is_saved_and_trains(configuration: Path, tower: str, tmp_path: Path):
    model, processor = build_from_scratch(configuration, captions=CAPTIONS, seed=3)
    tokenizer, text = processor.tokenizer, model.config.text_config
    assert type(tokenizer) is HfClipTokenizer
    assert 514 < len(tokenizer) <= 560
    assert (text.vocab_size, tokenizer.model_max_length) == (len(tokenizer), 24)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    batch = processor(text=CAPTIONS[:3], images=torch.rand(3, 3, 40, 50), return_tensors="pt")
    assert batch.pixel_values.shape == (3, 3, 32, 32)
    before, optimizer = weights_of(model), create_optimizer(model, rates=1e-3)
    model.train()(**batch, return_loss=True).loss.backward()
    optimizer.step()
    assert {"visual_projection.weight", "logit_scale"} <= changed(before, model)

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, loaded_processor = (
        AutoModel.from_pretrained(tmp_path / "saved"),
        AutoProcessor.from_pretrained(tmp_path / "saved"),
    )
    assert not changed(weights_of(model), loaded)
    assert loaded_processor(text=CAPTIONS).input_ids == processor(text=CAPTIONS).input_ids
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "float32"
    assert "auto_map" not in saved


def test_special_ids_come_with_the_vocabulary(configuration: Path):
    """A configuration needs none, and wrong ones do no harm."""
    values = json.loads(configuration.read_text())
    for ids in ({}, {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}):
        values["text_config"].pop("eos_token_id", None)
        configuration.write_text(json.dumps(values | {"text_config": values["text_config"] | ids}))
        model, processor = build_from_scratch(configuration, captions=CAPTIONS)
        text, tokenizer = model.config.text_config, processor.tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(text, name) == getattr(tokenizer, name) < text.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json is no JSON"),
        ('{"model_type": "hf_cl', "config.json is no JSON"),
        ("[]", "config.json holds no object of fields"),
        ('{"vision_config": {"hidden_size": "x"}}', "The configuration of .*config.json is refused: .*'hidden_size'"),
    ],
)
def test_damaged_configuration_is_refused(content: str, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_damaged_tokenizer_is_refused(configuration: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match="tokenizer.json is no JSON"):
        build_from_scratch(configuration, tokenizer=tmp_path)


def test_seed_alone_says_what_is_drawn(configuration: Path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, _ = build_from_scratch(configuration, captions=CAPTIONS, seed=5)
    assert torch.equal(torch.rand(3), expected)  # nothing else is drawn differently afterwards
    again, _ = build_from_scratch(configuration.parent, captions=CAPTIONS, seed=5)
    other, _ = build_from_scratch(configuration, captions=CAPTIONS, seed=6)
    assert not changed(weights_of(first), again)
    assert "visual_projection.weight" in changed(weights_of(first), other)


def test_tokenizer_of_a_folder_takes_the_models_length(configuration: Path, tmp_path: Path):
    HfClipTokenizer.train_from_iterator(CAPTIONS, 530, model_max_length=99).save_pretrained(tmp_path / "words")
    model, processor = build_from_scratch(configuration, tokenizer=tmp_path / "words")
    assert type(processor.tokenizer) is HfClipTokenizer
    assert processor.tokenizer.model_max_length == 24
    assert model.config.text_config.vocab_size == len(processor.tokenizer) <= 530
    ids = processor(text=CAPTIONS[:2], return_tensors="pt").input_ids
    assert model.encode_text(ids).shape == (2, 16)


def test_openais_vocabulary_is_the_default(configuration: Path, vocabulary: Path):
    model, processor = build_from_scratch(configuration)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == 49408
    given, _ = build_from_scratch(configuration, vocabulary=vocabulary)
    assert not changed(weights_of(model), given)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", "ViT-L/14@336px"])
def test_variants_are_read_by_name(name: str):
    assert read_config(name).to_dict() == HfClipConfig.from_variant(name).to_dict()


def test_a_variant_is_built(monkeypatch: pytest.MonkeyPatch):
    built = []

    class Small(HfClipModel):
        """The whole RN50 would take seconds; its configuration is what counts here."""

        def __init__(self, config: HfClipConfig):
            built.append(config)
            config.vision_config.depths, config.vision_config.stem_width = [1, 1, 1, 1], 8
            config.vision_config.num_attention_heads, config.text_config.num_hidden_layers = 4, 1
            super().__init__(config)

    monkeypatch.setattr(scratch, "HfClipModel", Small)
    _, processor = build_from_scratch("RN50", captions=CAPTIONS)
    assert built[0].projection_dim == 1024
    assert built[0].text_config.vocab_size == len(processor.tokenizer) < 700
    assert processor.tokenizer.model_max_length == 77
    assert processor.image_processor.crop_size.height == 224


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        ("RN51", {}, ValueError, "Unknown CLIP variant 'RN51'; the nine are RN50.*Did you mean 'RN50'"),
        ("./nowhere", {}, FileNotFoundError, "There is no configuration nowhere; check the path, or name one of RN50"),
        ("nowhere.json", {}, FileNotFoundError, "There is no configuration nowhere.json"),
        ("RN50", {"captions": ["a"], "tokenizer": "t"}, ValueError, "but captions and tokenizer were given; give one"),
        ("RN50", {"tokenizer": "/no/such"}, FileNotFoundError, "There is no tokenizer in /no/such; name a folder"),
        ("RN50", {"vocabulary": "/no/such"}, FileNotFoundError, "There is no vocabulary file /no/such"),
    ],
)
def test_wrong_source_says_what_is_right(source: str, settings: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        build_from_scratch(source, **settings)


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match="config.json is the configuration of a 'bert', but one of a 'hf_clip' is need"
    ):
        build_from_scratch(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no tokenizer in .*; name a folder that save_pretrained has"):
        build_from_scratch("RN50", tokenizer=tmp_path)


def test_tokenizer_that_does_not_end_texts_is_refused(configuration: Path, tmp_path: Path):
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="doesn't end a text with an end-of-text token, where CLIP takes its feature"):
        build_from_scratch(configuration, tokenizer=tmp_path / "words")
