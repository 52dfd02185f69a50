"""WiSE-FT over several data sets: zero-shot figures of the models between a pretrained and a fine-tuned one.

Fine-tuning makes a model better at its data and often worse at others. The averages
θ = (1 − α) · pretrained + α · fine-tuned are often better than both ends (Wortsman et al. 2022). Each α is a model of
its own: its image features and its matrix of classes are computed anew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.in_memory import load_model as load_as_ours
from ..checkpoints.whole_folder import whole_folder
from ..checkpoints.wise_ft import check_same_tensors, interpolate_weights, parse_alphas, show_alpha
from ..zero_shot.features import tokenizer_of
from ..zero_shot.pipeline import default_device
from .device import check_computes, dtype_named
from .feature_cache import processor_settings
from .grid import load_model
from .labelled_images import LabelledImages
from .zero_shot import ZeroShotResult, evaluate_zero_shot

DECIDING = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id", "contrastive_loss")
"""Fields of a configuration that decide what a model computes and do not show in the shapes of its weights."""

PREPARATION = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "fit"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Settings of an image processor that decide what the models see."""

STOCK = {"fit": "crop"}
"""Settings that stock image processors do not have, and what they do."""

SAMPLE = "2 Dogs' café, isn't it?"
"""A text with all that tokenizers of one vocabulary may treat in their own ways: capitals, digits, accents, marks."""

ONE_LAYOUT = {"clip", "hf_clip"}
"""Model types whose weights have the same names: a stock model, and a fine-tune of it that is ours."""


def _deciding(config: Any) -> dict[str, Any]:
    found = {}
    for part in ("", "text_config", "vision_config"):
        values = getattr(config, part, None) if part else config
        for name in DECIDING:
            if (value := getattr(values, name, None)) is not None:
                found[f"{part}.{name}".lstrip(".")] = value
    return found


def _first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for name in [*first, *(name for name in second if name not in first)]:
        if first.get(name) != second.get(name):
            return name, first.get(name), second.get(name)
    return None


def _preparation(processor: Any) -> dict[str, Any]:
    found = STOCK | processor_settings(processor)
    # As in a file: there a tuple is a list, and an enumeration a number.
    return json.loads(json.dumps({name: found[name] for name in PREPARATION if name in found}))


def _tokens(processor: Any) -> dict[str, Any]:
    """Return what decides the ids of texts: the ids of tokens, the order of merges, and the ids of one text."""
    tokenizer = tokenizer_of(processor)
    found = {f"the token {token!r}": place for token, place in tokenizer.get_vocab().items()}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        merges = json.loads(backend.to_str())["model"].get("merges") or []
        found |= {f"merge {place}": merge for place, merge in enumerate(merges)}
    return found | {f"the text {SAMPLE!r}": list(tokenizer(SAMPLE, truncation=True)["input_ids"])}


def _check_processors(first: Any, second: Any) -> None:
    if found := _first_difference(_preparation(first), _preparation(second)):
        raise ValueError(
            f"The models cannot be averaged, since they take images in different ways: {found[0]} of the image "
            f"processor is {found[1]!r} for the pretrained model and {found[2]!r} for the fine-tuned one. Give both "
            f"the same settings."
        )
    if found := _first_difference(_tokens(first), _tokens(second)):
        raise ValueError(
            f"The models cannot be averaged, since their tokenizers give texts different ids: {found[0]} is "
            f"{found[1]!r} for the pretrained model and {found[2]!r} for the fine-tuned one. Give both the same "
            f"tokenizer."
        )


class Interpolation:
    """The models between two models of one architecture.

    Args:
        pretrained: The model of α = 0, in float32.
        finetuned: The model of α = 1. Its weights are overwritten.
        processors: The processors of both, if they are to be compared.

    Raises:
        ValueError: The two are not of one architecture, or prepare images or texts differently.
    """

    def __init__(self, pretrained: Any, finetuned: Any, processors: tuple[Any, Any] | None = None):
        if found := _first_difference(_deciding(pretrained.config), _deciding(finetuned.config)):
            raise ValueError(
                f"The models cannot be averaged, since their architectures differ: {found[0]} is {found[1]!r} in the "
                f"pretrained model and {found[2]!r} in the fine-tuned one. Name a model and its own fine-tune."
            )
        if processors is not None:
            _check_processors(*processors)
        self.model = finetuned
        self.start, self.end = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            for model in (pretrained, finetuned)
        )
        check_same_tensors(self.start, self.end)

    def at(self, alpha: float) -> Any:
        """Return the model of an α, from 0 to 1. It is the same object each time, with other weights."""
        self.model.load_state_dict(interpolate_weights(self.start, self.end, alpha))
        return self.model

    def save(self, alpha: float, processor: Any, folder: str | Path) -> None:
        """Write the model of an α and its processor as a repository, completely or not at all.

        Raises:
            FileExistsError: The folder holds files.
        """
        weights = interpolate_weights(self.start, self.end, alpha)
        own = self.model.dtype
        # Weights of whatever dtype the model computes in are saved as they were averaged.
        self.model.to(torch.float32).load_state_dict(weights)
        try:
            with whole_folder(folder, overwrite=False) as unfinished:
                self.model.save_pretrained(unfinished)
                processor.save_pretrained(unfinished)
        finally:
            self.model.to(own)


