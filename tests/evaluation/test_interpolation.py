"""The models between two models, on several data sets."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

from hf_clip.evaluation import interpolation
from hf_clip.evaluation.interpolation import (
    Interpolation,
    InterpolationResult,
    evaluate_interpolation,
    load_interpolation,
)
from hf_clip.evaluation.plots import plot_interpolation
from hf_clip.evaluation.zero_shot import evaluate_zero_shot

from ..neighbours.stock import stock_model
from .data_sets import TEMPLATES, write_class_folders

Clip = tuple[Any, Any]


@pytest.fixture(scope="module")
def finetuned(small_clip: Clip) -> Any:
    """A model not far from the first. Tests must not change it."""
    torch.manual_seed(0)
    model = copy.deepcopy(small_clip[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> list[Path]:
    folder = tmp_path_factory.mktemp("folders")
    return [write_class_folders(folder / "first", rows[:30]), write_class_folders(folder / "second", rows[30:50])]


def test_each_alpha_is_a_model_of_its_own(small_clip: Clip, finetuned: Any, places: list[Path]):
    model, processor = small_clip
    before = {name: tensor.clone() for name, tensor in finetuned.state_dict().items()}
    found = evaluate_interpolation(model, finetuned, processor, places, alphas=[0, 0.4, 1], templates=TEMPLATES)
    assert found.alphas == [0, 0.4, 1]
    assert all(torch.equal(tensor, finetuned.state_dict()[name]) for name, tensor in before.items())
    between = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in between.named_parameters():
            parameter.lerp_(dict(finetuned.named_parameters())[name], 0.4)
    for place in places:
        expected = [
            evaluate_zero_shot(one, processor, place, templates=TEMPLATES) for one in (model, between, finetuned)
        ]
        assert found.curves[str(place)] == [result.value for result in expected]
        ours = [result.metrics["ece"] for result in found.results[str(place)]]
        assert ours == pytest.approx([result.metrics["ece"] for result in expected], abs=1e-5)
        assert len(set(ours)) == 3
    assert found.mean == pytest.approx([sum(column) / 2 for column in zip(*found.curves.values(), strict=True)])


def test_table_and_best_of_a_hand():
    found = InterpolationResult([0, 0.5, 1], {"a": [0.5, 0.7, 0.6], "b": [0.4, 0.3, 0.4]}, {"a": "acc1", "b": "acc1"})
    assert found.mean == pytest.approx([0.45, 0.5, 0.5])
    assert found.best == 0.5
    header, rows = found.rows()
    assert header == ["alpha", "a", "b", "mean"]
    assert rows[1] == ["0.5", "70.0 %", "30.0 %", "50.0 %"]
    one = InterpolationResult([0.5], {"a": [0.7]}, {"a": "acc1"})
    assert one.rows() == (["alpha", "a"], [["0.5", "70.0 %"]])


def test_data_set_without_all_figures_is_left_out():
    records = [
        {"pretrained": name, "dataset": dataset, "metric": "acc1", "metrics": {"acc1": value}}
        for name, dataset, value in [("p", "a", 0.1), ("p", "b", 0.2), ("q", "b", 0.3)]
    ]
    found = InterpolationResult.of_records(records, {"q": 1.0, "p": 0.0})
    assert found is not None
    assert (found.alphas, found.curves) == ([0, 1], {"b": [0.2, 0.3]})
    assert InterpolationResult.of_records(records[:1], {"q": 1.0, "p": 0.0}) is None


def test_models_of_other_shape_are_refused(small_clip: Clip, finetuned: Any, digits: Path):
    other = AutoModel.from_pretrained(digits / "resnet")
    with pytest.raises(
        ValueError, match=r"their architectures differ: vision_config.model_type is 'hf_clip_vit' in the pretrained"
    ):
        Interpolation(small_clip[0], other)
    gelu = copy.deepcopy(finetuned)
    gelu.config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match="vision_config.hidden_act is 'gelu' in the pretrained model and 'quick_gelu'"):
        Interpolation(small_clip[0], gelu)
    wider = copy.deepcopy(finetuned)
    wider.text_projection = torch.nn.Linear(64, 48, bias=False)
    with pytest.raises(ValueError, match=r"text_projection.weight is \(32, 64\) before fine-tuning and \(48, 64\)"):
        Interpolation(small_clip[0], wider)
    processor = copy.deepcopy(small_clip[1])
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"take images in different ways: image_mean of the image processor is"):
        Interpolation(small_clip[0], copy.deepcopy(finetuned), (small_clip[1], processor))
    with pytest.raises(ValueError, match="α is 1.5, but must be between 0"):
        evaluate_interpolation(small_clip[0], finetuned, small_clip[1], [], alphas=[0, 1.5])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"rescale_factor": 0.01}, r"rescale_factor of the image processor is 0.0039\d+ for"),
        ("processor_config.json", {"do_normalize": False}, "do_normalize of the image processor is True for the pre"),
        ("tokenizer.json", "vocab", r"tokenizers give texts different ids: the token '.*' is \d+ for the pretrained"),
        ("tokenizer.json", "merges", r"tokenizers give texts different ids: merge 0 is \[.*\] for the pretrained"),
        ("tokenizer.json", "normalizer", r"tokenizers give texts different ids: the text .2 Dogs' caf"),
    ],
)
def test_models_that_prepare_otherwise_are_refused(
    file: str, change: Any, message: str, small_clip: Clip, finetuned: Any, tmp_path: Path
):
    small_clip[1].save_pretrained(tmp_path)
    found = json.loads((tmp_path / file).read_text())
    if isinstance(change, dict):
        found["image_processor"] |= change
    elif change == "normalizer":
        found["normalizer"] = None
    else:
        entries = found["model"][change]
        first, second = list(entries)[:2] if change == "vocab" else (0, 1)
        entries[first], entries[second] = entries[second], entries[first]
    (tmp_path / file).write_text(json.dumps(found))
    changed = AutoProcessor.from_pretrained(tmp_path)
    if change == "normalizer":  # our own tokenizer does without
        changed.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / file))
    with pytest.raises(ValueError, match=message):
        Interpolation(small_clip[0], finetuned, (small_clip[1], changed))


def test_stock_processors_agree_with_ours(small_clip: Clip, tmp_path: Path):
    small_clip[1].save_pretrained(tmp_path)
    ours = small_clip[1].image_processor.to_dict()
    values = {name: ours[name] for name in interpolation.PREPARATION if name != "fit"}
    values["image_mean"] = tuple(values["image_mean"])  # as in its defaults
    images = CLIPImageProcessor(**values)
    interpolation._check_processors(CLIPProcessor(images, CLIPTokenizer.from_pretrained(tmp_path)), small_clip[1])


def test_stock_model_and_a_fine_tune_of_ours(small_clip: Clip, digits: Path, tmp_path: Path):
    stock_model(small_clip[0]).save_pretrained(tmp_path / "stock")
    small_clip[1].save_pretrained(tmp_path / "stock")
    models, processor = load_interpolation(str(tmp_path / "stock"), str(digits / "vit"), "bfloat16", "cpu")
    assert models.at(0.5).dtype == torch.bfloat16
    models.save(0.5, processor, tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved")
    weights = small_clip[0].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.state_dict().items())  # both ends are one
    assert saved.dtype == torch.float32
    AutoProcessor.from_pretrained(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="saved exists and is not empty"):
        models.save(0.5, processor, tmp_path / "saved")


def test_plot(tmp_path: Path):
    alphas = [n / 10 for n in range(11)]
    curves = {"flowers": [0.5 + 0.03 * n for n in range(11)], "data/cars$": [0.7 - 0.002 * n * n for n in range(11)]}
    plot_interpolation(InterpolationResult(alphas, curves, dict.fromkeys(curves, "acc1")), "a to b", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64) or []) > 20
