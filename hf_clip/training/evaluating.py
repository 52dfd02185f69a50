"""Evaluation while training: retrieval in both directions on held-out pairs, and zero-shot accuracy with labels.

The figures are computed by the functions of `hf-clip evaluate`. Where there is a guard set, its figures stand beside.

Two pairs that share an image or a caption, or that are linked so through other pairs, are right answers to each other.
Every image and every caption counts once.

Invariant: the same figures with any number of processes.

Dimensions: B local batch, N pairs of all processes, K classes, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation.embedder import NotFiniteFeaturesError
from ..evaluation.ranking import rank_both_ways
from ..evaluation.retrieval import retrieval_metrics
from ..evaluation.widths import named_at
from ..evaluation.zero_shot import accuracies
from ..model.modeling_hf_clip import HfClipModel
from ..zero_shot.features import truncated
from .best import BestWeights
from .checkpoint import Checkpoints
from .data.bad_rows import BadRows
from .data.loader import PairLoader
from .frozen_towers import without_towers
from .gathering import exchange_counts, gather
from .guarding import Guard
from .learner import Learner
from .options import METRICS
from .plan import Plan
from .records import Records
from .summary import figures_in_words, sentence

KS = (1, 5, 10)
DIRECTIONS = {
    "recall": "mean",
    "image_to_text_recall": "text_retrieval",
    "text_to_image_recall": "image_retrieval",
}
"""Figures of a run, and what `hf-clip evaluate retrieval` calls the same: by what is searched for."""


class NotFiniteError(ValueError):
    """The model's features are no numbers any more."""


class TooFewPairsError(ValueError):
    """Fewer than two pairs of the validation data can be used."""


INPUTS = ("pixel_values", "input_ids", "attention_mask")


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What of a batch goes into the model, on its device."""
    return {name: batch[name].to(device, non_blocking=True) for name in INPUTS}


def _embed(model: Any, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The features of a batch, (B, D) twice, in float32.

    A process without a row computes one and drops it, since wrappers wait for all processes.
    """
    count = len(batch["input_ids"])
    inputs = model_inputs(batch, device)
    if count == 0:
        inputs = {name: torch.zeros((1, *t.shape[1:]), dtype=t.dtype, device=device) for name, t in inputs.items()}
        inputs["attention_mask"] += 1
        inputs["input_ids"] += _end_of_text_id(model)  # a text without its end would be refused
    outputs = model(**inputs)
    return outputs.image_embeds.float()[:count], outputs.text_embeds.float()[:count]


def _end_of_text_id(model: Any) -> int:
    while hasattr(model, "module"):  # DDP's and DeepSpeed's wrappers
        model = model.module
    return model.config.text_config.eos_token_id


