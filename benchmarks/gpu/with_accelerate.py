"""Training steps as `hf-clip finetune` takes them: micro-batches that fit, float16, FSDP2, resumed runs."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_clip import HfClipModel
from hf_clip.training import sharding
from hf_clip.training.config import TrainingConfig
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.learner import Learner
from hf_clip.training.micro_batch_size import does_fit, settle_micro_batch_size
from hf_clip.training.optim import create_optimizer
from hf_clip.training.patch_dropout import drop_patches_
from hf_clip.training.states import load_states, save_states

from .models import caption_lengths, gradients_of, make_batch, relative_error, variant_of, worst_gradient
from .place import PAIRS, Place
from .training import contrast, inputs_of
from .two_processes import connect

ROOM = 6 * 2**30
"""Bytes that the search for the largest micro-batch may take."""


def options(**changes: Any) -> TrainingConfig:
    chosen: dict[str, Any] = {"model": "none", "dataset": ["none"], "output_dir": "none", "max_steps": 9}
    return TrainingConfig(**(chosen | {"learning_rate": "1e-4"} | changes))


def learner_of(place: Place, accelerator: Any, model: HfClipModel, config: TrainingConfig) -> Learner:
    assert config.learning_rate is not None
    optimizer = create_optimizer(model, rates=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer, config)
    wrapped.train()
    processor: Any = None
    return Learner(accelerator, wrapped, model, processor, optimizer, scheduler)


def step(learner: Learner, batch: Any, size: int | None) -> float:
    """One optimizer step, as the program takes it. Returns the loss."""
    accelerator = learner.accelerator
    result = backpropagate(
        learner.model, batch, contrast, micro_batch_size=size, wrapped=learner.wrapped, accelerator=accelerator
    )
    sharding.average_left_out_gradients(accelerator, learner.model)
    accelerator.clip_grad_norm_(learner.wrapped.parameters(), 1.0)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        learner.scheduler.step()
    sharding.clamp_temperature_(accelerator, learner.model)
    return result.global_loss.item()


def make_accelerator(place: Place, precision: str, **more: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(mixed_precision=precision, cpu=place.kind == "cpu", **more)


def micro_batch_size(place: Place) -> None:
    """`--micro_batch_size auto`: what it finds fits with the optimizer's states, and twice as much does not."""
    accelerator = make_accelerator(place, "bf16")
    model, _ = place.model_and_batch("ViT-B/32", 2, is_tiny=False)
    largest = 8 if place.is_dry else 8192
    config = options(per_device_train_batch_size=largest, micro_batch_size="auto")
    learner = learner_of(place, accelerator, model, config)
    if place.kind == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + ROOM) / total))
    before = torch.get_rng_state()
    settle_micro_batch_size(config, learner)
    size = config.pairs_at_once
    assert size is not None
    place.expect("auto leaves the random state", torch.equal(before, torch.get_rng_state()), config.notes[-1])
    place.expect("auto leaves no gradients", all(p.grad is None for p in model.parameters()))
    if place.kind == "cuda":
        place.expect("auto found a part of the batch", 1 <= size < largest, f"{size} of {largest}")
    else:
        place.expect("what is tried fits", does_fit(learner, 2, 1024))
    variant = variant_of("ViT-B/32", place.is_dry)
    batch = inputs_of(make_batch(variant, 2 * size, caption_lengths(2 * size), "cpu"))
    losses = [step(learner, batch, size) for _ in range(2)]
    place.expect("two steps of what was found", all(loss == loss for loss in losses), f"losses {losses}")


def fp16(place: Place) -> None:
    """float16 with a gradient scaler, by micro-batches: it learns, and beside float32 its gradients agree."""
    if place.kind == "cpu":
        place.say("float16 with a scaler", state="left out", note="a scaler is for a GPU")
        return
    accelerator = make_accelerator(place, "fp16")
    model, batch = place.model_and_batch("ViT-B/32", 32)
    exact, _ = place.model_and_batch("ViT-B/32", 2)
    given = inputs_of(batch)
    learner = learner_of(place, accelerator, model, options())
    backpropagate(exact.train(), given, contrast)
    scale = accelerator.scaler.get_scale()
    backpropagate(model, given, contrast, micro_batch_size=8, wrapped=learner.wrapped, accelerator=accelerator)
    found = {name: gradient / scale for name, gradient in gradients_of(model).items()}
    error, where = worst_gradient(found, gradients_of(exact))
    place.check("float16, scaled gradients beside float32", error, 5e-2, f"{where}, scale {scale:g}")
    losses = [step(learner, given, 8) for _ in range(20)]
    place.check("float16, last of twenty losses by the first", losses[-1] / losses[0], 0.98)
    place.expect("float16, the scale stays a number", 0 < accelerator.scaler.get_scale() < 2.0**30)


