"""Contrastive gradients of a batch of any size, in the memory of a micro-batch (Gao et al. 2021, section 3).

1. Embed every micro-batch without a graph. Keep the embeddings, and the random state before each.
2. Compute the loss of the whole batch and its gradient on the embeddings and on the temperature.
3. Embed every micro-batch again, from the same random state and with a graph, and go on from step 2's gradient.

Invariant: the gradients are those of the whole batch but for rounding. By the chain rule that holds as long as the
embedding of a pair does not depend on the pairs beside it, and is the same in steps 1 and 3. BatchNorm in training mode
breaks the first, see `check_batch_norm_is_frozen`. Random numbers that are not torch's would break the second.

To accumulate the gradients of separate batches is something else: there a pair is contrasted with the pairs of its own
part alone.

Processes exchange gradients once in a step, at the last micro-batch. ZeRO 2 and 3 hold no whole gradients, so they
reduce them at every micro-batch.

A batch may have negative texts behind the texts of its pairs, see `global_contrastive_loss`. They are spread evenly
over the micro-batches, since it does not matter beside which pairs a text is embedded.

Dimensions: B pairs and J negative texts of this process, D embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..model.resnet_tower import BatchNorm
from .losses import ContrastiveResult
from .sharding import is_deepspeed
from .trainable import PROJECTIONS, TOWERS

Inputs = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], ContrastiveResult]
"""Image embeddings (B, D), text embeddings (B + J, D), logit scale and logit bias → the result."""


class MicroBatches(Protocol):
    """What is iterated over twice in a step: a list, or what makes micro-batches when they are read."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Inputs]: ...


OF_IMAGES = "pixel_values"
"""The model's input for images; all others are for texts."""


