"""PEFT: LoRA on every kind of tower, and adapters that travel between our classes and transformers' own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipTextModel, HfClipTextModelWithProjection
from hf_clip.training.lora import adapter_of, add_lora_
from hf_clip.training.trainable import lock_

from ..small import texts
from .stock import pairs, stock_model, stock_text_model, stock_text_model_with_projection

peft = pytest.importorskip("peft", reason="LoRA through PEFT needs the package peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),  # the next one
]

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""For transformers of both kinds, together; the patterns below are for one tower."""
TARGETS = {
    "text": r"text_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "vit": r"vision_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "resnet": r"vision_model\.(layer\d\..*)?(conv\d|downsample\.0)"
    r"|vision_model\.attnpool\.[qkv]_proj|visual_projection",
}


def add_lora(model: nn.Module, targets: str | list[str], **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))


def freeze_batch_norm(model: nn.Module) -> None:
    """An adapter does not hold the statistics, so they must not move."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train(model: Any, loss_of: Callable[[Any], Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: Any, tower: str) -> Tensor:
    return model(**pairs(tower)).logits_per_image


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(params=["text", "vit", "resnet"])
def adapted(request: pytest.FixtureRequest) -> str:
    """The tower that gets adapters. A text tower's model has a ViT."""
    return request.param


@pytest.fixture
def tower(adapted: str) -> str:
    return "vit" if adapted == "text" else adapted


def test_targets_are_all_matrices_and_convolutions_of_their_tower(model: HfClipModel, adapted: str):
    kept = r"vision_model\.embeddings\.patch_embedding|text_projection"
    kept += "" if adapted == "resnet" else "|visual_projection"
    prefix = "text_model" if adapted == "text" else "vision_model|visual_projection"
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.match(prefix, name) and not re.fullmatch(kept, name)
    }
    assert set(add_lora(model, TARGETS[adapted]).targeted_module_names) == expected


def test_adapter_is_trained_saved_loaded_and_merged(
    repository: Path, model: HfClipModel, adapted: str, tower: str, tmp_path: Path
):
    before, weights = logits(model, tower), {name: t.clone() for name, t in model.state_dict().items()}
    trained = add_lora(model, TARGETS[adapted]).train()
    freeze_batch_norm(trained)
    train(trained, lambda model: model(**pairs(tower), return_loss=True).loss)
    expected = logits(trained, tower)
    assert (expected - before).abs().max() > 0.1

    trained.save_pretrained(tmp_path / "adapter")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    plain = AutoModel.from_pretrained(repository).eval()
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert_close(logits(loaded, tower), expected)

    merged = loaded.merge_and_unload()
    assert type(merged) is HfClipModel
    assert_close(logits(merged, tower), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(again, tower), expected)
    assert again.state_dict().keys() == weights.keys()

    unloaded = trained.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in weights.items())


def test_adapter_loads_without_peft_model(
    repository: Path, model: HfClipModel, adapted: str, tower: str, tmp_path: Path
):
    """transformers' own integration: into a model, or from the adapter's folder, which names its base."""
    trained = add_lora(model, TARGETS[adapted], init_lora_weights=False).eval()
    expected, folder = logits(trained, tower), str(tmp_path)
    trained.save_pretrained(folder)

    loaded = AutoModel.from_pretrained(repository)
    before = logits(loaded.eval(), tower)
    info = loaded.load_adapter(folder)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert_close(logits(loaded.eval(), tower), expected)
    loaded.disable_adapters()
    assert_close(logits(loaded, tower), before)

    by_base = AutoModel.from_pretrained(folder).eval()
    assert type(by_base) is HfClipModel
    assert_close(logits(by_base, tower), expected)
    by_auto_mapping = peft.AutoPeftModel.from_pretrained(
        folder, import_allowlist=["hf_clip.model.modeling_hf_clip"]
    ).eval()
    assert_close(logits(by_auto_mapping, tower), expected)


def test_adapter_of_transformers_integration_loads_into_peft(model: HfClipModel, repository: Path, tmp_path: Path):
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION_AND_MLP, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    plain = AutoModel.from_pretrained(repository).eval()
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    tower = "resnet" if "resnet" in model.config.vision_config.model_type else "vit"
    assert_close(logits(loaded, tower), logits(model.eval(), tower))