def fsdp2(place: Place) -> None:
    """FSDP2 over one process: three steps by micro-batches end at the weights of three plain steps; then resumed."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    if place.kind == "cpu":
        accelerator = make_accelerator(place, "no")
        if not dist.is_initialized():
            connect("gloo")
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    else:
        accelerator = make_accelerator(place, "no", fsdp_plugin=plugin)
    place.expect("accelerate shards with one process", sharding.is_fsdp2(accelerator))
    sharding.check_wrapper(accelerator, options())
    model, batch = place.model_and_batch("ViT-B/32", PAIRS)
    given = inputs_of(batch)
    learner = learner_of(place, accelerator, model, options())
    for _ in range(3):
        step(learner, given, 4)
    plain, _ = place.model_and_batch("ViT-B/32", 2)
    optimizer = create_optimizer(plain.train(), rates="1e-4")
    for _ in range(3):
        backpropagate(plain, given, contrast)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found, expected = learner.weights(), plain.state_dict()
    moved = {name: tensor.to(place.device) for name, tensor in found.items()}
    error = max(relative_error(moved[name], tensor) for name, tensor in expected.items() if tensor.norm() > 0)
    place.check("FSDP2 over one process beside plain steps: weights", error, 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        save_states(learner, Path(folder))
        after = step(learner, given, 4)
        load_states(learner, Path(folder), 1)
        again = step(learner, given, 4)
    place.check("FSDP2, a step again from its checkpoint", abs(after - again) / after, 1e-6)
    dist.destroy_process_group()


def compute_alike() -> None:
    """Let all that follows give the same bits each time. The fused backward of attention adds up in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for choose in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        choose(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def resume(place: Place) -> None:
    """From a checkpoint a run goes on as it would have, bit for bit: weights, AdamW, random numbers on the GPU."""
    compute_alike()
    accelerator = make_accelerator(place, "bf16")
    model, batch = place.model_and_batch("ViT-B/32", 16)
    drop_patches_(model, 0.5)
    given, config = inputs_of(batch), options()
    learner = learner_of(place, accelerator, model, config)
    for _ in range(2):
        step(learner, given, 8)
    with tempfile.TemporaryDirectory() as folder:
        save_states(learner, Path(folder))
        runs = []
        for _ in range(2):
            losses = [step(learner, given, 8) for _ in range(3)]
            runs.append((losses, learner.weights()))
            load_states(learner, Path(folder), 1)
        other, _ = place.model_and_batch("ViT-B/32", 2)
        drop_patches_(other, 0.5)
        fresh = learner_of(place, accelerator, other, config)
        load_states(fresh, Path(folder), 1)
        runs.append(([step(fresh, given, 8) for _ in range(3)], fresh.weights()))
    for what, (losses, weights) in zip(("gone back", "resumed"), runs[1:], strict=True):
        differing = [name for name, tensor in weights.items() if not torch.equal(tensor, runs[0][1][name])]
        is_same = losses == runs[0][0] and not differing
        note = f"losses {losses[-1]:.6f} and {runs[0][0][-1]:.6f}; other weights: {len(differing)}"
        place.expect(f"a run that has {what} has the same bits", is_same, note)


def program(place: Place) -> None:
    """`hf-clip finetune` itself, resumed in the middle: the same weights as without."""
    try:
        import datasets
    except ImportError:
        place.say("hf-clip finetune", state="left out", note="datasets is not installed: pip install datasets")
        return
    from safetensors.torch import load_file

    from hf_clip.commands.finetune import main

    from .images import jpeg, make_processor

    compute_alike()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, _ = place.model_and_batch("ViT-B/32", 2)
        model.save_pretrained(folder / "model")
        make_processor(model.config.vision_config.image_size).save_pretrained(folder / "model")
        rows = {"image": [jpeg(seed) for seed in range(40)], "caption": [f"photo number {seed}" for seed in range(40)]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "pairs"))
        words = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs"), "--learning_rate", "1e-4"]
        words += ["--per_device_train_batch_size", "8", "--micro_batch_size", "auto", "--augment_on", "device"]
        words += ["--validation", "8", "--ema_decay", "0.9"]
        words += ["--dataloader_num_workers", "1", "--save_steps", "2", "--max_steps"]
        out = ["--output_dir", str(folder / "whole")]
        status = _alone(partial(main, [*words, "4", *out]))
        latest = folder / "whole" / "checkpoints" / "step-00000002"
        place.expect("hf-clip finetune", status == 0 and latest.is_dir(), f"exit status {status}")
        expected = load_file(folder / "whole" / "model.safetensors")
        (folder / "whole" / "model.safetensors").unlink()
        status = _alone(partial(main, [*words, "4", *out, "--resume_from_checkpoint", str(latest)]))
        found = load_file(folder / "whole" / "model.safetensors")
        differing = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
        place.expect(
            "hf-clip finetune, resumed: the same bits", status == 0 and not differing, f"differ: {len(differing)}"
        )


def _alone(run: Callable[[], int]) -> int:
    """A run with accelerate's states as in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return run()
