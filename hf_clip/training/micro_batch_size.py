"""The largest micro-batch that fits into memory, for `--micro_batch_size auto`.

It is the whole batch, or a half, a quarter, an eighth … of it.

- On a GPU a size is tried: texts of the model's full length and their images go forward and backward, while memory for
  the optimizer's states and for the embeddings is set aside. What runs out of memory is halved.
- A CPU has nothing to catch, since the system ends a process that takes too much. There the bytes that autograd keeps
  for one pair are counted, and a micro-batch takes at most a quarter of the memory that is free. The other three are
  for what is not kept: the largest layer, its gradients, other programs.

Invariant: weights, gradients and random state stay as they are, and all processes find the same size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .frozen_towers import StoredTower
from .gathering import exchange_counts, world_size
from .gradient_caching import without_synchronization
from .learner import Learner

PART_OF_FREE_MEMORY = 0.25
ADAMS_STATES = 2
"""Numbers that AdamW holds for each that is trained."""
FEATURES_HELD = 4
"""What is held of each pair's two embeddings beside activations: themselves, their gradients, the loss's copies."""


def settle_micro_batch_size(config: TrainingConfig, learner: Learner) -> None:
    """Replace `auto` by the size that was found. Every process calls this, before the first step.

    Args:
        config: The options; the size is noted there.
        learner: What is trained.

    Raises:
        ValueError: Not even one pair fits.
    """
    if config.pairs_at_once is not None:
        return
    batch_size, accelerator = config.per_device_train_batch_size, learner.accelerator
    if accelerator.device.type == "cpu":
        free, needed = free_memory() // world_size(), bytes_of_a_pair(learner.model)
        size = halve(batch_size, lambda size: size * needed <= PART_OF_FREE_MEMORY * free, accelerator.device)
        reason = f"{needed / 1e6:.0f} MB are kept for a pair and {free / 1e9:.1f} GB of memory are free"
    else:
        set_aside = memory_of_states(learner.model) + FEATURES_HELD * features_of(learner.model, batch_size)
        size = halve(batch_size, lambda size: does_fit(learner, size, set_aside), accelerator.device)
        reason = "it is the largest part of a batch that was tried and fits"
    config.settle_micro_batch_size(size, reason)


def halve(largest: int, does_fit: Callable[[int], bool], device: torch.device) -> int:
    """The first of largest, largest / 2, largest / 4 … (rounded up) that fits in all processes.

    Args:
        largest: The size to begin with.
        does_fit: Whether so many pairs fit in this process.
        device: Where the processes exchange what they found.

    Raises:
        ValueError: Not even one pair fits.
    """
    size = largest
    while not all(fits for (fits,) in exchange_counts([int(does_fit(size))], device)):
        if size == 1:
            raise ValueError(
                "--micro_batch_size auto: not even one pair fits into memory. Pass --gradient_checkpointing, train "
                "less of the model (--lora_rank, --lock), or take a smaller model."
            )
        size = -(-size // 2)
    return size


def longest_pairs(model: Any, pairs: int) -> dict[str, Tensor]:
    """Inputs that take as much memory as any: images of the model's size, texts of its full length."""
    vision, text = model.config.vision_config, model.config.text_config
    device = model.logit_scale.device
    ids = torch.full((pairs, text.max_position_embeddings), text.eos_token_id, device=device)
    images = torch.zeros(pairs, vision.num_channels, vision.image_size, vision.image_size, device=device)
    found = {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, tower in (("pixel_values", model.vision_model), ("input_ids", model.text_model)):
        if isinstance(tower, StoredTower):
            found[name] = torch.zeros(pairs, tower.config.hidden_size, device=device)
    return found


def _embed(embed: Any, model: Any, pairs: int) -> Tensor:
    """Something whose gradient reaches all that is trained: (2, pairs, D)."""
    outputs = embed(**longest_pairs(model, pairs))
    return torch.stack([outputs.image_embeds, outputs.text_embeds]).float()


def memory_of_states(model: nn.Module) -> int:
    """Bytes of the states that an optimizer makes in its first step."""
    return ADAMS_STATES * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def features_of(model: Any, pairs: int) -> int:
    """Bytes of the embeddings of so many images and texts."""
    return 2 * pairs * model.config.projection_dim * torch.float32.itemsize


def does_fit(learner: Learner, pairs: int, set_aside: int) -> bool:
    """Whether so many pairs go forward and backward without running out of a GPU's memory.

    Args:
        learner: What is trained.
        pairs: Of this process.
        set_aside: Bytes that training will need beside.
    """
    model, wrapped, accelerator = learner.model, learner.wrapped, learner.accelerator
    device = accelerator.device
    random_state = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    is_training = wrapped.training
    wrapped.train()
    try:
        with random_state, without_synchronization(wrapped, accelerator):
            kept = torch.empty(set_aside, dtype=torch.uint8, device=device)
            (_embed(wrapped, model, pairs).sum() * model.logit_scale).backward()
            del kept
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        wrapped.train(is_training)
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()


def bytes_of_a_pair(model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of one pair, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_training = model.training
    model.train()
    with torch.random.fork_rng([]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embeddings = _embed(model, model, 1)
    model.train(is_training)
    del embeddings
    return sum(kept.values())


def free_memory() -> int:
    """Bytes of this machine's memory that programs can still take."""
    from psutil import virtual_memory  # which accelerate brings

    return virtual_memory().available
