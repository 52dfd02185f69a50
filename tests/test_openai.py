"""The original module's functions, beside the original: `import hf_clip as clip`."""

import copy
import pickle
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import nn

import hf_clip as clip
from conversion.reference import load_reference_module
from hf_clip.checkpoints.errors import CheckpointError

from .closeness import assert_same_features
from .model.test_image_processing import openai_transform
from .small import random_images, texts

TEXTS = ["a diagram", "a dog", "it’s a &quot;cat&quot;", "x" * 40]


def test_names_are_the_nine():
    assert clip.available_models() == list(clip.VARIANTS)
    assert len(clip.available_models()) == 9


@pytest.mark.parametrize("form", ["file", "folder", "text of a path"])
def test_loaded_model_computes_what_the_original_does(
    tower: str, reference: nn.Module, archives: dict[str, Path], repositories: dict[str, Path], form: str
):
    name = {"file": archives[tower], "folder": repositories[tower], "text of a path": str(archives[tower])}[form]
    model, _ = clip.load(name, device="cpu", jit=False)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    image, text = random_images(tower), texts()
    with torch.no_grad():
        expected_image, expected_text = reference.encode_image(image), reference.encode_text(text)
        assert (model.encode_image(image) - expected_image).norm() / expected_image.norm() < 1e-5
        assert (model.encode_text(text) - expected_text).norm() / expected_text.norm() < 1e-5
        for found, expected in zip(model(image, text), reference(image, text), strict=True):
            assert found.shape == expected.shape
            assert (found - expected).norm() / expected.norm() < 1e-5
    assert model.visual.input_resolution == image.shape[-1]
    assert_same_features(model.visual(image), model.encode_image(image))
    assert (model.context_length, model.vocab_size) == (reference.context_length, reference.vocab_size)
    assert model.logit_scale.item() == pytest.approx(reference.logit_scale.item())


def test_loaded_model_can_be_trained(tower: str, archives: dict[str, Path]):
    before = archives[tower].read_bytes()
    model, _ = clip.load(archives[tower], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, _ = model(random_images(tower), texts())
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    assert archives[tower].read_bytes() == before


def test_preprocess_is_the_original_transform(tower: str, archives: dict[str, Path], photographs: dict):
    model, preprocess = clip.load(archives[tower], device="cpu")
    for function in (preprocess, pickle.loads(pickle.dumps(preprocess))):
        found = function(photographs["chelsea"])
        assert torch.equal(found, openai_transform(photographs["chelsea"], model.visual.input_resolution))


def test_preprocess_takes_one_image(archives: dict[str, Path], photographs: dict):
    _, preprocess = clip.load(archives["vit"], device="cpu")
    image = photographs["chelsea"]
    batch = np.stack([np.asarray(image)] * 2)
    for several, kind in (([image, image], "list of 2"), ((image,), "tuple of 1"), (batch, "ndarray of 2")):
        with pytest.raises(TypeError, match=rf"takes one image, but got a {kind}; for several, torch.stack\("):
            preprocess(several)


def test_visual_is_a_module_of_the_image_tower(tower: str, archives: dict[str, Path], reference: nn.Module):
    model, _ = clip.load(archives[tower], device="cpu")
    expected = {
        id(p) for part in ("vision_model", "visual_projection") for p in getattr(model.hf_model, part).parameters()
    }
    assert {id(parameter) for parameter in model.visual.parameters()} == expected
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})
    assert not any(module.training for module in model.visual.modules())
    assert all(module.training for module in model.train().visual.modules())
    model.eval().visual.double()
    assert model.visual.conv1.weight.dtype == torch.float64
    image = random_images(tower)
    seen = []
    model.visual.float().register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), seen[0])
        twin = copy.deepcopy(model)
        twin.visual.conv1.weight.zero_()
        assert not torch.equal(twin.encode_image(image), seen[0])
        assert torch.equal(model.encode_image(image), seen[0])
        model.visual = nn.Flatten()
        assert model.encode_image(image).shape == (4, image[0].numel())


def test_the_originals_names_of_what_is_the_same(tower: str, archives: dict[str, Path], reference: nn.Module):
    model, _ = clip.load(archives[tower], device="cpu")
    same = ["logit_scale", "token_embedding.weight", "positional_embedding", "ln_final.weight", "visual.conv1.weight"]
    same += ["visual.ln_pre.bias", "visual.ln_post.weight", "visual.class_embedding", "visual.positional_embedding"] * (
        tower == "vit"
    )
    same += ["visual.bn3.bias", "visual.layer4.0.conv3.weight"] * (tower == "resnet")
    for name in same:
        assert torch.equal(attrgetter(name)(model), attrgetter(name)(reference)), name
    image, text = random_images(tower), texts()
    with torch.no_grad():
        before = model(image, text)[0]
        model.logit_scale = nn.Parameter(torch.zeros(()))
        assert model.hf_model.logit_scale.item() == 0
        torch.testing.assert_close(model(image, text)[0], before / reference.logit_scale.exp(), rtol=1e-4, atol=1e-5)
        assert "logit_scale" not in dict(model.named_parameters())
        model.ln_final = nn.Identity()
        assert isinstance(model.hf_model.text_model.final_layer_norm, nn.Identity)


