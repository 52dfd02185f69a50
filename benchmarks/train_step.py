"""How fast a training step is: both towers, the loss, backward, AdamW, beside transformers' example and open_clip.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --precision bf16 --rounds 5

All models are ViT-B/32 with the same weights and pairs; one step of each in turn, round after round, and medians over
the rounds. Captions have about 12 tokens. Each project pads them as it does by itself: hf_clip's collator to a multiple
of 8 beyond the longest, the loop of transformers' contrastive-image-text example and open_clip to 77. All take
torch's fused AdamW. Before anything is timed, the losses of the first step must agree. Peak memory is that of a
process of its own which makes three steps.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from conversion.parity import random_texts
from conversion.reference import load_open_clip_module
from hf_clip import HfClipConfig, HfClipModel
from hf_clip.original.keys import original_names
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.optim import clamp_logit_scale_, create_optimizer

from .in_turn import OURS, at_least_one, print_rates, rates_in_turn

VARIANT = "ViT-B/32"
TOKENS = 12
CONTEXT = 77
STOCK, OPEN_CLIP = "transformers", "open_clip"
TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}

Step = Callable[[], float]


def make_batch(pairs: int) -> dict[str, Tensor]:
    lengths = tuple(TOKENS - 2 + index % 5 for index in range(pairs))
    images = torch.randn(pairs, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return {"pixel_values": images, "input_ids": random_texts(lengths, 49408, CONTEXT)}


def step_of_ours(batch: dict[str, Tensor], precision: str) -> Step:
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig.from_variant(VARIANT)).train()
    optimizer = create_optimizer(model)
    longest = int((batch["input_ids"] == 49407).int().argmax(dim=1).max()) + 1
    ids = batch["input_ids"][:, : -(-longest // 8) * 8]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(pixel_values=batch["pixel_values"], input_ids=ids)
        result = global_contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
        result.local_loss_to_backpropagate.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)
        return result.global_loss.item()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)


def step_of_stock(batch: dict[str, Tensor], precision: str) -> Step:
    torch.manual_seed(0)
    config = HfClipConfig.from_variant(VARIANT)
    weights = HfClipModel(config).state_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(**config.to_dict())).train()
    model.load_state_dict(weights)
    optimizer = adamw(model)
    mask = (batch["input_ids"] != 0).long()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch, attention_mask=mask, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def step_of_open_clip(batch: dict[str, Tensor], precision: str) -> Step:
    module, losses = load_open_clip_module("model"), load_open_clip_module("loss")
    assert module is not None
    assert losses is not None
    torch.manual_seed(0)
    config = HfClipConfig.from_variant(VARIANT)
    weights = original_names(HfClipModel(config).state_dict(), config)
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    model = module.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text, quick_gelu=True).train()
    model.load_state_dict(weights)
    criterion, optimizer = losses.ClipLoss(), adamw(model)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(*model(batch["pixel_values"], batch["input_ids"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


BUILDERS = {OURS: step_of_ours, STOCK: step_of_stock, OPEN_CLIP: step_of_open_clip}


def peak_memory(name: str, pairs: int, precision: str) -> float:
    """Gigabytes that a process of its own takes at most."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--batch", str(pairs), "--precision", precision]
    done = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=at_least_one, default=64, help="pairs in a step (default 64)")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="float32", help="bf16: autocast")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds over all implementations (default 5)")
    parser.add_argument("--memory-of", choices=sorted(BUILDERS), help="only make three steps of one, print gigabytes")
    options = parser.parse_args(arguments)
    batch = make_batch(options.batch)
    if options.memory_of:
        step = BUILDERS[options.memory_of](batch, options.precision)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return 0
    names = [name for name in BUILDERS if name != OPEN_CLIP or load_open_clip_module("model") is not None]
    if OPEN_CLIP not in names:
        print("open_clip is left out: it is not installed (pip install --no-deps open_clip_torch)")
    # Before this process is large: a child's peak begins with what its parent has when it starts it.
    memory = {name: peak_memory(name, options.batch, options.precision) for name in names}
    steps = {name: BUILDERS[name](batch, options.precision) for name in names}
    first = {name: step() for name, step in steps.items()}
    for name, loss in first.items():
        if abs(loss - first[OURS]) > TOLERANCE[options.precision] * first[OURS]:
            raise AssertionError(f"{name} computes another loss: {loss} instead of {first[OURS]}")
    print(
        f"{VARIANT}, batch {options.batch}, {options.precision}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    )
    print_rates("training step, pairs", rates_in_turn(steps, dict.fromkeys(steps, options.batch), options.rounds))
    print("\npeak memory of a process")
    for name, gigabytes in memory.items():
        print(f"{name:16}{gigabytes:6.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
