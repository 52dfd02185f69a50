"""The models as one graph, for any batch size and text length: `torch.export` and `torch.compile(fullgraph=True)`."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import PreTrainedModel

from hf_clip import VARIANTS, HfClipConfig, HfClipModel

from ..small import CONTEXT_LENGTH, random_images, texts

SIZES = [(2, 7, 4), (5, CONTEXT_LENGTH, 2), (3, 2, 5)]
"""Texts, text length, images. Dynamo compiles a size of one by itself, and takes three images for channels."""


def inputs(tower: str, count: int, length: int, images: int) -> dict[str, torch.Tensor]:
    ids = texts((length,) * count)[:, :length].contiguous()
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "pixel_values": random_images(tower, images), "attention_mask": mask}


def free_dimensions(limit: int) -> dict[str, dict[int, Dim]]:
    count, length, images = Dim("texts"), Dim("length", max=limit), Dim("images")
    text = {0: count, 1: length}
    return {"input_ids": text, "attention_mask": text, "pixel_values": {0: images}}


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@torch.no_grad()
def test_exported_program_takes_any_batch_size_and_text_length(model: HfClipModel, tower: str, attention: str):
    model.set_attn_implementation(attention)
    dimensions = free_dimensions(CONTEXT_LENGTH)
    given = inputs(tower, *SIZES[0])
    exported = torch.export.export(model, (), given, dynamic_shapes=dimensions, strict=False).module()
    for size in [*SIZES, (1, 2, 1)]:
        found, expected = exported(**inputs(tower, *size)), model(**inputs(tower, *size))
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.text_embeds, expected.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.image_embeds, expected.image_embeds, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_compiled_graph_serves_all_batch_sizes_and_text_lengths(model: HfClipModel, tower: str):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in SIZES:
        found, expected = compiled(**inputs(tower, *size)), model(**inputs(tower, *size))
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


class First(nn.Module):
    """A module without the attention weights beside its output, which may be None; a trace can return tensors only."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        output = self.module(*args)
        return output[0] if isinstance(output, tuple) else output


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_every_part_can_be_traced_with_gradients(model: HfClipModel, tower: str):
    """torch.jit.trace compares its graph with one made without gradients."""
    calls: dict[str, tuple[nn.Module, tuple, dict]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (PreTrainedModel, nn.ModuleList)):

            def keep(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                kind = f"{type(module).__name__} {name.split('.')[0]}"
                calls.setdefault(kind, (module, args, kwargs))

            module.register_forward_pre_hook(keep, with_kwargs=True)
    model(**inputs(tower, *SIZES[0]))
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    assert len(calls) > 12
    for kind, (module, args, kwargs) in calls.items():
        assert torch.is_grad_enabled()
        given = tuple(
            arg.detach().requires_grad_() if arg.is_floating_point() else arg for arg in args if arg is not None
        )
        assert not any(isinstance(value, torch.Tensor) for value in kwargs.values()), kind
        first = First(module)
        torch.testing.assert_close(torch.jit.trace(first, given)(*given), first(*given), rtol=1e-4, atol=1e-5, msg=kind)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("gradients", [True, False])
def test_vmap_over_images_and_texts(model: HfClipModel, tower: str, gradients: bool):
    images, ids = random_images(tower, 3), texts((5, 9, 20))
    with torch.set_grad_enabled(gradients):
        found = torch.vmap(lambda image: model.encode_image(image[None])[0])(images)
        torch.testing.assert_close(found, model.encode_image(images), rtol=1e-4, atol=1e-5)
        found = torch.vmap(lambda row: model.encode_text(row[None])[0])(ids)
        torch.testing.assert_close(found, model.encode_text(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_every_model_is_exported_and_compiled(name: str):
    """All nine as they are, but without weights: only shapes are computed."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = HfClipModel(HfClipConfig.from_variant(name)).eval()
        size = model.config.vision_config.image_size
        given = {
            "input_ids": torch.zeros(2, 7, dtype=torch.long),
            "pixel_values": torch.zeros(4, 3, size, size),
            "attention_mask": torch.ones(2, 7, dtype=torch.long),
        }
    exported = torch.export.export(model, (), given, dynamic_shapes=free_dimensions(77), strict=False)
    limits = sorted(str(limit.upper) for limit in exported.range_constraints.values())
    assert limits == ["77", "int_oo", "int_oo"]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    assert compiled(**given).logits_per_image.shape == (4, 2)
