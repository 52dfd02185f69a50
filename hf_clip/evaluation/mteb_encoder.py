"""Our models in mteb's image tasks: features of length one, so that every task compares by the cosine.

Dimensions: N inputs, D embedding.
"""

from typing import Any

import torch
from torch import Tensor

from .embedder import Embedder


def mteb_model(model: Any, processor: Any, *, name: str = "hf-clip/model", revision: str = "local") -> Any:
    """Wrap a model for `mteb.evaluate`.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        name: Name under which mteb keeps results, `owner/name`.
        revision: Revision under which mteb keeps results.

    Returns:
        An encoder of texts and images. An input with both becomes the sum of its features, as in mteb's own wrappers.

    Raises:
        ImportError: mteb is not installed.

    Example::

        tasks = mteb.get_tasks(tasks=["CIFAR10ZeroShot"])
        mteb.evaluate(mteb_model(model, processor, name="org/clip-vit-b32"), tasks)
    """
    try:
        from mteb.models.abs_encoder import AbsEncoder
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError as error:
        raise ImportError("Evaluation by mteb needs the package mteb: pip install mteb") from error
    embedder = Embedder(model, processor)

    class ClipEncoder(AbsEncoder):
        """Encodes mteb's batches. Texts that are too long are cut."""

        mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "embed_dim": model.config.projection_dim,
                "max_tokens": embedder.text_limit,
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": ["image", "text"],
                "framework": ["PyTorch"],
            }
        )

        def encode(self, inputs: Any, **settings: Any) -> Tensor:
            """Encode a data loader's batches of texts, of images, or of both → (N, D), float32."""
            found = []
            with embedder.evaluating():
                for batch in inputs:
                    parts = []
                    if batch.get("text") is not None:
                        parts.append(embedder.texts(batch["text"], truncation=True))
                    if batch.get("image") is not None:
                        pixels = [embedder.prepare(image) for image in batch["image"]]
                        parts.append(embedder.encode(torch.stack(pixels)))
                    if not parts:
                        raise ValueError(
                            f"mteb gives {', '.join(batch)}, but texts or images are needed: this task is of another "
                            f"modality."
                        )
                    found.append(parts[0] + parts[1] if len(parts) == 2 else parts[0])
            return torch.cat(found)

    encoder = ClipEncoder()
    encoder.model = model
    return encoder
