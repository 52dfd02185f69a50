"""Gradients by micro-batches are those of the whole batch, and what would make them others is refused."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

from hf_clip import HfClipModel
from hf_clip.training import micro_batch_size
from hf_clip.training.config import TrainingConfig
from hf_clip.training.gradient_caching import backpropagate, check_batch_norm_is_frozen, without_synchronization
from hf_clip.training.lora import add_lora_
from hf_clip.training.losses import ContrastiveResult, global_contrastive_loss
from hf_clip.training.micro_batch_size import bytes_of_a_pair, does_fit, halve, settle_micro_batch_size
from hf_clip.training.trainable import freeze_batch_norm_, lock_

from ..closeness import assert_same_gradients
from ..finetuning import largest_difference, train, weights
from ..largest_tensor import HeldMemory
from ..model.test_modeling import enable_checkpointing
from ..small import random_images, texts

LENGTHS = (3, 7, 12, 20, 5, 9, 4, 15, 6, 8)
IDS = {"local_image_ids": torch.tensor([1, 2, 3, 1, 4, 5, 6, 7, 8, 9]), "local_text_ids": torch.arange(10) // 2}


def batch_for(tower: str) -> dict[str, Tensor]:
    """Ten pairs, which micro-batches of 4 do not divide."""
    return {"pixel_values": random_images(tower, len(LENGTHS)), "input_ids": texts(LENGTHS)}


def loss_of(**options: Any) -> Callable[..., ContrastiveResult]:
    def loss(images: Tensor, captions: Tensor, scale: Tensor, bias: Tensor | None) -> ContrastiveResult:
        return global_contrastive_loss(images, captions, scale, logit_bias=bias, **options)

    return loss


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_both_ways(
    model: Any, batch: dict[str, Tensor], loss: Callable[..., ContrastiveResult]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the whole batch, and those by micro-batches of 4."""
    whole = backpropagate(model, batch, loss)
    expected = gradients_of(model)
    cached = backpropagate(model, batch, loss, micro_batch_size=4)
    for name in ("global_loss", "global_accuracy"):
        assert getattr(cached, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-5)
    return expected, gradients_of(model)


@pytest.fixture
def training(model: HfClipModel) -> HfClipModel:
    freeze_batch_norm_(model)
    return model.train()


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, **IDS},
        {"kind": "sigmoid", **IDS},
    ],
    ids=["softmax", "sigmoid"],
)
def test_gradients_are_those_of_the_whole_batch(repository: Path, tower: str, options: dict[str, Any]):
    """Of every parameter, the temperature and the bias included."""
    model = AutoModel.from_pretrained(repository, contrastive_loss=options.get("kind", "softmax")).train()
    freeze_batch_norm_(model)
    expected, found = in_both_ways(model, batch_for(tower), loss_of(**options))
    assert {"logit_scale", *(["logit_bias"] if "kind" in options else [])} < found.keys()
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("count", [5, 2])
def test_negative_texts_are_spread_over_the_micro_batches(training: HfClipModel, tower: str, count: int):
    """There are three micro-batches, so with two texts one of them has none."""
    batch = batch_for(tower)
    batch["input_ids"] = texts((*LENGTHS, *range(3, 3 + count)))
    sizes: list[tuple[int, int]] = []
    training.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(tuple(map(len, inputs.values()))), with_kwargs=True
    )

    def loss(images: Tensor, captions: Tensor, scale: Tensor, bias: Tensor | None) -> ContrastiveResult:
        own, negatives = captions[: len(images)], captions[len(images) :]
        return global_contrastive_loss(images, own, scale, local_negative_text_embeds=negatives)

    expected, found = in_both_ways(training, batch, loss)
    assert_same_gradients(found, expected)
    shares = {5: [(4, 6), (4, 6), (2, 3)], 2: [(4, 5), (4, 5), (2, 2)]}[count]
    assert sizes == [(10, 10 + count), *shares, *shares]
    without, _ = in_both_ways(training, batch | {"input_ids": batch["input_ids"][:10]}, loss_of())
    assert any((found[name] - without[name]).norm() > 0.01 * without[name].norm() for name in found)