def load_interpolation(
    pretrained: str, finetuned: str, dtype: str = "float32", device: str | None = None
) -> tuple[Interpolation, Any]:
    """Load two models, and the processor of the fine-tuned one.

    Args:
        pretrained: The model of α = 0: a folder or repository.
        finetuned: The model of α = 1.
        dtype: The dtype to compute in. The weights are averaged in float32.
        device: See `grid.load_model`.

    Returns:
        The models between the two, and the processor.

    Raises:
        ValueError: The two are not of one architecture, or prepare images or texts differently.
        OSError: A model is not there, or cannot be read.
    """
    kind = dtype_named(dtype)
    check_computes(device)
    loaded = [load_model(name, device="cpu") for name in (pretrained, finetuned)]
    if {str(model.config.model_type) for model, _ in loaded} == ONE_LAYOUT:
        loaded = [load_as_ours(name) for name in (pretrained, finetuned)]
    (first, other), (second, processor) = loaded
    found = Interpolation(first, second, (other, processor))
    found.model.to(device or default_device(), kind)
    return found, processor


@dataclass
class InterpolationResult:
    """Figures of the models between two, on one or several data sets.

    Attributes:
        alphas: The values of α: 0 is the pretrained model, 1 the fine-tuned one.
        curves: For each data set its figure at each α, as a fraction from 0 to 1.
        metrics: For each data set the metric that this is.
        results: For each data set the whole results, if they are there.
    """

    alphas: list[float]
    curves: dict[str, list[float]]
    metrics: dict[str, str]
    results: dict[str, list[ZeroShotResult]] = field(default_factory=dict)

    @property
    def mean(self) -> list[float]:
        """The mean over the data sets at each α."""
        return [sum(column) / len(column) for column in zip(*self.curves.values(), strict=True)]

    @property
    def best(self) -> float:
        """The α with the highest mean, the smallest of several."""
        mean = self.mean
        return self.alphas[mean.index(max(mean))]

    @classmethod
    def of_records(cls, records: Iterable[dict[str, Any]], alphas: Mapping[str, float]) -> "InterpolationResult | None":
        """Collect the figures of records, see `reports`. A data set without a figure at every α is left out.

        Args:
            records: Those of all models on all data sets.
            alphas: The α of each model, by the model's name in its records.

        Returns:
            The figures. None if no data set is left.
        """
        values: dict[str, dict[float, float]] = {}
        metrics: dict[str, str] = {}
        for record in records:
            metric = metrics.setdefault(record["dataset"], record["metric"])
            values.setdefault(record["dataset"], {})[alphas[record["pretrained"]]] = record["metrics"][metric]
        order = sorted(alphas.values())
        curves = {name: [row[alpha] for alpha in order] for name, row in values.items() if len(row) == len(order)}
        return cls(order, curves, metrics) if curves else None

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Make header and rows of a table: a row for each α, and a column for each data set and for their mean."""
        curves = dict(self.curves) if len(self.curves) == 1 else self.curves | {"mean": self.mean}
        body = [
            [show_alpha(alpha), *(f"{100 * curve[place]:.1f} %" for curve in curves.values())]
            for place, alpha in enumerate(self.alphas)
        ]
        return ["alpha", *curves], body


def _name_of(source: Any, place: int) -> str:
    if isinstance(source, LabelledImages):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else f"data set {place}"


def evaluate_interpolation(
    pretrained: Any,
    finetuned: Any,
    processor: Any,
    datasets: Sequence[Any],
    *,
    alphas: str | Sequence[float] = "0:1:0.1",
    **options: Any,
) -> InterpolationResult:
    """Measure zero-shot classification by the models between a pretrained and a fine-tuned one.

    Args:
        pretrained: The model before fine-tuning, in float32.
        finetuned: The model after it. It is unchanged afterwards.
        processor: Their processor.
        datasets: Whatever `evaluate_zero_shot` takes, one or several.
        alphas: A list, or a text such as "0:1:0.1", "0.3,0.5" or "0.5".
        **options: Arguments of `evaluate_zero_shot`.

    Returns:
        The result.

    Raises:
        ValueError: The models are not of one architecture, an α is not between 0 and 1, or a data set cannot be used.

    Example::

        result = evaluate_interpolation(pretrained, finetuned, processor, ["flowers/", "cars/"])
        print(result.best, result.mean)
    """
    chosen = parse_alphas(alphas if isinstance(alphas, str) else ",".join(map(str, alphas)))
    names = [_name_of(source, place) for place, source in enumerate(datasets)]
    if len({*names}) < len(names):
        raise ValueError(f"A data set is named twice: {', '.join(names)}. Name each once.")
    models = Interpolation(pretrained, finetuned)
    results: dict[str, list[ZeroShotResult]] = {name: [] for name in names}
    try:
        for alpha in chosen:
            model = models.at(alpha)
            for name, source in zip(names, datasets, strict=True):
                results[name].append(evaluate_zero_shot(model, processor, source, **options))
    finally:
        models.at(1)
    curves = {name: [result.value for result in found] for name, found in results.items()}
    return InterpolationResult(chosen, curves, {name: found[0].metric for name, found in results.items()}, results)