def test_names_of_what_is_not_the_same_say_where_it_is(tower: str, archives: dict[str, Path]):
    model, _ = clip.load(archives[tower], device="cpu")
    moved = [
        (model, "transformer", "text_model.encoder"),
        (model, "text_projection", r"hf_model.text_projection, .*D, W"),
    ]
    moved.append((model.visual, *(("proj", "visual_projection") if tower == "vit" else ("attnpool", "c_proj"))))
    for module, name, place in moved:
        assert not hasattr(module, name)
        for use in (lambda m=module, n=name: getattr(m, n), lambda m=module, n=name: setattr(m, n, nn.Identity())):
            with pytest.raises(AttributeError, match=f"'{name}' of the original is not in hf_clip; .*{place}"):
                use()
    with pytest.raises(AttributeError, match="has no attribute 'surprise'"):
        _ = model.surprise


def test_state_dicts_of_both_kinds_are_loaded(tower: str, archives: dict[str, Path], reference: nn.Module):
    model, _ = clip.load(archives[tower], device="cpu")
    image, text = random_images(tower), texts()
    with torch.no_grad():
        expected = model(image, text)[0]
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        originals = {name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("attn_mask")}
        around = nn.ModuleDict({"clip": model})
        within = {f"clip.{name}": tensor for name, tensor in originals.items()}
        for target, state in ((model, own), (model, originals), (around, within)):
            for parameter in model.parameters():
                parameter.zero_()
            target.load_state_dict(state)
            assert torch.equal(model(image, text)[0], expected)
        with pytest.raises(CheckpointError, match="lacks tensors of the model: .*ln_final.weight"):
            model.load_state_dict({name: tensor for name, tensor in originals.items() if name != "ln_final.weight"})


def test_empty_batches(tower: str, archives: dict[str, Path]):
    model, _ = clip.load(archives[tower], device="cpu")
    with torch.no_grad():
        assert model.encode_image(random_images(tower, 0)).shape == model.encode_text(texts()[:0]).shape == (0, 48)
        assert [tuple(logits.shape) for logits in model(random_images(tower, 0), texts())] == [(0, 4), (4, 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda")], ids=repr)
def test_device_that_is_not_here_is_refused_before_anything_is_read(device: Any):
    with pytest.raises(ValueError, match=r"device=.* cannot be used here: .*\. Leave device out for 'cpu', or name"):
        clip.load("nowhere.pt", device=device)


def original_tokenize(texts: list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """The published rule, with the published tokenizer: start, ids, end; zeros behind; cut rows end with the end."""
    tokenizer = load_reference_module("simple_tokenizer").SimpleTokenizer()
    rows = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in enumerate(texts):
        ids = [49406, *tokenizer.encode(text), 49407]
        if len(ids) > context_length:
            assert truncate
            ids = [*ids[: context_length - 1], 49407]
        rows[row, : len(ids)] = torch.tensor(ids)
    return rows


@pytest.mark.parametrize(("length", "truncate"), [(77, False), (77, True), (100, False), (8, True), (2, True)])
def test_tokenize_is_the_original(length: int, truncate: bool):
    given = TEXTS if length > 20 or truncate else TEXTS[:2]
    given = [*given, "many words " * 60] if truncate else given
    found = clip.tokenize(given, context_length=length, truncate=truncate)
    assert found.dtype == torch.int32
    assert torch.equal(found, original_tokenize(given, length, truncate))


def test_tokenize_takes_one_text_and_none():
    assert torch.equal(clip.tokenize("a dog"), original_tokenize(["a dog"]))
    assert clip.tokenize([]).shape == (0, 77)
    with pytest.raises(RuntimeError, match="The text 'many words .* has 122 tokens, .* but the context length is 77"):
        clip.tokenize(["short", "many words " * 60])


def test_original_readme_runs(archives: dict[str, Path], photographs: dict, tmp_path: Path):
    """The published first example, the import, the model and the texts' length apart."""
    photographs["chelsea"].save(tmp_path / "CLIP.png")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess = clip.load(str(archives["vit"]), device=device)
    image = preprocess(Image.open(tmp_path / "CLIP.png")).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"], context_length=20).clamp(max=998).to(device)
    text[text == 998] = 999  # the reduced model's own end of text
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        logits_per_image, _ = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert image_features.shape == (1, 48)
    assert text_features.shape == (3, 48)
    assert probs.sum() == pytest.approx(1)


def test_published_file_is_found_where_it_was_put(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Offline; a file of the right name and another content is not taken for the published one."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"Put ViT-B-32.pt into .*originals, from https"):
        clip.load("ViT-B/32", device="cpu")
    with pytest.raises(FileNotFoundError, match=f"Put ViT-B-32.pt into {tmp_path}, from https"):
        clip.load("ViT-B/32", device="cpu", download_root=tmp_path)
    shutil.copy(archives["vit"], tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match="but the published ViT-B-32.pt has"):
        clip.load("ViT-B/32", device="cpu", download_root=tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ViT-B/31", ValueError, "Unknown CLIP variant 'ViT-B/31'; .* Did you mean"),
        ("vit-b/32", ValueError, "Unknown CLIP variant 'vit-b/32'; .* Did you mean 'ViT-B/32'"),
        ("somebody/clip", FileNotFoundError, "'somebody/clip' is no name of OpenAI's .*, no file and no folder here"),
        ("ViT-B-32", ValueError, "Unknown CLIP variant 'ViT-B-32'; .* Did you mean 'ViT-B/32'"),
        ("nowhere.pt", FileNotFoundError, "There is no checkpoint nowhere.pt"),
        ("a/b/c.pt", FileNotFoundError, "There is no checkpoint a/b/c.pt"),
    ],
)
def test_unknown_names_are_refused(name: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        clip.load(name, device="cpu")


def test_torchscript_is_not_run(archives: dict[str, Path]):
    with pytest.raises(ValueError, match="jit=True would run a program"):
        clip.load(archives["vit"], jit=True)