def test_whole_batch_is_computed_as_the_model_computes_its_loss(training: HfClipModel, tower: str):
    batch = batch_for(tower)
    training(**batch, return_loss=True).loss.backward()
    expected = gradients_of(training)
    backpropagate(training, batch, loss_of())
    assert_same_gradients(gradients_of(training), expected)


def add_trained_lora_(model: HfClipModel, dropout: float = 0.0) -> None:
    add_lora_(model, 2, dropout=dropout)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begin as zeros, and then the others have no gradient
            nn.init.normal_(parameter, std=0.02)


def test_gradients_with_adapters_and_checkpointing(training: HfClipModel, tower: str):
    add_trained_lora_(training)
    enable_checkpointing(training, use_reentrant=False)
    expected, found = in_both_ways(training, batch_for(tower), loss_of())
    assert len(found) > 10
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("locked", ["image", "text"])
def test_locked_tower_embeds_each_pair_once(training: HfClipModel, tower: str, locked: str):
    lock_(training, locked)
    rows: dict[str, int] = {"vision_model": 0, "text_model": 0}
    for name in rows:
        module = training.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: rows.__setitem__(name, rows[name] + len((*args, *kwargs.values())[0])),
            with_kwargs=True,
        )
    expected, found = in_both_ways(training, batch_for(tower), loss_of())
    assert_same_gradients(found, expected)
    of_locked, of_other = ("vision_model", "text_model") if locked == "image" else ("text_model", "vision_model")
    assert (rows[of_locked], rows[of_other]) == (10 + 10, 10 + 20)


def test_temperature_learns_by_itself(training: HfClipModel, tower: str):
    training.requires_grad_(False).logit_scale.requires_grad_()
    expected, found = in_both_ways(training, batch_for(tower), loss_of())
    assert found.keys() == {"logit_scale"}
    assert_same_gradients(found, expected)


def add_dropout_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3


@pytest.mark.parametrize("trained", ["all", "text", "adapters"])
def test_dropout_and_augmentation_on_the_device_are_replayed(repositories: dict[str, Path], trained: str):
    """Against one graph over all micro-batches, since a whole batch draws other numbers."""
    model = AutoModel.from_pretrained(repositories["vit"]).train()
    lock_(model, "image" if trained == "text" else None)
    if trained == "adapters":  # whose own dropout is the only one
        add_trained_lora_(model, dropout=0.3)
        enable_checkpointing(model, use_reentrant=False)
    else:
        add_dropout_(model)

    def augmented(pixel_values: Tensor | None = None, input_ids: Tensor | None = None) -> Any:
        if pixel_values is not None:
            pixel_values = pixel_values + torch.rand_like(pixel_values)
        return model(pixel_values=pixel_values, input_ids=input_ids)

    batch = batch_for("vit")
    torch.manual_seed(7)
    parts = [augmented(*part) for part in zip(*(t.split(4) for t in batch.values()), strict=True)]
    images, captions = (torch.cat([getattr(part, f"{kind}_embeds") for part in parts]) for kind in ("image", "text"))
    global_contrastive_loss(images, captions, model.logit_scale).local_loss_to_backpropagate.backward()
    expected, state = gradients_of(model), torch.get_rng_state()
    torch.manual_seed(7)
    backpropagate(model, batch, loss_of(), micro_batch_size=4, wrapped=augmented)
    assert torch.equal(torch.get_rng_state(), state)  # the replay draws nothing of its own
    found = gradients_of(model)
    assert_same_gradients(found, expected)
    backpropagate(model, batch, loss_of(), micro_batch_size=4, wrapped=augmented)
    others = gradients_of(model)
    assert max(float((others[name] - gradient).abs().max()) for name, gradient in found.items()) > 1e-4


def test_bfloat16_differs_by_its_rounding_alone(training: HfClipModel, tower: str):
    """From the whole batch in bfloat16 by less than that does from float32.

    The block of autocast is around both passes: what it keeps of the first has no graph, and must not be used again.
    """
    batch = batch_for(tower)
    exact, _ = in_both_ways(training, batch, loss_of())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = in_both_ways(training, batch, loss_of())
    assert found.keys() == exact.keys()

    def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
        return float(torch.cat([(first[name] - second[name]).flatten() for name in exact]).norm())

    assert distance(found, expected) < distance(expected, exact)
    assert distance(found, expected) < 0.02 * distance(expected, dict.fromkeys(exact, torch.zeros(())))