def group_pairs(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """Put pairs that share an image or a caption into one group.

    Args:
        image_ids: (N,) equal for equal images.
        text_ids: (N,) equal for equal captions.

    Returns:
        (N,) the number of each pair's group.
    """
    parent = list(range(len(image_ids)))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for ids in (image_ids.tolist(), text_ids.tolist()):
        first: dict[int, int] = {}
        for item, name in enumerate(ids):
            parent[find(item)] = find(first.setdefault(name, item))
    return torch.tensor([find(item) for item in range(len(parent))])


def _first_of_each(ids: Tensor) -> Tensor:
    """The place of every number's first occurrence."""
    seen: dict[int, int] = {}
    for place, number in enumerate(ids.tolist()):
        seen.setdefault(number, place)
    return torch.tensor(list(seen.values()))


def retrieval(image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor, text_ids: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 from images to texts, from texts to images, and the mean of both.

    Args:
        image_embeds: (N, D) of length one.
        text_embeds: (N, D) of length one.
        image_ids: (N,) equal for equal images.
        text_ids: (N,) equal for equal captions.

    Returns:
        Figures by name, from 0 to 1.
    """
    groups = group_pairs(image_ids, text_ids)
    images, texts = _first_of_each(image_ids), _first_of_each(text_ids)
    ranks = rank_both_ways(image_embeds[images], text_embeds[texts], groups[images], groups[texts])
    measured = retrieval_metrics(*ranks, KS)
    return {f"{ours}@{k}": measured[f"{name}_recall@{k}"] for ours, name in DIRECTIONS.items() for k in KS}


@torch.no_grad()
def evaluate(
    model: Any,
    loader: PairLoader,
    device: torch.device,
    class_tokens: dict[str, Tensor] | None = None,
    widths: Sequence[int] = (),
) -> dict[str, float]:
    """Measure a model on validation pairs. Every process calls this, and all get the figures of all pairs.

    Args:
        model: an HfClipModel, wrapped or not. It is put into evaluation mode and back.
        loader: of the validation pairs.
        device: where the model is.
        class_tokens: input_ids and attention_mask of each class's prompt, (K, L), where the loader has labels.
        widths: at which the model is trained; those below the full one are measured too, by `METRICS`.

    Returns:
        Figures by name, from 0 to 1. Those of a width have it behind their names, see `name_at`.

    Raises:
        NotFiniteError: features are no numbers. On all processes.
        TooFewPairsError: fewer than two pairs can be used. On all processes.
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("image", "text", "image_ids", "text_ids", "labels")}
    for batch in loader.epoch():
        images, texts = _embed(model, batch, device)
        labels = batch.get("labels", torch.zeros(0, dtype=torch.int64))
        kept = (images, texts, batch["image_ids"], batch["text_ids"], labels)
        for name, values in zip(parts, kept, strict=True):
            parts[name].append(values.to(device))
    local = {name: torch.cat(values) for name, values in parts.items()}
    counts = [row[0] for row in exchange_counts([len(local["image"])], device)]
    label_counts = [row[0] for row in exchange_counts([len(local["labels"])], device)]
    whole = {name: gather(values, label_counts if name == "labels" else counts).cpu() for name, values in local.items()}
    if not all(bool(whole[name].isfinite().all()) for name in ("image", "text")):
        raise NotFiniteError("The model gives features that are no numbers; its weights are broken.")
    if sum(counts) < 2:
        raise TooFewPairsError(
            f"The validation data ({loader.pairs.name}) has {sum(counts)} usable pairs, but at least 2 are needed."
        )
    classes = None
    if class_tokens is not None and sum(label_counts) == sum(counts):
        classes = model(**{name: tensor.to(device) for name, tensor in class_tokens.items()}).text_embeds.float().cpu()
    model.train(was_training)
    figures = _figures(whole, classes)
    for width in widths[1:]:
        narrow = {name: truncated(values, width) for name, values in whole.items() if name in ("image", "text")}
        found = _figures(whole | narrow, None if classes is None else truncated(classes, width))
        figures |= named_at({name: value for name, value in found.items() if name in METRICS}, width)
    return figures


def _figures(whole: dict[str, Tensor], classes: Tensor | None) -> dict[str, float]:
    """Figures of all pairs' embeddings. classes: (K, D) of the classes' prompts"""
    figures = retrieval(whole["image"], whole["text"], whole["image_ids"], whole["text_ids"])
    if classes is not None:
        measured = accuracies(whole["image"] @ classes.T, whole["labels"])
        figures |= {name.replace("acc", "zero_shot_top"): value for name, value in measured.items()}
    return figures


@dataclass(frozen=True)
class EvaluatedPairs:
    """One set of pairs that a run is evaluated on.

    Attributes:
        loader: of the pairs.
        class_tokens: of the classes' prompts, see `evaluate`.
        prefix: what stands in front of its figures.
    """

    loader: PairLoader
    class_tokens: dict[str, Tensor] | None = None
    prefix: str = ""

    @property
    def bad_rows(self) -> BadRows:
        """The counter of pairs that cannot be used, which counts each evaluation by itself."""
        assert self.loader.bad_rows is not None
        return self.loader.bad_rows

    def measure(self, model: Any, device: torch.device, widths: Sequence[int] = ()) -> dict[str, float]:
        """The figures of a model on the pairs. Raises as `evaluate`."""
        self.bad_rows.restart()
        found = evaluate(model, self.loader, device, self.class_tokens, widths)
        return {f"{self.prefix}{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Validation:
    """What a run is evaluated on.

    Attributes:
        sets: the sets of pairs.
        guard: the guard set, if there is one.
        widths: at which the model is trained, see `evaluate`.
        stored_towers: names of the model's towers whose features the loaders have in place of their inputs.
    """

    sets: tuple[EvaluatedPairs, ...]
    guard: Guard | None = None
    widths: tuple[int, ...] = ()
    stored_towers: tuple[str, ...] = ()

    @property
    def bad_rows(self) -> list[BadRows]:
        """The counters of pairs that cannot be used."""
        return [each.bad_rows for each in self.sets]

    def measure(self, model: Any, device: torch.device) -> dict[str, float]:
        """The figures of a model on all sets of pairs. Raises as `evaluate`."""
        figures: dict[str, float] = {}
        for each in self.sets:
            figures |= each.measure(model, device, self.widths)
        return figures

    def measure_plain(self, model: HfClipModel, device: torch.device) -> dict[str, float]:
        """The figures of a plain model on the CPU, on the pairs and on the guard set. Raises as both do."""
        model.to(device)
        with without_towers(model, self.stored_towers):
            figures = self.measure(model, device)
        if self.guard is not None:
            figures |= self.guard.measure(model)
        model.cpu()
        return figures


class Evaluations:
    """The evaluations of a run that is going on. Without validation data there are none.

    Attributes:
        figures: of the last evaluation, by name.
        start_figures: of the model that training started from.
        step: of the last evaluation, -1 before the first.
    """

    def __init__(
        self,
        plan: Plan,
        learner: Learner,
        validation: Validation | None,
        records: Records,
        checkpoints: Checkpoints,
        best: BestWeights,
    ):
        self.plan, self.learner, self.validation, self.records = plan, learner, validation, records
        self.checkpoints, self.best, self.state = checkpoints, best, checkpoints.state
        self.figures: dict[str, float] = {}
        self.start_figures: dict[str, float] = {}
        self.step = -1

    def measure(self) -> dict[str, float]:
        """The figures of the present weights, which are not recorded.

        Raises:
            ValueError: the weights are broken, or the validation data are gone. The message says what remains.
        """
        assert self.validation is not None
        device = self.learner.accelerator.device
        try:
            with self.learner.averaged():
                figures = self.validation.measure(self.learner.wrapped, device)
            if self.validation.guard is not None:
                # A copy, since the guard set is encoded by other calls than the one that wrappers pass on.
                plain, _ = self.learner.plain_model(self.learner.weights(), self.plan.config)
                figures |= self.validation.guard.measure(plain.to(device))
            return figures
        except (NotFiniteError, NotFiniteFeaturesError):
            if self.state.step == 0:
                raise
            raise self.checkpoints.diverged(f"Features became nan after step {self.state.step}") from None
        except TooFewPairsError as error:
            if not (remains := self.checkpoints.save_whole_step()):
                raise
            raise ValueError(f"{error} {sentence(remains)}") from error

    def run(self) -> None:
        """Evaluate the present weights, record it, and keep them if they are the best."""
        if self.validation is not None:
            self.take(self.measure())

    def take(self, figures: dict[str, float]) -> None:
        """Record the figures of the present weights, and keep these if they are the best."""
        self.figures, self.step = figures, self.state.step
        self.records.add({"step": self.state.step, **figures})
        if self.learner.accelerator.is_main_process:
            name = f"step {self.state.step}" if self.state.step else "at the start"
            tqdm.write(f"{name}: {figures_in_words(figures)}")
        self.best.compare(figures)

    def catch_up(self) -> None:
        """Evaluate a resumed run's step that was due for it, where a signal ended the run before."""
        every, step = self.plan.config.steps_between_evaluations, self.state.step
        if self.validation is None or every is None or step % every or step >= self.plan.total_steps:
            return
        accelerator = self.learner.accelerator
        is_missing = accelerator.is_main_process and not self.records.figures_of(step)
        if any(missing for (missing,) in exchange_counts([int(is_missing)], accelerator.device)):
            self.run()