def test_adapter_of_the_trainer_loads_into_peft(
    model: HfClipModel, repository: Path, tower: str, adapted: str, tmp_path: Path
):
    """With the temperature, which PEFT reads beside the factors. A ViT's and a text tower's fit stock CLIP too."""
    lock_(model, "image:1" if adapted == "text" else "text")
    add_lora_(model, 2, alpha=3, dropout=0.5)
    train(model.train(), lambda model: model(**pairs(tower), return_loss=True).loss)
    expected = logits(model, tower)
    adapter_of(model).save(tmp_path, model, base=str(repository))
    bases = [AutoModel.from_pretrained(repository)]
    if tower == "vit":
        bases.append(stock_model(AutoModel.from_pretrained(repository)))
    for base in bases:
        assert (logits(base.eval(), tower) - expected).abs().max() > 0.1
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert_close(logits(loaded, tower), expected)
    by_base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(by_base) is HfClipModel
    with torch.no_grad():  # transformers reads the factors alone
        by_base.logit_scale.copy_(model.logit_scale)
    assert_close(logits(by_base, tower), expected)


def test_moving_statistics_are_saved_with_the_norms(repositories: dict[str, Path], tmp_path: Path):
    """Those who let BatchNorm train beside a ResNet's adapters name the norms in `modules_to_save`."""
    model = AutoModel.from_pretrained(repositories["resnet"])
    statistics = model.vision_model.bn1.running_mean.clone()
    trained = add_lora(model, TARGETS["resnet"], modules_to_save=["bn1", "bn2", "bn3", "downsample.1"]).train()
    train(trained, lambda model: model(**pairs("resnet"), return_loss=True).loss)
    trained.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(repositories["resnet"])
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert_close(logits(loaded, "resnet"), logits(trained, "resnet"))
    assert not torch.equal(loaded.merge_and_unload().vision_model.bn1.running_mean, statistics)


def test_gradients_of_adapters_are_the_same_with_checkpointing(repository: Path, adapted: str, tower: str):
    gradients = []
    for checkpointing in (False, True):
        model = add_lora(AutoModel.from_pretrained(repository), TARGETS[adapted], init_lora_weights=False)
        model.enable_input_require_grads()  # as checkpointing does; hooked, a patch embedding sums in another order
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        freeze_batch_norm(model)
        model(**pairs(tower), return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(".lora_" in name and gradient is not None for name, gradient in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


# --- between our classes and transformers' own ----------------------------------------------------------------------


def whole(model: Any) -> Tensor:
    return model(**pairs("vit")).logits_per_image


def first_output(model: Any) -> Tensor:
    """`last_hidden_state` of a text tower, `text_embeds` of one with its projection."""
    return model(input_ids=texts())[0]


TRAVELLERS = {
    "CLIPModel": (HfClipModel, stock_model, whole),
    "CLIPTextModel": (HfClipTextModel, stock_text_model, first_output),
    "CLIPTextModelWithProjection": (
        HfClipTextModelWithProjection,
        stock_text_model_with_projection,
        first_output,
    ),
}


@pytest.mark.parametrize("kind", TRAVELLERS)
@pytest.mark.parametrize("direction", ["stock to ours", "ours to stock"])
def test_adapters_travel(repositories: dict[str, Path], kind: str, direction: str, tmp_path: Path):
    our_class, stock_of, output = TRAVELLERS[kind]

    def build(ours: bool) -> Any:
        model = our_class.from_pretrained(repositories["vit"]).eval()
        return model if ours else stock_of(model)

    into_ours = direction == "stock to ours"
    trained = add_lora(build(not into_ours), ATTENTION_AND_MLP).train()
    train(trained, lambda model: output(model).square().mean())
    trained.save_pretrained(tmp_path)

    before = output(build(into_ours))
    loaded = peft.PeftModel.from_pretrained(build(into_ours), tmp_path).eval()
    integrated = build(into_ours)
    integrated.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = output(trained)
        assert (expected - before).abs().max() > 0.1
        torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output(integrated.eval()), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
