"""Linear probes: a linear classifier on frozen features, measured the way the paper or another program does it.

Dimensions: I images, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..zero_shot.progress import progress_bar
from .class_metrics import Reliability
from .feature_file import read_features
from .few_shot import FewShotFigures, check_shots, few_shot_figures, hold_out
from .probe_encoding import encode_splits
from .probe_protocols import LinearHead, Protocol, find_protocol, parametric_search
from .split_features import ProbeFeatures, SplitFeatures
from .zero_shot import ClassFigures, check_metric, multi_label_figures, single_label_figures

PREFIX = "lp_"
"""What CLIP_benchmark writes before the names of metrics."""

HELD_OUT = 0.2
"""The part of train that `paper` holds out where there is no validation split."""


@dataclass
class LinearProbeResult:
    """What a linear probe gave.

    Attributes:
        metrics: Those of `zero_shot.METRICS` that there are, as fractions from 0 to 1.
        metric: The one that the data set is reported by.
        count: Number of images of test.
        labels: The K classes.
        protocol: How the probe was fitted, in words.
        protocol_name: "paper", "openai" or "clip_benchmark".
        precision: The dtype that the model computed in.
        processor: The image processor's settings.
        split: The split that is measured.
        unreadable: Images of all splits that cannot be opened, which are left out, each with its reason.
        strength: The strength of regularisation that was taken: λ, C or a weight decay.
        tried: The strengths that were tried, in order, and the metric of each on the validation split.
        few_shot: Figures of few-shot probes.
        per_class: Figures of each class; empty if an image may have several.
        confusion: (K, K) int64; row i, column j: images of class i taken for class j. None as above.
        reliability: Confidence and accuracy by bins. None as above.
        architecture: One of OpenAI's architectures, or the model type. Empty if it isn't known.
    """

    metrics: dict[str, float]
    metric: str
    count: int
    labels: list[str]
    protocol: str
    protocol_name: str
    precision: str
    processor: dict[str, Any]
    split: str = ""
    unreadable: list[str] = field(default_factory=list)
    strength: float = 0.0
    tried: list[tuple[float, float]] = field(default_factory=list)
    few_shot: list[FewShotFigures] = field(default_factory=list)
    per_class: list[ClassFigures] = field(default_factory=list)
    confusion: Tensor | None = None
    reliability: Reliability | None = None
    architecture: str = ""

    @property
    def value(self) -> float:
        """The metric that the data set is reported by."""
        return self.metrics[self.metric]


@dataclass(frozen=True)
class _Fitted:
    """A probe.   strength: of its regularisation   tried: strengths and their figures on the validation split"""

    head: LinearHead
    strength: float
    tried: list[tuple[float, float]]


def _fit(
    protocol: Protocol,
    classes: int,
    train: SplitFeatures,
    validation: SplitFeatures | None,
    score: Callable[[Tensor, SplitFeatures], float],
    *,
    refit: bool,
) -> _Fitted:
    """Fit a probe.   score: figure of logits (I, K) and a split   refit: to train and validation, after the search"""
    strength, tried = protocol.unsearched, []
    if protocol.strengths and validation is not None:
        seen = protocol.features_of(validation)

        def score_of(place: int) -> float:
            head = protocol.fit(protocol.features_of(train), train.labels, classes, protocol.strengths[place])
            return score(head.logits(seen), validation)

        best, scores = parametric_search(score_of, len(protocol.strengths))
        strength, tried = protocol.strengths[best], [(protocol.strengths[n], found) for n, found in scores.items()]
        train = train.join(validation) if refit else train
    return _Fitted(protocol.fit(protocol.features_of(train), train.labels, classes, strength), strength, tried)


def _figures(logits: Tensor, split: SplitFeatures, names: list[str]) -> dict[str, Any]:
    """Compute all figures, as fields of a result."""
    if split.labels.ndim == 2:
        return {"metrics": multi_label_figures(logits, split.labels)}
    return single_label_figures(logits, logits.softmax(-1), split.labels, names)


def _prepared(features: ProbeFeatures, protocol: Protocol, part: float | None, seed: int) -> tuple[ProbeFeatures, str]:
    """Return the features with what the regularisation is chosen on, and how that came about, in words."""
    if features.is_multi_label and not protocol.has_multi_label:
        raise ValueError(
            f"{features.dataset}: an image may have several classes, which the protocol {protocol.name} cannot fit; "
            f"take paper or openai, which fit a classifier for each class."
        )
    if part is not None and features.validation is not None:
        raise ValueError(
            f"{features.dataset} has a validation split, so nothing is to be held out of train: leave "
            f"--validation-part out."
        )
    if part is not None and not protocol.strengths:
        raise ValueError(
            f"The protocol {protocol.name} has a fixed strength of regularisation, so nothing is to be held out: leave "
            f"--validation-part out."
        )
    if features.validation is not None:
        return features, features.validation.name or "validation"
    if part is None and protocol.holds_out:
        part = HELD_OUT
    if part is None:
        return features, ""
    train, held = hold_out(features.train, part, seed)
    by = "" if features.is_multi_label else " of each class"
    return replace(features, train=train, validation=held), f"{part:.0%}{by} of train, held out with seed {seed}"


def _words(features: ProbeFeatures, protocol: Protocol, fitted: _Fitted, validation: str) -> str:
    """Say how a probe was fitted."""
    words = [f"linear probe, {protocol.name}: {protocol.features_are(features)}", protocol.solver]
    if features.is_multi_label:
        words.append("a classifier for each class")
    if fitted.tried:
        words += [
            f"{protocol.strength} = {fitted.strength:.3g} by search on {validation}",
            "then fitted to train and validation",
        ]
    else:
        words.append(f"{protocol.strength} = {fitted.strength:.3g}")
    return ", ".join(words)


def _few_shot_words(
    features: ProbeFeatures, protocol: Protocol, validation: str, seeds: Sequence[int], with_lp_plus_plus: bool
) -> str:
    """Say how few-shot probes were fitted."""
    text = f"; few-shot: mean and standard deviation of {len(seeds)} draws, seeds {seeds[0]} to {seeds[-1]}"
    few = f"as many images of each class of {validation}"
    if protocol.strengths and validation:
        text += f", {protocol.strength} by search on {few if protocol.is_few_shot_validation else validation}"
    if with_lp_plus_plus:
        text += f"; LP++ with {features.prompts or 'the texts as they are'}, "
        text += f"step chosen on {few}" if validation else "last step"
    return text


def probe_features(
    features: ProbeFeatures | str | Path,
    *,
    protocol: str = "paper",
    metric: str | None = None,
    validation_part: float | None = None,
    few_shot: Sequence[int] = (),
    draws: int = 5,
    lp_plus_plus: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> LinearProbeResult:
    """Fit and measure a linear probe on features alone.

    Args:
        features: What `encode_splits` gave, or a file of it, see `feature_file`.
        protocol: "paper", "openai" or "clip_benchmark", see `probe_protocols`.
        metric: The metric that the data set is reported by, and that the regularisation is chosen by. None: acc1, or
            mean_average_precision.
        validation_part: The part of each class of train to hold out where there is no validation split. None: 0.2 for
            `paper`, and nothing for the others.
        few_shot: Numbers of images of each class, for each of which probes are fitted beside the one of all images.
        draws: Number of draws of these images. Their seeds are `seed` and those after it.
        lp_plus_plus: Whether to fit LP++ to the same images.
        seed: Seed of the part that is held out, of AdamW, and of the first draw.
        device: Where `clip_benchmark` computes.
        progress: Whether to show a progress bar.

    Returns:
        The result.

    Raises:
        ValueError: The features are empty, not finite or of one class, a class has too few images, or the metric or
            protocol does not fit the data.
        FileNotFoundError: There is no such file.
    """
    require("A linear probe", "eval", ["sklearn"])
    chosen = find_protocol(protocol, seed=seed, device=device)
    given = features if isinstance(features, ProbeFeatures) else read_features(features)
    found, validation = _prepared(given, chosen, validation_part, seed)
    check_shots(found, few_shot, draws, lp_plus_plus)
    names, seeds = found.class_names, range(seed, seed + draws)
    metric = metric.removeprefix(PREFIX) if metric else None
    fallback = "mean_average_precision" if found.is_multi_label else "acc1"

    def score(logits: Tensor, split: SplitFeatures) -> float:
        metrics = _figures(logits, split, names)["metrics"]
        return metrics[check_metric(metric, metrics) or fallback]

    def probe(train: SplitFeatures, held: SplitFeatures | None) -> Callable[[SplitFeatures], Tensor]:
        head = _fit(chosen, len(names), train, held, score, refit=False).head
        return lambda split: head.logits(chosen.features_of(split))

    with torch.no_grad(), progress_bar("Fitting", "probe", 1 + len(few_shot) * draws, progress) as update:
        # A metric that there isn't is said before anything is fitted.
        score(torch.zeros(len(found.test), len(names)), found.test)
        fitted = _fit(chosen, len(names), found.train, found.validation, score, refit=True)
        update(1)
        fields = _figures(fitted.head.logits(chosen.features_of(found.test)), found.test, names)
        figures = few_shot_figures(
            found,
            sorted(set(few_shot)),
            seeds,
            probe,
            lambda logits: score(logits, found.test),
            is_few_shot_validation=chosen.is_few_shot_validation,
            with_lp_plus_plus=lp_plus_plus,
            update=update,
        )
    words = _words(found, chosen, fitted, validation)
    if few_shot:
        words += _few_shot_words(found, chosen, validation, seeds, lp_plus_plus)
    return LinearProbeResult(
        **fields,
        metric=metric or fallback,
        count=len(found.test),
        labels=names,
        protocol=words,
        protocol_name=chosen.name,
        precision=found.precision,
        processor=found.processor,
        split=found.test.name,
        unreadable=found.unreadable,
        strength=fitted.strength,
        tried=fitted.tried,
        few_shot=figures,
        architecture=found.architecture,
    )


def evaluate_linear_probe(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    protocol: str = "paper",
    train_split: str | None = None,
    validation_split: str | None = None,
    split: str | None = None,
    validation_part: float | None = None,
    class_names: Any = None,
    templates: Any = None,
    metric: str | None = None,
    few_shot: Sequence[int] = (),
    draws: int = 5,
    lp_plus_plus: bool = False,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    feature_cache: Any = None,
    threads: int | None = None,
    progress: bool = False,
) -> LinearProbeResult:
    """Measure a linear probe of a data set.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: A folder with class folders below `train/` and `test/`, or whatever else `encode_splits` takes.
        protocol: "paper", "openai" or "clip_benchmark", see `probe_protocols`.
        train_split: The split to fit to. None: `train`.
        validation_split: The split to choose the regularisation on. None: `validation`, if there is one.
        split: The split to measure on. None: `test`, or else `validation`.
        validation_part: See `probe_features`.
        class_names: Names of the classes. None: those that come with the data.
        templates: Templates of the classes' prompts, for LP++. None: those that come with the data, else "a photo of a
            {}."
        metric: The metric that the data set is reported by. None: acc1, or mean_average_precision.
        few_shot: Numbers of images of each class, for few-shot probes.
        draws: Number of draws of these images.
        lp_plus_plus: Whether to fit LP++ to the same images.
        seed: Seed of the part that is held out, of AdamW, and of the first draw.
        image_column: The column of images. None: the only one that can be it.
        label_column: The column of labels. None: the only one that can be it.
        batch_size: Number of images encoded at once.
        feature_cache: Folder in which image features are kept. None: they are not kept.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show progress bars.

    Returns:
        The result.

    Raises:
        LabelError: A label is none of the classes. A ValueError; its `index` is the row's place.
        UnreadableImagesError: More than 1 % of a split's images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: A split is missing, empty or of one class, columns or class names are missing, or the metric or
            protocol does not fit the data.

    Example::

        result = evaluate_linear_probe(model, processor, "flowers/", protocol="openai", few_shot=[1, 4, 16])
        print(f"{result.value:.1%}", [(row.shots, row.mean, row.spread) for row in result.few_shot])
    """
    find_protocol(protocol, seed=seed)
    features = encode_splits(
        model,
        processor,
        dataset,
        train_split=train_split,
        validation_split=validation_split,
        split=split,
        class_names=class_names,
        templates=templates,
        with_texts=lp_plus_plus,
        image_column=image_column,
        label_column=label_column,
        batch_size=batch_size,
        feature_cache=feature_cache,
        threads=threads,
        progress=progress,
    )
    return probe_features(
        features,
        protocol=protocol,
        metric=metric,
        validation_part=validation_part,
        few_shot=few_shot,
        draws=draws,
        lp_plus_plus=lp_plus_plus,
        seed=seed,
        device=str(model.device),
        progress=progress,
    )
