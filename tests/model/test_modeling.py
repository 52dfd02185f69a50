"""The models: sizes, initialisation, outputs, features, attention kinds, checkpointing, compilation."""

import copy
import math
import typing
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, CLIPConfig, CLIPModel, PreTrainedModel

from conversion.reference import build_reference, load_reference_module, reference_dimensions
from hf_clip import (
    VARIANTS,
    HfClipConfig,
    HfClipForImageClassification,
    HfClipModel,
    HfClipResNetModel,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipVisionModelWithProjection,
    HfClipViTModel,
)
from hf_clip.checkpoints.keys import convert_names
from hf_clip.model.attention import eager_attention
from hf_clip.model.modeling_hf_clip import contrastive_loss, sigmoid_loss

from ..closeness import assert_same_features, assert_same_gradients
from ..small import DIMENSIONS, random_images, texts


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_of_the_published_models(name: str):
    with torch.device("meta"):
        model = HfClipModel(HfClipConfig.from_variant(name))
    row = VARIANTS[name]
    assert count(model.vision_model) + count(model.visual_projection) == row.image_parameters
    assert count(model.text_model) + count(model.text_projection) == row.text_parameters
    assert count(model) == row.total_parameters


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_initialisation_has_the_reference_implementations_statistics(name: str):
    """Each tensor's mean and deviation, against those that the original's own constructor gives."""
    torch.manual_seed(0)
    config = HfClipConfig.from_variant(name)
    theirs = load_reference_module("model").CLIP(**reference_dimensions(VARIANTS[name])).state_dict()
    theirs, ours = convert_names(theirs, config), HfClipModel(config).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        mine, other = tensor.double(), theirs[key].double()
        if tensor.numel() == 1 or other.std() == 0:
            assert torch.allclose(mine, other, atol=1e-4), key
            continue
        # Five standard errors of a mean, and of a deviation, of as many independent draws.
        spread = 5 * other.std() / tensor.numel() ** 0.5
        assert abs(mine.mean() - other.mean()) < 2 * spread, key
        assert abs(mine.std() - other.std()) < spread, key


def test_last_norm_of_every_residual_block_starts_at_zero():
    model = HfClipModel(HfClipConfig.from_variant("RN50"))
    gains = {name: p for name, p in model.named_parameters() if name.endswith("bn3.weight")}
    inside = [name for name in gains if ".layer" in name]
    assert len(inside) == 16
    assert all(bool((gains[name] == 0).all()) == (name in inside) for name in gains)


def test_state_dict_has_the_tensor_names_of_stock_clip():
    config = HfClipConfig.from_variant("ViT-B/32")
    with torch.device("meta"):
        ours, stock = HfClipModel(config), CLIPModel(CLIPConfig(**config.to_dict()))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    paths = {name for name, _ in ours.named_modules()}
    assert {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)} <= paths


