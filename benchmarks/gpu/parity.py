"""The nine models on the GPU beside OpenAI's code, in every precision; gradients; autocast.

The truth is OpenAI's code in float64 on the same GPU. Ours may be twice as far from it as OpenAI's own in the same
precision is, or as far as the least that the precision explains.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_clip import VARIANTS
from hf_clip.checkpoints.keys import convert_names
from hf_clip.training.losses import global_contrastive_loss

from ..measuring import PRECISIONS, first_line, worst_error
from ..peers import Batch
from .models import Implementations, caption_lengths, gradients_of, make_batch, variant_of, worst_gradient
from .report import LEFT_OUT, Setup

FLOOR = {"float32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}
GRADIENT_FLOOR = 1e-4
LENGTHS = (3, 9, 20, 77)
PAIRS = 6
OF_EACH_KIND = ("RN50", "ViT-B/32")
KINDS = ("image", "text")


def exact_features(found: Implementations, batch: Batch) -> dict[str, Tensor]:
    model = found.exact()
    with torch.inference_mode():
        return {
            "image": model.encode_image(batch["pixel_values"].double()),
            "text": model.encode_text(batch["padded"]),
        }


def features(setup: Setup) -> None:
    """All nine, in all precisions."""
    for name in setup.choose(tuple(VARIANTS), OF_EACH_KIND):
        variant = variant_of(name, setup.is_dry)
        if not setup.report.has_time(f"{name}, features", 5.0):
            continue
        found = Implementations(variant, setup.device)
        batch = make_batch(variant, 2, LENGTHS, setup.device)
        truth = exact_features(found, batch)
        for precision in PRECISIONS:
            errors = {}
            for who, model in (("ours", found.ours(precision)), ("theirs", found.openai(precision))):
                for kind in KINDS:
                    errors[who, kind] = worst_error(found.encoder(model, kind, precision)(batch), truth[kind])
                del model
            worst = max(
                KINDS, key=lambda kind: errors["ours", kind] / max(FLOOR[precision], 2 * errors["theirs", kind])
            )
            theirs = errors["theirs", worst]
            if not math.isfinite(theirs):  # random weights may exceed what float16 holds
                setup.report.add(
                    f"{name}, {precision}", LEFT_OUT, note="OpenAI's code has features that are no numbers"
                )
                continue
            setup.report.check(
                f"{name}, {precision}, {worst} features",
                errors["ours", worst],
                max(FLOOR[precision], 2 * theirs),
                f"OpenAI's code {theirs:.1e}",
            )


def autocast(setup: Setup) -> None:
    """A float32 model within autocast, as in training."""
    for name in OF_EACH_KIND:
        variant = variant_of(name, setup.is_dry)
        found = Implementations(variant, setup.device)
        batch = make_batch(variant, 2, LENGTHS, setup.device)
        truth, model = exact_features(found, batch), found.ours()
        for precision in ("bf16", "fp16"):
            theirs = found.openai(precision)
            for kind in KINDS:
                with torch.autocast(setup.device, PRECISIONS[precision]):
                    error = worst_error(found.encoder(model, kind, "float32")(batch), truth[kind])
                allowed = 2 * worst_error(found.encoder(theirs, kind, precision)(batch), truth[kind])
                setup.report.check(f"{name}, autocast to {precision}, {kind}", error, max(FLOOR[precision], allowed))


def gradients(setup: Setup) -> None:
    """Of every parameter, in float32, through the contrastive loss: first of a model of each kind."""
    others = setup.choose(tuple(name for name in VARIANTS if name not in OF_EACH_KIND), ())
    for name in (*OF_EACH_KIND, *others):
        if name in others and not setup.report.has_time(f"{name}, gradients", 8.0):
            continue
        try:
            gradients_beside_openai(setup, name)
        except torch.OutOfMemoryError as error:
            setup.report.add(f"{name}, gradients", LEFT_OUT, note=first_line(error))


def gradients_beside_openai(setup: Setup, name: str) -> None:
    variant = variant_of(name, setup.is_dry)
    found = Implementations(variant, setup.device)
    batch = make_batch(variant, PAIRS, caption_lengths(PAIRS), setup.device)
    pixels, own = batch["pixel_values"], torch.arange(PAIRS, device=setup.device)

    def of_openai(model: torch.nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        images, texts = model(pixels, batch["padded"])
        ((cross_entropy(images, own) + cross_entropy(texts, own)) / 2).backward()
        grads = gradients_of(model)
        state = {key: grads.get(key, torch.zeros_like(value)) for key, value in model.state_dict().items()}
        return convert_names(state, found.config)

    model = found.ours()
    outputs = model(pixel_values=pixels, input_ids=batch["input_ids"])
    result = global_contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
    result.local_loss_to_backpropagate.backward()
    ours = gradients_of(model)
    exact = of_openai(found.exact(), pixels.double())
    exact = {key: exact[key] for key in ours}
    theirs, _ = worst_gradient(of_openai(found.openai(), pixels), exact)
    error, where = worst_gradient(ours, exact)
    setup.report.check(
        f"{name}, float32, worst gradient of a parameter",
        error,
        max(GRADIENT_FLOOR, 2 * theirs),
        f"{where}; OpenAI's code {theirs:.1e}",
    )


PARTS = ((features, 20.0), (autocast, 5.0), (gradients, 10.0))
"""Each with the seconds that it may take on a GPU."""
