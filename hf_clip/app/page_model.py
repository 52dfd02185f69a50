"""What a page shows: one model in memory, its index if there is one, and the classifiers that were made last."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ..checkpoints.in_memory import copy_to_memory, load_model
from ..inference.computing_thread import ComputingThread
from ..search.current_index import CurrentIndex
from ..search.image_index import ImageIndex
from ..search.indexed_image import register_formats
from ..zero_shot.classifier import ZeroShotClassifier
from ..zero_shot.features import image_processor_of
from ..zero_shot.pipeline import default_device

CLASSIFIERS_KEPT = 16
"""Sets of labels whose features stay in memory: of 1,000 labels and width 1024, each is 4 MB."""

EXAMPLES = 3
"""Captions of the index that the page gives as examples of what to write."""


class PageError(ValueError):
    """What a visitor gave cannot be used."""


class PageModel:
    """A model with all that a page needs of it.

    Args:
        model: HfClipModel in evaluation mode.
        processor: Its processor.
        name: What the page calls it.
        index: An index that was made of it.
        place: Where the model is, as a command line names it. None: `name`.
        computing: The thread that computes with it. None: one of its own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        index: ImageIndex | None = None,
        place: str | None = None,
        computing: ComputingThread | None = None,
    ):
        if not callable(image_processor_of(processor)) or not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"A page needs a processor of images and texts, and {name} has only a {type(processor).__name__}: "
                f"pass the model's HfClipProcessor."
            )
        register_formats()
        self.model, self.processor, self.name = model, processor, name
        self.place, self.computing = place or name, computing or ComputingThread()
        self._index = None if index is None else CurrentIndex(index)
        self._classifiers: OrderedDict[Any, ZeroShotClassifier] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def load(cls, model: str, index: str | None = None) -> "PageModel":
        """Load a model and open an index, in the thread that computes with them later.

        Args:
            model: A folder, a repository on the Hub, a checkpoint file, or one of OpenAI's nine names.
            index: The folder or address of an index. None: the page has none.

        Raises:
            OSError: There is no such model.
            SearchIndexError: There is no such index, or it is of another model.
            ValueError: A file is damaged, or another model's.
        """
        path = Path(os.path.expanduser(model))
        name = path.resolve().name if path.exists() else model

        def load() -> tuple[Any, Any, ImageIndex | None]:
            opened = None if index is None else ImageIndex.open(index, model=model, make=False)
            loaded, processor = load_model(model) if opened is None else (opened.model, opened.processor)
            loaded = loaded.to(default_device())
            copy_to_memory(loaded)
            return loaded, processor, opened

        computing = ComputingThread()
        loaded, processor, opened = computing.run(load)
        return cls(loaded, processor, name, opened, model, computing)

    @property
    def has_index(self) -> bool:
        """Whether the page searches."""
        return self._index is not None

    @property
    def index(self) -> ImageIndex | None:
        """The index as it is now, or None if the page has none.

        Raises:
            SearchIndexError: It is gone, or another model's was made in its place.
        """
        return None if self._index is None else self._index.get()

    def classifier(self, labels: Sequence[str], templates: Sequence[str], background: Sequence[str]) -> Any:
        """A classifier of these labels, which are encoded if they are new.

        Args:
            labels: The labels.
            templates: Texts with `{}` where the label belongs.
            background: Labels of everything else.

        Raises:
            ValueError: A label or a template cannot be used.
        """
        key = (tuple(labels), tuple(templates), tuple(background))
        with self._lock:
            found = self._classifiers.pop(key, None)
            if found is None:
                found = ZeroShotClassifier(
                    self.model,
                    self.processor,
                    list(labels),
                    list(templates),
                    background=[label for label in background if label not in key[0]],
                    progress=False,
                )
            self._classifiers[key] = found
            while len(self._classifiers) > CLASSIFIERS_KEPT:
                self._classifiers.popitem(last=False)
        return found

    def examples(self) -> list[str]:
        """A few captions of the index, which say what the model was shown. Empty if it has none."""
        index = self.index
        if index is None or len(index) == 0:
            return []
        rows = index.tables.images.search().where("caption IS NOT NULL").select(["caption"]).limit(50).to_list()
        return list(dict.fromkeys(row["caption"] for row in rows))[:EXAMPLES]


__all__ = ["PageError", "PageModel"]