class OnDemand:
    """Micro-batches of three pairs that are made when they are read."""

    def __init__(self, batch: dict[str, Tensor]):
        self.batch, self.read = batch, 0

    def __len__(self) -> int:
        return -(-len(LENGTHS) // 3)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(LENGTHS), 3):
            self.read += 1
            yield {name: tensor[first : first + 3] for name, tensor in self.batch.items()}


def test_micro_batches_may_be_made_when_they_are_read(repositories: dict[str, Path]):
    model, batch = AutoModel.from_pretrained(repositories["vit"]).train(), batch_for("vit")
    backpropagate(model, batch, loss_of())
    expected = gradients_of(model)
    parts = OnDemand(batch)
    backpropagate(model, parts, loss_of())
    assert_same_gradients(gradients_of(model), expected)
    assert parts.read <= 1 + 2 * len(parts)  # twice each, and one is looked at


def test_memory_is_that_of_a_micro_batch(repositories: dict[str, Path]):
    """Four times the pairs add themselves, their embeddings, the gradients of these, and the loss's own copies."""
    model = AutoModel.from_pretrained(repositories["vit"]).train()
    backpropagate(model, batch_for("vit"), loss_of())  # from here on there are gradients

    def most(pairs: int, micro: int | None) -> int:
        batch = {"pixel_values": random_images("vit", pairs), "input_ids": texts((LENGTHS * 2)[:pairs])}
        with HeldMemory() as memory:
            backpropagate(model, batch, loss_of(), micro_batch_size=micro)
        return memory.most - sum(tensor.nbytes for tensor in batch.values())

    few, many, whole = most(4, 2), most(16, 2), most(16, None)
    features = 2 * (16 - 4) * model.config.projection_dim * 4
    assert many - few < 0.05 * few + 8 * features
    assert many < 0.7 * whole


# --- several processes -----------------------------------------------------------------------------------------------


def test_gradients_are_exchanged_once_in_a_step(one_process: None, repositories: dict[str, Path]):
    model, batch = AutoModel.from_pretrained(repositories["vit"]).train(), batch_for("vit")
    expected, _ = in_both_ways(model, batch, loss_of())
    wrapped = DistributedDataParallel(model)
    exchanged = []

    def count(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, count)
    backpropagate(model, batch, loss_of(), wrapped=wrapped)
    once = len(exchanged)
    model.zero_grad()
    backpropagate(model, batch, loss_of(), micro_batch_size=4, wrapped=wrapped)
    assert_same_gradients(gradients_of(model), expected)
    # The first step of DDP finds the order of its buckets, and has one more or less.
    assert 0 < len(exchanged) - once <= once + 1


def test_what_wraps_the_model_is_told_to_wait():
    told: list[bool] = []
    fsdp2 = SimpleNamespace(set_requires_gradient_sync=told.append)
    accelerator = SimpleNamespace(sync_gradients=True, distributed_type=SimpleNamespace(value="FSDP"))
    with without_synchronization(fsdp2, accelerator):
        assert told == [False]
    assert told == [False, True]
    accelerator.sync_gradients = False  # accelerate accumulates: it has told the wrapper, and tells it when to go on
    with without_synchronization(fsdp2, accelerator):
        pass
    assert told == [False, True]
    deepspeed = SimpleNamespace(sync_gradients=True, distributed_type=SimpleNamespace(value="DEEPSPEED"))
    with without_synchronization(SimpleNamespace(), deepspeed):
        assert not deepspeed.sync_gradients
    assert deepspeed.sync_gradients


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def test_batch_norm_in_training_mode_is_refused(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"]).train()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    message = (
        f"Micro-batches need an embedding that does not depend on the batch, but BatchNorm in training mode "
        f"(vision_model.bn1 and {norms - 1} more) takes its statistics over what is embedded at once. Start from a "
        f"trained ResNet with --model, which freezes BatchNorm (freeze_batch_norm_ in a loop of your own), take a ViT, "
        f"or leave out --micro_batch_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        backpropagate(model, batch_for("resnet"), loss_of(), micro_batch_size=4)
    assert all(parameter.grad is None for parameter in model.parameters())
    freeze_batch_norm_(model)
    check_batch_norm_is_frozen(model.train())
    check_batch_norm_is_frozen(AutoModel.from_pretrained(repositories["resnet"]).eval())


def test_run_that_would_train_batch_norm_is_refused(digits: Path, tmp_path: Path):
    chosen = {"model": None, "variant": str(digits / "resnet"), "micro_batch_size": 8}
    with pytest.raises(ValueError, match=r"BatchNorm in training mode \(vision_model.bn1 and \d+ more\)"):
        train(digits, tmp_path / "out", "resnet", **chosen)
    assert not (tmp_path / "out").exists()


# --- runs ------------------------------------------------------------------------------------------------------------


def test_run_gives_the_weights_of_whole_batches(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of a ResNet, whose BatchNorm is frozen in fine-tuning."""
    tower = "resnet"
    chosen = {"max_steps": 3, "per_device_train_batch_size": 48, "optim": "SGD", "learning_rate": "1e-2"}
    whole = train(digits, tmp_path / "whole", tower, **chosen)
    assert "in memory at once" not in capsys.readouterr().out
    parts = train(digits, tmp_path / "parts", tower, micro_batch_size=20, **chosen)
    said = "3 steps of 48 pairs, 0.225 epochs. Each process has 20 pairs in memory at once; all 48 of a batch are contr"
    assert said in capsys.readouterr().out
    assert largest_difference(weights(whole), weights(parts)) < 1e-6
    assert largest_difference(weights(whole), weights(digits / tower)) > 1e-4


# --- the largest that fits -------------------------------------------------------------------------------------------


def test_size_is_halved_until_it_fits():
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 20

    assert halve(150, fits, torch.device("cpu")) == 19
    assert tried == [150, 75, 38, 19]
    with pytest.raises(
        ValueError, match="not even one pair fits into memory. Pass --gradient_checkpointing, train les"
    ):
        halve(4, lambda size: False, torch.device("cpu"))


def learner_of(model: Any) -> Any:
    kind = SimpleNamespace(value="NO")
    accelerator = SimpleNamespace(device=torch.device("cpu"), sync_gradients=True, distributed_type=kind)
    return SimpleNamespace(model=model, wrapped=model, accelerator=accelerator)


def test_trial_that_runs_out_of_memory_says_so_and_leaves_nothing(
    training: HfClipModel, monkeypatch: pytest.MonkeyPatch
):
    before, state = copy.deepcopy(training.state_dict()), torch.get_rng_state()
    assert does_fit(learner_of(training), 2, set_aside=8)

    def run_out(*_: Any, **__: Any) -> None:
        torch.rand(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(training.text_projection, "forward", run_out)
        assert not does_fit(learner_of(training), 2, set_aside=8)
    assert all(parameter.grad is None for parameter in training.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in training.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_cpu_counts_what_a_pair_keeps(training: HfClipModel, monkeypatch: pytest.MonkeyPatch):
    needed = bytes_of_a_pair(training)
    # The longest text's hidden states alone, in each of three layers.
    assert needed > 3 * training.config.text_config.max_position_embeddings * 128 * 4
    config = TrainingConfig(model="m", dataset=["d"], output_dir="o", max_steps=1, learning_rate="1e-5")
    config.micro_batch_size = "auto"
    monkeypatch.setattr(micro_batch_size, "free_memory", lambda: 4 * 100 * needed)
    settle_micro_batch_size(config, learner_of(training))
    assert config.pairs_at_once == 64  # of 256, for 100 pairs
    assert re.match(
        r"note: --micro_batch_size is 64, since \d+ MB are kept for a pair and .* are free", config.notes[0]
    )


def test_largest_is_found_before_the_first_step(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Here all pairs of a batch fit, so that nothing is cut."""
    chosen = {"max_steps": 2, "per_device_train_batch_size": 16}
    found = train(digits, tmp_path / "auto", micro_batch_size="auto", **chosen)
    assert "note: --micro_batch_size is 16, since " in capsys.readouterr().err
    assert largest_difference(weights(found), weights(train(digits, tmp_path / "whole", **chosen))) == 0
