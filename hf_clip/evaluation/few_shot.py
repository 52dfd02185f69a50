"""Few-shot probes: k images of each class, drawn several times, each time a probe; their mean and spread.

A seed fixes one order of the images, and k shots are the first k of each class in it. So the draws of one seed contain
one another, and two models see the same images.

Dimensions: I images, K classes, D embedding.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .lp_plus_plus import fit_lp_plus_plus
from .split_features import ProbeFeatures, SplitFeatures, check_directions

PROBE, LP_PLUS_PLUS = "linear probe", "LP++"


@dataclass(frozen=True)
class FewShotFigures:
    """A metric of few-shot probes.

    Attributes:
        head: "linear probe" or "LP++".
        shots: Images of each class.
        values: The metric of each draw.
    """

    head: str
    shots: int
    values: list[float]

    @property
    def mean(self) -> float:
        """The mean of the draws."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation of the draws. 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def draw_shots(labels: Tensor, shots: int, classes: int, seed: int) -> Tensor:
    """Draw images of each class. A class that has fewer gives all that it has.

    Args:
        labels: (I,) places of the classes.
        shots: Images of each class.
        classes: The number of classes K.
        seed: The draw's seed.

    Returns:
        Places of the images, class by class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == place][:shots] for place in range(classes)])


def hold_out(split: SplitFeatures, part: float, seed: int) -> tuple[SplitFeatures, SplitFeatures]:
    """Divide a split into what is fitted and what the regularisation is chosen on.

    Args:
        split: The split.
        part: The part to hold out of each class, and at least one image where there are two. If an image may have
            several classes: of all images.
        seed: Seed of the choice.

    Returns:
        What is left, and what is held out, both in the split's order.

    Raises:
        ValueError: The part is not between 0 and 1, or nothing can be held out.
    """
    if not 0 < part < 1:
        raise ValueError(f"The part that is held out for validation is {part}, but must lie between 0 and 1.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    if split.labels.ndim == 2:
        groups = [order]
    else:
        groups = [order[split.labels[order] == place] for place in split.labels.unique()]
    is_held = torch.zeros(len(split), dtype=torch.bool)
    for rows in groups:
        is_held[rows[: min(max(round(part * len(rows)), 1), len(rows) - 1)]] = True
    if not is_held.any():
        raise ValueError(
            "No class of train has two images, so none can be held out for validation: name a validation split, or "
            "take the protocol openai, which needs none."
        )
    return split.take(~is_held), split.take(is_held)


def check_shots(features: ProbeFeatures, shots: Sequence[int], draws: int, with_lp_plus_plus: bool) -> None:
    """Raise ValueError if few-shot probes cannot be fitted: some class has too few images, or LP++ has no texts."""
    if not shots:
        if with_lp_plus_plus:
            raise ValueError("LP++ is a few-shot classifier: say how many images of each class, --few-shot 1,2,4,8,16.")
        return
    if draws < 1 or min(shots) < 1:
        raise ValueError(f"There are {draws} draws of {min(shots)} shots, but at least one of each is needed.")
    if features.is_multi_label:
        raise ValueError(
            f"{features.dataset}: an image may have several classes, so k images of each class cannot be drawn; leave "
            f"--few-shot out."
        )
    counts = features.train.labels.bincount(minlength=len(features.class_names))
    fewest = int(counts.argmin())
    if max(shots) > int(counts[fewest]):  # the shots may be more than a tensor holds
        possible = [k for k in shots if k <= int(counts[fewest])]
        advice = f"--few-shot {','.join(map(str, possible))} is possible" if possible else "leave --few-shot out"
        raise ValueError(
            f"{features.dataset} has {int(counts[fewest])} images of class {features.class_names[fewest]!r} to fit "
            f"to, but {max(shots)} shots of each class were asked for: {advice}."
        )
    if with_lp_plus_plus and features.texts is None:
        raise ValueError(
            f"{features.dataset} has no features of the classes' prompts, which LP++ needs: write the file again with "
            f"--lp-plus-plus, or put a tensor `texts` (classes, width) into it."
        )
    for title, split in features.splits.items() if with_lp_plus_plus else ():
        check_directions(features.dataset, f"the features of {title!r}", split.projected)


def few_shot_figures(
    features: ProbeFeatures,
    shots: Sequence[int],
    seeds: Sequence[int],
    probe: Callable[[SplitFeatures, SplitFeatures | None], Callable[[SplitFeatures], Tensor]],
    measure: Callable[[Tensor], float],
    *,
    is_few_shot_validation: bool,
    with_lp_plus_plus: bool,
    update: Callable[[int], object] = lambda count: None,
) -> list[FewShotFigures]:
    """Fit few-shot probes and measure them on test.

    Args:
        features: The features.
        shots: Images of each class, several numbers.
        seeds: A draw's seed each.
        probe: Fits to shots, with what the regularisation is chosen on; returns a function to logits (I, K).
        measure: A function from logits (I, K) of test to a figure.
        is_few_shot_validation: Whether the probe sees only as many validation images of each class as shots. LP++ does.
        with_lp_plus_plus: Whether to fit LP++ too.
        update: Called with 1 after each draw.

    Returns:
        Figures, in the order of the shots.
    """
    classes, found = len(features.class_names), []
    for k in shots:
        values: dict[str, list[float]] = {PROBE: []}
        if with_lp_plus_plus:
            values[LP_PLUS_PLUS] = []
        for seed in seeds:
            train, few = features.train.take(draw_shots(features.train.labels, k, classes, seed)), None
            if features.validation is not None:
                few = features.validation.take(draw_shots(features.validation.labels, k, classes, seed))
            logits = probe(train, few if is_few_shot_validation else features.validation)
            values[PROBE].append(measure(logits(features.test)))
            if with_lp_plus_plus:
                values[LP_PLUS_PLUS].append(measure(_lp_plus_plus(train, few, features)))
            update(1)
        found += [FewShotFigures(head, k, figures) for head, figures in values.items()]
    return found


def _lp_plus_plus(train: SplitFeatures, validation: SplitFeatures | None, features: ProbeFeatures) -> Tensor:
    assert features.texts is not None
    seen = None if validation is None else (_of_length_one(validation.projected), validation.labels)
    head = fit_lp_plus_plus(_of_length_one(train.projected), train.labels, _of_length_one(features.texts), seen)
    return head.logits(_of_length_one(features.test.projected))


def _of_length_one(features: Tensor) -> Tensor:
    """(N, D) → (N, D). In float64, since squares of very small and very large features are none of float32."""
    return normalize(features.double(), dim=-1, eps=torch.finfo(torch.float64).tiny).float()