@torch.no_grad()
def test_outputs_equal_stock_clips_field_by_field(repositories: dict[str, Path]):
    ours = AutoModel.from_pretrained(repositories["vit"]).eval()
    stock = CLIPModel(CLIPConfig(**ours.config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    inputs = {
        "input_ids": texts(),
        "pixel_values": random_images("vit"),
        "return_loss": True,
        "output_hidden_states": True,
    }
    mine, theirs = ours(**inputs), stock(**inputs)
    assert list(mine.keys()) == list(theirs.keys())
    torch.testing.assert_close(mine.to_tuple()[:5], theirs.to_tuple()[:5], rtol=1e-4, atol=1e-5)
    for part in ("text_model_output", "vision_model_output"):
        assert mine[part].keys() == theirs[part].keys()
        torch.testing.assert_close(mine[part].hidden_states, theirs[part].hidden_states, rtol=1e-4, atol=1e-5)
    for name in ("get_text_features", "get_image_features"):
        batch = inputs["input_ids" if "text" in name else "pixel_values"]
        mine, theirs = getattr(ours, name)(batch), getattr(stock, name)(batch)
        assert list(mine.keys()) == list(theirs.keys())
        torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_either_modality_alone_gives_its_embeddings_only(model: HfClipModel, tower: str):
    both = model(input_ids=texts(), pixel_values=random_images(tower))
    image, text = model(pixel_values=random_images(tower)), model(input_ids=texts())
    assert set(image.keys()) == {"image_embeds", "vision_model_output"}
    assert set(text.keys()) == {"text_embeds", "text_model_output"}
    assert_same_features(image.image_embeds, both.image_embeds)
    assert_same_features(text.text_embeds, both.text_embeds)
    assert torch.allclose(both.image_embeds.norm(dim=-1), torch.ones(4))


@torch.no_grad()
def test_features_are_tensors_where_the_configuration_says_so(model: HfClipModel, tower: str, tmp_path: Path):
    """As programs for transformers 4 expect. It is saved, and changes no other output."""
    images, ids = random_images(tower), texts()
    before = model(input_ids=ids, pixel_values=images)
    model.config.return_tensors_from_features = True
    model.save_pretrained(tmp_path)
    loaded = HfClipModel.from_pretrained(tmp_path).eval()
    assert_same_features(loaded.get_image_features(images), model.encode_image(images))
    assert_same_features(loaded.get_text_features(ids, return_dict=False), model.encode_text(ids))
    after = loaded(input_ids=ids, pixel_values=images)
    assert after.keys() == before.keys()
    assert_same_features(after.vision_model_output.pooler_output, before.vision_model_output.pooler_output)


@torch.no_grad()
def test_features_encodings_and_embeddings_agree(model: HfClipModel, tower: str):
    images, ids = random_images(tower), texts()
    outputs = model(input_ids=ids, pixel_values=images)
    assert_same_features(model.encode_image(images), model.get_image_features(images).pooler_output)
    assert_same_features(model.encode_text(ids), model.get_text_features(ids).pooler_output)
    assert_same_features(outputs.vision_model_output.pooler_output, model.encode_image(images))
    assert_same_features(nn.functional.normalize(model.encode_text(ids), dim=-1), outputs.text_embeds)
    cosines = outputs.image_embeds @ outputs.text_embeds.T
    assert torch.allclose(outputs.logits_per_image, cosines * model.logit_scale.exp(), atol=1e-5)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)


def test_tuple_form_has_the_same_order_whatever_was_computed(model: HfClipModel, tower: str):
    inputs = {"input_ids": texts(), "pixel_values": random_images(tower), "return_loss": True}
    outputs, values = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    for mine, other in zip(outputs.to_tuple()[:5], values[:5], strict=True):
        assert_same_features(mine, other)


def test_sigmoid_loss_of_a_matrix_checked_by_hand():
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    expected = sum(math.log(1 + math.exp(x)) for x in (-2.0, -1.0, 0.0, -3.0)) / 2
    assert sigmoid_loss(logits).item() == pytest.approx(expected, rel=1e-6)


def test_softmax_checkpoint_becomes_a_sigmoid_model(repository: Path, tower: str, tmp_path: Path):
    """The bias begins where SigLIP's does, everything else stays, and the folder says how its logits are to be read."""
    model = HfClipModel.from_pretrained(repository, contrastive_loss="sigmoid").eval()
    plain = HfClipModel.from_pretrained(repository).eval()
    assert plain.logit_bias is None
    assert "logit_bias" not in plain.state_dict()
    inputs = {"input_ids": texts(), "pixel_values": random_images(tower), "return_loss": True}
    with torch.no_grad():
        found, before = model(**inputs), plain(**inputs)
    assert torch.allclose(found.logits_per_image, before.logits_per_image - 10)
    assert torch.allclose(found.loss, sigmoid_loss(before.logits_per_text - 10))
    with torch.no_grad():
        model.logit_bias.fill_(-3)
    model.save_pretrained(tmp_path)
    loaded = HfClipModel.from_pretrained(tmp_path)
    assert loaded.config.contrastive_loss == "sigmoid"
    assert loaded.logit_bias.item() == -3


def test_contrastive_loss_of_a_matrix_checked_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    expected = torch.log(1 + torch.exp(torch.tensor(-2.0)))
    assert torch.allclose(contrastive_loss(logits), expected)
    # One wrong pair in two: rows give (ln 2 + ln(1 + e)) / 2 and columns the same by symmetry.
    logits = torch.tensor([[0.0, 0.0], [0.0, -1.0]])
    expected = (torch.log(torch.tensor(2.0)) + torch.log(1 + torch.exp(torch.tensor(1.0)))) / 2
    assert torch.allclose(contrastive_loss(logits), expected)


@torch.no_grad()
def test_text_feature_does_not_depend_on_padding_or_mask(model: HfClipModel):
    ids = texts((3, 7))
    shortest = ids[:, :7]
    padded = shortest.clone()
    padded[0, 3:] = ids[0, 2]  # the tokenizer's own padding repeats the end of text
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])
    expected = model.encode_text(ids)
    for variation in (model.encode_text(shortest), model.encode_text(padded), model.encode_text(padded, mask)):
        torch.testing.assert_close(variation, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hidden_states_and_attentions_of_both_towers(model: HfClipModel, tower: str):
    model.set_attn_implementation("eager")
    outputs = model(
        input_ids=texts(), pixel_values=random_images(tower), output_hidden_states=True, output_attentions=True
    )
    text, vision = outputs.text_model_output, outputs.vision_model_output
    assert [tuple(state.shape) for state in text.hidden_states] == [(4, 20, 128)] * 4
    assert [tuple(weights.shape) for weights in text.attentions] == [(4, 2, 20, 20)] * 3
    assert torch.equal(text.attentions[0].triu(1), torch.zeros(4, 2, 20, 20))
    if tower == "vit":
        assert [tuple(state.shape) for state in vision.hidden_states] == [(4, 10, 128)] * 4
        assert [tuple(weights.shape) for weights in vision.attentions] == [(4, 2, 10, 10)] * 3
    else:
        sides, channels = [24, 24, 12, 6, 3], [8, 32, 64, 128, 256]
        shapes = [(4, width, side, side) for width, side in zip(channels, sides, strict=True)]
        assert [tuple(state.shape) for state in vision.hidden_states] == shapes
        assert [tuple(weights.shape) for weights in vision.attentions] == [(4, 4, 1, 10)]
        assert torch.equal(vision.hidden_states[-1], vision.last_hidden_state)
    for weights in (*text.attentions, *vision.attentions):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


COMPILED_ATTENTION = pytest.param("flex_attention", marks=pytest.mark.slow)  # compiling takes most of a minute


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", COMPILED_ATTENTION, "flash_attention_2"])
def test_attention_implementations_agree(repository: Path, tower: str, implementation: str):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash_attention_2 needs the flash_attn package and a GPU")
    images, ids = random_images(tower), texts()
    plain = AutoModel.from_pretrained(repository, attn_implementation="eager").eval()
    other = AutoModel.from_pretrained(repository, attn_implementation=implementation).eval()
    for part in (other, other.text_model, other.vision_model):
        assert part.config._attn_implementation == implementation
    torch.testing.assert_close(other.encode_image(images), plain.encode_image(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.encode_text(ids), plain.encode_text(ids), rtol=1e-4, atol=1e-4)


def gradients(model: HfClipModel, tower: str) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=texts(), pixel_values=random_images(tower), return_loss=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def enable_checkpointing(model: HfClipModel, use_reentrant: bool) -> None:
    """The call has a new name since transformers 5.23; older versions know the old one only."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(
    repository: Path, tower: str, use_reentrant: bool
):
    plain, saving = (AutoModel.from_pretrained(repository).train() for _ in range(2))
    enable_checkpointing(saving, use_reentrant)
    if use_reentrant:  # which needs inputs with gradients; stock models ask for the same
        for tuned in (saving, plain):  # both, since a patch embedding with a hook computes by another way
            tuned.enable_input_require_grads()
            tuned.vision_model.enable_input_require_grads()
    expected, found = gradients(plain, tower), gradients(saving, tower)
    assert_same_gradients(found, expected)
    for (name, mine), (_, other) in zip(saving.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, other), name
    if tower == "resnet":
        assert plain.vision_model.bn1.num_batches_tracked == 1001  # one batch was counted, once


def test_gradient_checkpointing_recomputes_layers(model: HfClipModel, tower: str):
    layers = model.vision_model.encoder.layers if tower == "vit" else model.vision_model.layer2
    calls = []
    enable_checkpointing(model.train(), use_reentrant=False)
    first = layers[-1].self_attn if tower == "vit" else layers[-1].conv1
    first.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, tower)
    assert len(calls) == 2


@torch.no_grad()
def test_encoders_compile_without_graph_breaks(model: HfClipModel, tower: str):
    images, ids = random_images(tower), texts()
    encode_image = torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")
    encode_text = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode_text(ids), model.encode_text(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_encoders_compile_with_inductor(model: HfClipModel, tower: str):
    images, ids = random_images(tower), texts()
    torch.testing.assert_close(
        torch.compile(model.encode_image, fullgraph=True)(images), model.encode_image(images), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        torch.compile(model.encode_text, fullgraph=True)(ids), model.encode_text(ids), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    "kind",
    [
        HfClipModel,
        HfClipTextModel,
        HfClipViTModel,
        HfClipResNetModel,
        HfClipTextModelWithProjection,
        HfClipVisionModelWithProjection,
    ],
)
def test_type_hints_resolve(kind: type):
    methods = ["forward", "encode_image", "encode_text", "get_image_features", "get_text_features"]
    for name in methods:
        if method := getattr(kind, name, None):
            hints = typing.get_type_hints(method)
            assert "return" in hints
            assert {"input_ids", "pixel_values"} & hints.keys()


@pytest.mark.parametrize("kind", [HfClipVisionModelWithProjection, HfClipForImageClassification])
def test_input_embedding_of_an_image_model_can_be_replaced(repository: Path, kind: type[PreTrainedModel]):
    model = kind.from_pretrained(repository)
    convolution = copy.deepcopy(model.get_input_embeddings())
    assert isinstance(convolution, nn.Conv2d)
    model.set_input_embeddings(convolution)
    assert model.get_input_embeddings() is model.vision_model.get_input_embeddings() is convolution


def test_base_of_a_text_model_is_its_tower(repository: Path):
    model = HfClipTextModelWithProjection.from_pretrained(repository)
    assert model.base_model is model.text_model


def test_input_embeddings_are_the_token_table(model: HfClipModel):
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    other = nn.Embedding(10, 128)
    model.set_input_embeddings(other)
    assert model.text_model.embeddings.token_embedding is other


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "neither input_ids nor pixel_values"),
        (
            {"input_ids": texts(), "return_loss": True},
            "needs as many texts as images, pair by pair, but got 4 texts and no",
        ),
        (
            {"input_ids": texts(), "pixel_values": random_images("vit", 3), "return_loss": True},
            "got 4 texts and 3 images",
        ),
        (
            {"input_ids": torch.zeros(1, 21, dtype=torch.long)},
            "21 tokens per text, but this model's position table has 20",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 48, 64)},
            "pixel_values are 48x64, but .* fits only 48x48.*interpolate_pos",
        ),
        ({"pixel_values": torch.zeros(1, 3, 48, 48, dtype=torch.uint8)}, "torch.uint8, but the tower takes normalised"),
        ({"input_ids": torch.tensor([[998, 5000, 999]])}, "outside of this model's vocabulary of 1000"),
        ({"input_ids": torch.zeros(1, 3)}, r"input_ids are torch.float32 of shape \(1, 3\), but integers"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"of shape \(1, 0\)"),
        ({"input_ids": [[998, 999]]}, "as a tensor of token ids, but got list"),
        (
            {"input_ids": texts(), "attention_mask": torch.ones(4, 9)},
            r"attention_mask has shape \(4, 9\), but input_ids",
        ),
        ({"pixel_values": [[1.0]]}, "pixel_values as a tensor, but got list"),
        (
            {"pixel_values": torch.zeros(3, 48, 48)},
            r"have shape \(3, 48, 48\), but \(batch, 3, height, width\) is needed",
        ),
        ({"pixel_values": torch.zeros(1, 1, 48, 48)}, r"have shape \(1, 1, 48, 48\)"),
        (
            {"input_ids": texts()[:0], "pixel_values": random_images("vit", 0), "return_loss": True},
            "needs at least one pair, but the batch is empty",
        ),
        (
            {"input_ids": texts()[:0], "pixel_values": random_images("vit", 3), "return_loss": True},
            "got 0 texts and 3 images",
        ),
    ],
)
def test_wrong_input_says_what_is_needed(repositories: dict[str, Path], inputs: dict, message: str):
    model = AutoModel.from_pretrained(repositories["vit"])
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_empty_batch_gives_no_features(repository: Path, tower: str, attention: str):
    model = HfClipModel.from_pretrained(repository, attn_implementation=attention).eval()
    images, ids = random_images(tower, 0), texts()[:0]
    assert model.encode_image(images).shape == model.get_image_features(images).pooler_output.shape == (0, 48)
    for mask in (None, torch.ones_like(ids)):
        assert model.encode_text(ids, mask).shape == model.get_text_features(ids, mask).pooler_output.shape == (0, 48)
    assert model(input_ids=ids, pixel_values=random_images(tower, 2)).logits_per_image.shape == (2, 0)
    assert model(input_ids=texts(), pixel_values=images).logits_per_image.shape == (0, 4)
    both = model(input_ids=ids, pixel_values=images, output_hidden_states=True)
    assert both.logits_per_text.shape == (0, 0)
    assert all(len(state) == 0 for state in both.vision_model_output.hidden_states)


def test_empty_batch_of_a_classifier(repository: Path, tower: str):
    model = HfClipForImageClassification.from_pretrained(repository, num_labels=3).eval()
    assert model(random_images(tower, 0)).logits.shape == (0, 3)
    with pytest.raises(ValueError, match="labels are empty, and a loss is a mean"):
        model(random_images(tower, 0), labels=torch.zeros(0, dtype=torch.long))


def test_argument_without_effect_is_refused(repository: Path, model: HfClipModel, tower: str):
    images, ids = random_images(tower), texts()
    calls = {
        "HfClipModel": lambda **more: model(input_ids=ids, pixel_values=images, **more),
        "HfClipTextModel": lambda **more: model.get_text_features(ids, **more),
        type(model.vision_model).__name__: lambda **more: model.get_image_features(images, **more),
        "HfClipTextModelWithProjection": lambda **more: texts_alone(ids, **more),
        "HfClipVisionModelWithProjection": lambda **more: images_alone(images, **more),
        "HfClipForImageClassification": lambda **more: classifier(images, **more),
    }
    texts_alone = HfClipTextModelWithProjection.from_pretrained(repository)
    images_alone = HfClipVisionModelWithProjection.from_pretrained(repository)
    classifier = HfClipForImageClassification.from_pretrained(repository)
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} takes no argument 'output_hiddenstates': it would be ignored"):
            call(output_hiddenstates=True)
        call(output_hidden_states=True, inputs_embeds=None, token_type_ids=ids, num_items_in_batch=4)
    with pytest.raises(TypeError, match="no argument 'labels': the loss of pairs is had by return_loss=True"):
        model(input_ids=ids, pixel_values=images, labels=torch.arange(4))


def test_arguments_of_a_users_own_attention_are_handed_on(model: HfClipModel, tower: str):
    seen = []

    def attention(module, query, key, value, attention_mask, scaling, temperature=1.0, **kwargs):
        seen.append(temperature)
        return eager_attention(module, query, key, value, attention_mask, scaling)

    AttentionInterface.register("with_temperature", attention)
    model.set_attn_implementation("with_temperature")
    model.get_image_features(random_images(tower), temperature=2.0)
    assert set(seen) == {2.0}


def test_hooks_on_the_norms_of_a_resnet_see_what_norms_return(repositories: dict[str, Path]):
    """Nothing that a hook was given is overwritten later, and backward hooks work (Grad-CAM)."""
    tower = AutoModel.from_pretrained(repositories["resnet"]).vision_model.eval()
    images = random_images("resnet", 2)
    expected = tower(images).pooler_output
    kept, copies, gradients = {}, {}, {}
    for name, module in tower.named_modules():
        if not list(module.children()):

            def keep(_: nn.Module, __: tuple, output: Tensor | tuple, name: str = name) -> None:
                kept[name], copies[name] = output, output.detach().clone()

            module.register_forward_hook(keep)
            module.register_full_backward_hook(lambda _, __, output, name=name: gradients.update({name: output[0]}))
    found = tower(images.requires_grad_()).pooler_output
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(kept) > 20
    assert kept.keys() == gradients.keys()
    for name, output in kept.items():
        assert torch.equal(output, copies[name]), name
    assert all(kept[name].min() < 0 for name in kept if "bn" in name)
    norm = dict(tower.named_modules())["layer1.0.bn3"]
    twin = copy.deepcopy(tower)  # a norm that was replaced by nothing has the convolution's output
    twin.layer1[0].bn3 = nn.Identity()
    twin(images)
    assert torch.equal(kept["layer1.0.conv3"], copies["layer1.0.conv3"])
    assert isinstance(norm, nn.BatchNorm2d)


def test_unknown_activation_is_refused():
    with pytest.raises(
        StrictDataclassError, match="hidden_act is 'quickgelu', but transformers has no activation of that name"
    ):
        HfClipModel(HfClipConfig(text_config={"hidden_act": "quickgelu"}))


def test_fresh_model_is_copied_and_traced(model: HfClipModel, tower: str):
    """Neither copying nor tracing may stumble over what gradient checkpointing adds to layers."""
    twin = copy.deepcopy(model)
    enable_checkpointing(twin.train(), use_reentrant=False)
    copy.deepcopy(twin)
    blocks = [module for module in model.modules() if type(module).__name__ == "HfClipBottleneck"]
    assert not any(hasattr(block, "_gradient_checkpointing_func") for block in blocks)
    exported = torch.export.export(model.vision_model, (random_images(tower),), strict=False).module()
    expected = model.vision_model(random_images(tower)).pooler_output
    torch.testing.assert_close(exported(random_images(tower)).pooler_output, expected, rtol=1e-4, atol=1e-4)


def test_reference_models_are_random_in_every_tensor():
    """What the parity tests rest on: a gain of one or a bias of zero would hide an error."""
    for tower in DIMENSIONS:
        for name, tensor in build_reference(DIMENSIONS[tower], seed=3).state_dict().items():
            if tensor.numel() > 1:
                assert tensor.std() > 0, name