def check_batch_norm_is_frozen(model: nn.Module) -> None:
    """Refuse a model that would embed a pair otherwise in a micro-batch than in the whole batch.

    Args:
        model: Whose modules are in the mode in which they will be trained.

    Raises:
        ValueError: A BatchNorm is in training mode.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, BatchNorm) and module.training]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"Micro-batches need an embedding that does not depend on the batch, but BatchNorm in training mode "
            f"({found[0]}{more}) takes its statistics over what is embedded at once. Start from a trained ResNet with "
            f"--model, which freezes BatchNorm (freeze_batch_norm_ in a loop of your own), take a ViT, or leave out "
            f"--micro_batch_size."
        )


def split_batch(batch: Inputs, micro_batch_size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into micro-batches, as views where there are no negative texts.

    Args:
        batch: Tensors (B, …) by name. Those of texts may be (B + J, …), with J negative texts behind the others.
        micro_batch_size: Pairs in a micro-batch. The last one may have fewer.

    Returns:
        The micro-batches in order. Each has its share of the negative texts behind its pairs' texts.

    Raises:
        ValueError: `micro_batch_size` is below 1.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}, but must be at least 1.")
    pairs = len(batch[OF_IMAGES]) if OF_IMAGES in batch else max(map(len, batch.values()))
    parts = {name: _split(tensor, pairs, micro_batch_size) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def _split(tensor: Tensor, pairs: int, size: int) -> tuple[Tensor, ...]:
    """(B or B + J, …) → parts, each of up to `size` pairs and its share of the J."""
    if len(tensor) <= pairs:
        return tensor.split(size)
    of_pairs = tensor[:pairs].split(size)
    of_negatives = tensor[pairs:].tensor_split(len(of_pairs))
    return tuple(torch.cat(part) for part in zip(of_pairs, of_negatives, strict=True))


class _RandomState:
    """torch's random state of now, on the CPU and on one device."""

    def __init__(self, device: torch.device):
        self.device, self.of_cpu = device, torch.get_rng_state()
        if device.type != "cpu":
            self.of_device = torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within this block random numbers are drawn from this state on. Behind it they go on as before."""
        is_cpu = self.device.type == "cpu"
        devices, device_type = ([], "cuda") if is_cpu else ([self.device], self.device.type)
        with torch.random.fork_rng(devices, device_type=device_type):
            torch.set_rng_state(self.of_cpu)
            if not is_cpu:
                torch.get_device_module(self.device).set_rng_state(self.of_device, self.device)
            yield


@contextmanager
def _withheld(accelerator: Any) -> Iterator[None]:
    """Within this block DeepSpeed adds up gradients and takes no step."""
    is_synced, accelerator.sync_gradients = accelerator.sync_gradients, False
    try:
        yield
    finally:
        accelerator.sync_gradients = is_synced


@contextmanager
def _unreduced(sharded: Any) -> Iterator[None]:
    """Within this block FSDP2 keeps gradients whole."""
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


def without_synchronization(wrapped: Any, accelerator: Any = None) -> AbstractContextManager:
    """A context in which gradients of this process are added up, and not exchanged with the other processes.

    Args:
        wrapped: The model as it computes: in DDP, FSDP2, DeepSpeed's engine, or plain.
        accelerator: What wrapped it, if that was accelerate. Needed for DeepSpeed.
    """
    if accelerator is not None and is_deepspeed(accelerator):
        return _withheld(accelerator)
    if accelerator is not None and not accelerator.sync_gradients:
        return nullcontext()  # accelerate's accumulation has seen to it
    if hasattr(wrapped, "set_requires_gradient_sync"):
        return _unreduced(wrapped)
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()


def _without(part: Inputs, names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in part.items() if name not in names}


def _untrained_inputs(model: nn.Module, part: Inputs) -> set[str]:
    """The inputs of a tower of which nothing is trained while the other learns: it need not embed them again."""
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    is_of = {
        "image": [name for name in part if name == OF_IMAGES],
        "text": [name for name in part if name != OF_IMAGES],
    }
    locked = [tower for tower in TOWERS if not trained & {TOWERS[tower], PROJECTIONS[tower]}]
    return set(is_of[locked[0]]) if len(locked) == 1 else set()


def _temperature(model: Any) -> tuple[Tensor, Tensor | None]:
    return model.logit_scale, getattr(model, "logit_bias", None)


def _on(device: torch.device, inputs: Inputs) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _sum_of_products(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """Σ tensor · gradient: its gradient on each tensor is the given one."""
    terms = [
        (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * gradient).sum()
        for tensor, gradient in pairs
        if tensor is not None and gradient is not None and tensor.requires_grad
    ]
    return torch.stack(terms).sum()


def backpropagate(
    model: Any,
    batch: Inputs | MicroBatches,
    loss: Loss,
    *,
    micro_batch_size: int | None = None,
    wrapped: Any = None,
    accelerator: Any = None,
) -> ContrastiveResult:
    """Compute the loss of a whole batch and add its gradients to the model's parameters.

    Every process must call this. Under FSDP2 and ZeRO 3 every process needs as many micro-batches.

    Args:
        model: An HfClipModel.
        batch: What the model is called with, tensors (B, …). They may lie on another device than the model and are
            moved there by micro-batches. Or micro-batches, such as a list of them, which are iterated over twice.
            Behind the texts of its pairs either may have negative texts: input_ids are then (B + J, L).
        loss: Gets all B embeddings, (B, D) twice, the logit scale and the logit bias, or None for it. For example
            `global_contrastive_loss` with its options. The texts' are (B + J, D), those of the pairs first.
        micro_batch_size: Pairs that are in memory at once. None computes the batch as it is.
        wrapped: The model in DDP, FSDP2 or what `Accelerator.prepare` returns. None: the model itself.
        accelerator: What wrapped it, if that was accelerate.

    Returns:
        What `loss` returned. By micro-batches its loss to backpropagate has no graph any more.

    Raises:
        ValueError: BatchNorm is in training mode, or micro_batch_size is below 1.

    Example::

        model.train()
        freeze_batch_norm_(model)  # only a ResNet has some
        for batch in loader:
            result = backpropagate(
                model,
                {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"]},
                lambda images, texts, scale, bias: global_contrastive_loss(images, texts, scale),
                micro_batch_size=64,
            )
            optimizer.step()
            optimizer.zero_grad()
    """
    wrapped = model if wrapped is None else wrapped
    parts: MicroBatches = [batch] if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping) and micro_batch_size is not None:
        parts = split_batch(batch, micro_batch_size)
    if len(parts) > 1:
        return _in_parts(model, wrapped, parts, loss, accelerator)
    (part,) = parts
    outputs = wrapped(**_on(model.logit_scale.device, part))
    result = loss(outputs.image_embeds, outputs.text_embeds, *_temperature(model))
    _backward(accelerator)(result.local_loss_to_backpropagate)
    return result


def _backward(accelerator: Any) -> Callable[[Tensor], None]:
    return Tensor.backward if accelerator is None else accelerator.backward


def _in_parts(model: Any, wrapped: Any, parts: MicroBatches, loss: Loss, accelerator: Any) -> ContrastiveResult:
    """`backpropagate` for several micro-batches."""
    device, backward = model.logit_scale.device, _backward(accelerator)
    check_batch_norm_is_frozen(model)
    untrained, last = _untrained_inputs(model, next(iter(parts))), len(parts) - 1
    with without_synchronization(wrapped, accelerator):
        images, texts, sizes, states = _embed_without_graph(wrapped, parts, untrained, device)
    result, cached = _loss_gradients(model, loss, images, texts)
    del images, texts  # what is left of them beside activations is their gradient
    of_images = iter(cached[0].split([count for count, _ in sizes]))
    of_texts = iter(_in_order_of_parts(cached[1], sizes))
    of_temperature = cached[2:]
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        with nullcontext() if number == last else without_synchronization(wrapped, accelerator):
            with state.replayed():
                outputs = wrapped(**_on(device, _without(part, untrained)))
            pairs = [(outputs.image_embeds, next(of_images)), (outputs.text_embeds, next(of_texts))]
            backward(_sum_of_products([*pairs, *zip(_temperature(model), of_temperature, strict=True)]))
        # ZeRO 3 forgets the last step's gradients at the first micro-batch, so the temperature has its own there. Zeros
        # follow, since DDP waits for the gradients of all parameters at the last.
        of_temperature = [None if gradient is None else torch.zeros_like(gradient) for gradient in of_temperature]
    return result


def _in_order_of_parts(texts: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """(B + J, D), those of the pairs first → of each micro-batch its pairs' and its negative texts."""
    pairs, more = [pairs for pairs, _ in sizes], [more for _, more in sizes]
    of_pairs, of_negatives = texts[: sum(pairs)].split(pairs), texts[sum(pairs) :].split(more)
    return [torch.cat(part) if len(part[1]) else part[0] for part in zip(of_pairs, of_negatives, strict=True)]


def _embed_without_graph(
    wrapped: Any, parts: MicroBatches, untrained: set[str], device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int]], list[_RandomState]]:
    """Step 1: image and text embeddings, (B, D) and (B + J, D), those of the pairs first.

    Of each micro-batch also the numbers of its pairs and of its negative texts, and from where to embed it again.
    """
    images, texts, states = [], [], []
    with torch.no_grad():
        for part in parts:
            once: Any = wrapped(**_on(device, {name: part[name] for name in untrained})) if untrained else None
            states.append(_RandomState(device))
            again = wrapped(**_on(device, _without(part, untrained)))
            images.append((once if again.image_embeds is None else again).image_embeds)
            texts.append((once if again.text_embeds is None else again).text_embeds)
        # Within a block of autocast the weights' casts are kept, and these have no graph.
        torch.clear_autocast_cache()
        sizes = [
            (len(of_images), len(of_texts) - len(of_images)) for of_images, of_texts in zip(images, texts, strict=True)
        ]
        behind = [of_texts[pairs:] for of_texts, (pairs, more) in zip(texts, sizes, strict=True) if more]
        texts = [of_texts[:pairs] for of_texts, (pairs, _) in zip(texts, sizes, strict=True)]
        return torch.cat(images), torch.cat([*texts, *behind]), sizes, states


def _loss_gradients(model: Any, loss: Loss, images: Tensor, texts: Tensor) -> tuple[ContrastiveResult, list[Any]]:
    """Step 2: the result, and its gradients on the embeddings and on the temperature."""
    given = (images, texts, *_temperature(model))
    leaves: list[Any] = [None if tensor is None else tensor.detach().requires_grad_() for tensor in given]
    with torch.enable_grad():
        result = loss(*leaves)
    result.local_loss_to_backpropagate.backward()
    # Without its graph, which holds the embeddings.
    result = replace(result, local_loss_to_backpropagate=result.local_loss_to_backpropagate.detach())
    return result, [None if leaf is None else leaf.grad for leaf in leaves]
