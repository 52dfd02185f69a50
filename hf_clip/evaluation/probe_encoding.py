"""Encode the splits of a data set for linear probes, with both features of each image in one pass.

Dimensions: B batch, I images, K classes, W tower width, D embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.sources import choose_split
from ..zero_shot.progress import progress_bar
from .architecture import architecture_of
from .embedder import Embedder, Unreadable
from .feature_cache import processor_settings
from .labelled_images import PREFERRED, SPLIT_FOLDERS, LabelledImages, open_labelled, splits_of
from .prompts_of_classes import class_matrix, class_prompts
from .split_features import ProbeFeatures, SplitFeatures, check_features

VALIDATION_SPLITS = ("validation", "val", "valid", "dev")
"""Names of splits that the regularisation is chosen on, where none is named."""

KIND = "pooled and projected, not normalised"
"""How the cache calls these features."""


class TowerEmbedder(Embedder):
    """Encodes images as `pooled` and `projected` features side by side, (B, W + D) or (B, D), not normalised."""

    @property
    def has_pooled(self) -> bool:
        """Whether there are features before the projection."""
        return hasattr(self.model, "visual_projection") and self.tower != "resnet"

    @property
    def tower(self) -> str:
        """The kind of the image tower."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        return "resnet" if str(config.model_type) == "hf_clip_resnet" else "vit"

    def _image_features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        if self.has_pooled:
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return torch.cat([pooled, self.model.visual_projection(pooled)], dim=1).float().cpu()
        found = self.model.get_image_features(pixel_values=pixels)
        return (found if isinstance(found, Tensor) else found.pooler_output).float().cpu()

    def split(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the pooled features (I, W), None if there are none, and the projected ones (I, D)."""
        if not self.has_pooled:
            return None, features
        width = features.shape[1] - int(self.model.config.projection_dim)
        return features[:, :width], features[:, width:]


@dataclass(frozen=True)
class _Splits:
    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages

    def items(self) -> Iterator[tuple[str, LabelledImages]]:
        for name in ("train", "validation", "test"):
            if (split := getattr(self, name)) is not None:
                yield name, split


def _open_splits(
    dataset: Any, train: str | None, validation: str | None, test: str | None, given: dict[str, Any]
) -> _Splits:
    is_mapping = isinstance(dataset, Mapping)
    names = list(map(str, dataset)) if is_mapping else splits_of(dataset)
    source = "the data set" if is_mapping else str(dataset)

    def find(wanted: str | None, option: str) -> str:
        if wanted is not None and wanted not in names:
            wanted = SPLIT_FOLDERS.get(wanted.lower(), wanted)
        return choose_split(source, names, wanted, PREFERRED, f" Name the one that is meant with {option}.")

    chosen_test, chosen_train = find(test, "--split"), find(train or "train", "--train-split")
    if chosen_test == chosen_train:
        raise ValueError(
            f"{source} would be fitted and measured on one split, {chosen_train!r}; its splits are "
            f"{', '.join(names)}. A linear probe needs two: name them with --train-split and --split, or put images "
            f"into train/ and test/."
        )
    others = [name for name in VALIDATION_SPLITS if name in names and name not in (chosen_train, chosen_test)]
    chosen = find(validation, "--validation-split") if validation is not None else next(iter(others), None)
    if chosen in (chosen_train, chosen_test):
        raise ValueError(
            f"{source}: the validation split is {chosen!r}, which is fitted or measured on already. Name another with "
            f"--validation-split, or leave it out."
        )

    def open_one(name: str) -> LabelledImages:
        found = open_labelled(dataset[name] if is_mapping else dataset, None if is_mapping else name, **given)
        return replace(found, split=name) if is_mapping else found

    return _Splits(open_one(chosen_train), None if chosen is None else open_one(chosen), open_one(chosen_test))


def _places(source: str, title: str, names: list[str], classes: list[str]) -> list[int]:
    """Return the place among `classes` of each class of a split, which a folder without images does not have."""
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(
            f"{source}: its split {title!r} has the class {unknown[0]!r}, which train does not have; its classes are "
            f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}."
        )
    return [classes.index(name) for name in names]


def _encode(
    embedder: TowerEmbedder, title: str, data: LabelledImages, classes: list[str], cache: Any, progress: bool
) -> tuple[SplitFeatures, list[str]]:
    """Return the features of a split, and its images that cannot be opened."""
    unreadable = Unreadable(data.name, data.count)
    places = _places(data.name, title, data.labels, classes)
    kept: list[tuple[int, ...]] = []
    parts: list[Tensor] = []
    found = embedder.cache_in(cache, data.fingerprint, features=KIND)
    with progress_bar(f"Encoding {data.split} of {data.name}", "image", data.count, progress) as update:
        for rows, features in embedder.images(data.rows(), places=data.places, unreadable=unreadable, cache=found):
            parts.append(features)
            kept += [row.labels for row in rows]
            update(len(rows))
    if not parts:
        raise ValueError(f"{data.name} has no rows in its split {data.split!r}.")
    pooled, projected = embedder.split(torch.cat(parts))
    if data.is_multi_label:
        labels = torch.zeros(len(kept), len(classes), dtype=torch.bool)
        for row, several in enumerate(kept):
            labels[row, [places[one] for one in several]] = True
    else:
        labels = torch.tensor([places[one] for (one,) in kept], dtype=torch.int64)
    return SplitFeatures(projected, labels, pooled, data.split), unreadable.reasons


def encode_splits(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    train_split: str | None = None,
    validation_split: str | None = None,
    split: str | None = None,
    class_names: Any = None,
    templates: Any = None,
    with_texts: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    feature_cache: Any = None,
    threads: int | None = None,
    progress: bool = False,
) -> ProbeFeatures:
    """Encode what a linear probe needs of a data set.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: What `open_labelled` takes, with at least two splits; or a mapping from the splits' names to tables.
        train_split: The split to fit to. None: `train`.
        validation_split: The split to choose the regularisation on. None: `validation`, if there is one.
        split: The split to measure on. None: `test`, or else `validation`.
        class_names: Names of the classes. None: those that come with the data.
        templates: Templates of the classes' prompts. None: those that come with the data, else "a photo of a {}."
        with_texts: Whether to encode the classes' prompts, which LP++ needs.
        image_column: The column of images. None: the only one that can be it.
        label_column: The column of labels. None: the only one that can be it.
        batch_size: Number of images encoded at once.
        feature_cache: Folder in which the features are kept. None: they are not kept.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show a progress bar.

    Returns:
        The features.

    Raises:
        LabelError: A label is none of the classes. A ValueError; its `index` is the row's place.
        UnreadableImagesError: More than 1 % of a split's images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: A split is missing or empty, columns or class names are missing, or all images are of one class.
    """
    given = {"class_names": class_names, "image_column": image_column, "label_column": label_column}
    splits = _open_splits(dataset, train_split, validation_split, split, given)
    embedder = TowerEmbedder(model, processor, batch_size=batch_size, threads=threads)
    classes = splits.train.labels
    found: dict[str, Any] = {}
    unreadable: list[str] = []
    texts, prompts = None, ""
    with embedder.evaluating():
        if with_texts:
            made = class_prompts(splits.train.class_names, templates, splits.train.templates)
            texts, prompts = class_matrix(embedder, made).T.contiguous(), made.described
        for title, data in splits.items():
            found[title], lost = _encode(embedder, title, data, classes, feature_cache, progress)
            unreadable += lost
    return check_features(
        ProbeFeatures(
            classes,
            **found,
            texts=texts,
            prompts=prompts,
            dataset=splits.train.name,
            architecture=architecture_of(model.config),
            tower=embedder.tower,
            precision=embedder.precision,
            processor=processor_settings(processor),
            unreadable=unreadable,
        )
    )
