"""Two processes, on one GPU or on two: what NCCL and gloo do, the loss over both, DDP, and BatchNorm over both."""

import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_clip.training.gathering import process_index, world_size
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.trainable import synchronize_batch_norm_

from .models import gradients_of, relative_error, worst_gradient
from .place import MARK, PAIRS, Place
from .training import contrast, inputs_of


def connect(backend: str, seconds: float = 60.0) -> None:
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))


def part_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's pairs: the first process has a third."""
    count = len(batch["pixel_values"])
    first = count // 3
    bounds = (0, first) if process_index() == 0 else (first, count)
    return {name: tensor[slice(*bounds)] for name, tensor in batch.items()}


def nccl_on_one_gpu(place: Place) -> None:
    """NCCL takes no two processes on one GPU. It has to say so, and not to hang."""
    try:
        connect("nccl", 30.0)
        number = torch.ones(1, device=place.device)
        dist.all_reduce(number)
        torch.cuda.synchronize()
        place.say("NCCL, two processes on one GPU", state="measured", note="it works here")
    except Exception as error:
        text = " ".join(str(error).split())
        if os.environ["RANK"] == "0":
            row = {"what": "NCCL, two processes on one GPU", "is_so": True, "note": f"refused: {text[:90]}"}
            print(MARK + json.dumps(row), flush=True)
        os._exit(0)  # its threads may wait for the other process


def two_processes(place: Place) -> None:
    """The loss and its gradients over two processes, uneven ones too; DDP by micro-batches; BatchNorm over both."""
    of_own = place.kind == "cuda" and torch.cuda.device_count() >= 2
    connect("nccl" if of_own else "gloo")
    _loss_of_two(place, is_ring_possible=of_own or place.kind == "cpu")
    _ddp(place)
    _batch_norm(place)
    dist.barrier()
    dist.destroy_process_group()


def _features(pairs: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(pairs, 32, generator=generator) for _ in range(2)]
    features = [nn.functional.normalize(part, dim=-1).to(device) for part in features]
    ids = torch.arange(pairs, device=device) // 2
    return {"pixel_values": features[0], "texts": features[1], "ids": ids}


def _loss_of_two(place: Place, is_ring_possible: bool) -> None:
    whole = _features(30, place.device)
    images, texts = (whole[name].double().requires_grad_() for name in ("pixel_values", "texts"))
    scale = torch.tensor(2.0, device=place.device, dtype=torch.float64, requires_grad=True)
    own = torch.eye(len(images), dtype=torch.bool, device=place.device)
    left_out = (whole["ids"][:, None] == whole["ids"]) & ~own
    logits = (scale.exp() * images @ texts.T).masked_fill(left_out, -torch.inf)
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    expected.backward()
    wanted = {"pixel_values": images.grad, "texts": texts.grad}
    for ring in (False, True) if is_ring_possible else (False,):
        local = part_of(whole)
        leaves = {name: local[name].clone().requires_grad_() for name in wanted}
        own_scale = torch.tensor(2.0, device=place.device, requires_grad=True)
        result = global_contrastive_loss(
            leaves["pixel_values"], leaves["texts"], own_scale, local_text_ids=local["ids"], ring=ring
        )
        result.local_loss_to_backpropagate.backward()
        assert own_scale.grad is not None
        assert scale.grad is not None
        dist.all_reduce(own_scale.grad)
        errors = [relative_error(result.global_loss, expected), relative_error(own_scale.grad / 2, scale.grad)]
        parts = part_of({name: gradient for name, gradient in wanted.items() if gradient is not None})
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            errors.append(relative_error(leaf.grad / 2, parts[name]))
        worst = torch.tensor(max(errors), device=place.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        how = f"{dist.get_backend()}{', ring' if ring else ''}"
        place.check(f"loss over two processes, {how}", worst.item(), 1e-5)


def _ddp(place: Place) -> None:
    model, batch = place.model_and_batch("ViT-B/32", PAIRS)
    given = inputs_of(batch)
    assert world_size() == 2
    local, size = part_of(given), 3  # so that one process has more micro-batches than the other
    devices = [torch.device(place.device)] if place.kind == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model.train(), device_ids=devices)
    backpropagate(model, local, contrast, micro_batch_size=size, wrapped=wrapped)
    found = gradients_of(model)
    result = _whole_batch_gradients(place, given)
    error, where = worst_gradient(found, result)
    place.check("DDP by micro-batches beside one process", error, 1e-4, f"{where}, {dist.get_backend()}")


def _whole_batch_gradients(place: Place, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As one process would have them: the loss as it is written down."""
    model, _ = place.model_and_batch("ViT-B/32", 2)
    outputs = model.train()(**given)
    logits = model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.T
    own = torch.arange(len(logits), device=logits.device)
    loss = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    loss.backward()
    return gradients_of(model)


def _batch_norm(place: Place) -> None:
    model, batch = place.model_and_batch("RN50", PAIRS)
    if place.kind == "cpu":
        try:
            synchronize_batch_norm_(model, "cpu")
        except ValueError as refused:
            text = str(refused)
            place.expect("synchronised BatchNorm is refused on a CPU", "between GPUs" in text, text[:60])
        return
    plain, _ = place.model_and_batch("RN50", 2)
    plain.train().encode_image(batch["pixel_values"])
    synchronize_batch_norm_(model, "cuda")
    local = part_of(inputs_of(batch))
    model.train().encode_image(local["pixel_values"])
    ours, theirs = (dict(each.vision_model.bn1.named_buffers()) for each in (model, plain))
    error = max(relative_error(ours[name], theirs[name]) for name in ("running_mean", "running_var"))
    place.check("statistics of BatchNorm over two processes", error, 1e-4)
    refusal = ""
    try:
        backpropagate(model, local, contrast, micro_batch_size=2)
    except ValueError as refused:
        refusal = str(refused)
    place.expect("BatchNorm in training mode is refused with micro-batches", "BatchNorm" in refusal)
