"""What is sent to the servers, and a process that encodes it without any server."""

import statistics
import time
from io import BytesIO
from typing import Any

import torch
import transformers
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.zero_shot.features import encode_images, encode_texts

TEXT = "a photo of a dog on a beach"


def make_image() -> bytes:
    """A photograph that ships with scikit-image, as a JPEG of 512 x 512 pixels."""
    from skimage import data

    file = BytesIO()
    Image.fromarray(data.astronaut()).save(file, "JPEG", quality=90)
    return file.getvalue()


def call_directly(folder: str, seconds: float, threads: int) -> dict[str, Any]:
    """Encode one text and one JPEG at a time: medians in seconds, and the embeddings."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model, processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
    model.optimize_for_inference()
    jpeg = make_image()
    calls = {
        "text": lambda: encode_texts(model, processor, [TEXT]),
        "image": lambda: encode_images(model, processor, [jpeg]),
    }
    found: dict[str, Any] = {}
    for kind, call in calls.items():
        features, warm = call(), time.perf_counter() + seconds / 2
        while time.perf_counter() < warm:
            features = call()
        taken, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        found[kind] = {"seconds": statistics.median(taken), "features": features[0].tolist()}
    return found
