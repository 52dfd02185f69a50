"""Tokenizer and image processor as one object."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPProcessor, VisionTextDualEncoderProcessor

from hf_clip import HfClipImageProcessor, HfClipProcessor, HfClipTokenizer


def test_converted_folder_has_a_processor_that_fits_its_model(repository: Path, photographs: dict):
    processor = AutoProcessor.from_pretrained(repository)
    assert type(processor) is HfClipProcessor
    assert type(processor.tokenizer) is HfClipTokenizer
    assert type(processor.image_processor) is HfClipImageProcessor
    model = AutoModel.from_pretrained(repository)
    images = [photographs["astronaut"], photographs["chelsea"]]
    inputs = processor(text=["an astronaut", "a cat", "a cup"], images=images, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert model(**inputs).logits_per_image.shape == (2, 3)


def test_either_kind_of_input_alone(tokenizer: HfClipTokenizer, photographs: dict):
    processor = HfClipProcessor(HfClipImageProcessor(), tokenizer)
    assert set(processor(text="a cat", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(images=photographs["chelsea"], return_tensors="pt")) == {"pixel_values"}


def test_saved_processor_loads_equal(tokenizer: HfClipTokenizer, photographs: dict, tmp_path: Path):
    processor = HfClipProcessor(HfClipImageProcessor.for_image_size(288), tokenizer)
    processor.save_pretrained(tmp_path)
    loaded = HfClipProcessor.from_pretrained(tmp_path)
    inputs = {"text": ["It’s a cat", "two"], "images": photographs["chelsea"], "return_tensors": "pt"}
    found, expected = loaded(**inputs), processor(**inputs)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_files_are_opened_as_by_the_image_processor(tokenizer: HfClipTokenizer, photographs: dict, tmp_path: Path):
    """In their own mode, turned, named by their place: not by transformers' loader."""
    processor = HfClipProcessor(HfClipImageProcessor(), tokenizer)
    path = tmp_path / "image.png"
    for mode in ("RGBA", "P", "1", "L"):
        photographs["chelsea"].convert(mode).save(path)
        expected = processor.image_processor(photographs["chelsea"].convert(mode), return_tensors="pt").pixel_values
        for given in (str(path), path, path.read_bytes(), [{"bytes": path.read_bytes(), "path": None}]):
            assert torch.equal(processor(images=given, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match=r"images\[1\]: there is no file"):
        processor(images=[str(path), "nowhere.jpg"])


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("kind", [HfClipProcessor, CLIPProcessor, VisionTextDualEncoderProcessor])
def test_image_processor_within_any_processor_keeps_its_own_backend(
    tokenizer: HfClipTokenizer, photographs: dict, kind: type, backend: str
):
    """transformers hands the tokenizer's `backend`, which is another thing, to the image processor."""
    processor = kind(HfClipImageProcessor(backend=backend), tokenizer)
    inputs = processor(text=["a", "a cat"], images=photographs["chelsea"], return_tensors="pt")
    expected = processor.image_processor(photographs["chelsea"], return_tensors="pt").pixel_values
    assert torch.equal(inputs.pixel_values, expected)
    assert torch.equal(inputs.input_ids, tokenizer(["a", "a cat"], return_tensors="pt").input_ids)
    other = processor(text="a", images=photographs["chelsea"], backend="torch", return_tensors="pt").pixel_values
    assert torch.equal(
        other, HfClipImageProcessor(backend="torch")(photographs["chelsea"], return_tensors="pt").pixel_values
    )
    with pytest.raises(ValueError, match="backend is 'numpy', but must be one of 'pil', 'torch'"):
        processor(text="a", images=photographs["chelsea"], backend="numpy")


def test_no_texts_through_the_processor(tokenizer: HfClipTokenizer):
    processor = HfClipProcessor(HfClipImageProcessor(), tokenizer)
    assert processor(text=[], return_tensors="pt").input_ids.shape == (0, 2)
