"""Quantized scans against the exact one: recall@10, time of a query, memory.

    python -m benchmarks.search.quantized [--images 100000] [--width 512] [--model demo-output/clip-digits-vit]

Vectors are made, since no real embeddings of that number are at hand: a direction that all share (images of CLIP have
a cosine similarity of about 0.5 with one another), and around it clusters in a space whose dimensions matter less and
less (a power law). Queries of images are images of the index, as in `kept_recall`. Queries of texts lie off the images
by a second common direction, and are nearer to their cluster than to others.

With --model, the demo's, recall is also measured on embeddings of the demo's images, each turned and shifted at random.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.inference.cpu import read_cpu
from hf_clip.search.exact_scan import EmbeddingMatrix
from hf_clip.search.quantized_scan import KINDS, QuantizedMatrix, kept_recall

CLUSTERS = 1000
REPEATS = 15


def made_vectors(count: int, width: int, texts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (I, D) float16, and texts (T, D) float32, both of length one."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int) -> Tensor:
        spread = torch.arange(1, width + 1, dtype=torch.float32) ** -0.5
        return torch.randn(rows, width, generator=generator) * (spread / spread.norm())

    common, gap = (normalize(torch.randn(width, generator=generator), dim=0) for _ in range(2))
    centres = noise(CLUSTERS)
    of_images = torch.randint(CLUSTERS, (count,), generator=generator)
    images = torch.empty(count, width, dtype=torch.float16)
    for places in torch.arange(count).split(20_000):
        inner = 0.6 * centres[of_images[places]] + 0.8 * noise(len(places))
        images[places] = normalize(common + inner, dim=1).half()
    of_texts = torch.randint(CLUSTERS, (texts,), generator=generator)
    return images, normalize(gap + 0.3 * common + 0.5 * centres[of_texts] + 0.5 * noise(texts), dim=1)


def recall_of(matrix: QuantizedMatrix, queries: Tensor, top: int = 10) -> float:
    """The part of the exact scan's best that a quantized one finds."""
    exact = EmbeddingMatrix.similarities(matrix, queries).topk(top).indices
    found = matrix.nearest(queries, top)[1]
    return float((exact[:, :, None] == found[:, None, :]).any(2).float().mean())


def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each call in milliseconds, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def embed_demo(model_name: str, copies: int) -> Tensor:
    """Embeddings (I, D) float16 of the demo's images, each turned and shifted in `copies` ways."""
    from io import BytesIO

    from datasets import Image as ImageFeature
    from PIL import Image

    from demo.digits import make_dataset
    from hf_clip import encode_images
    from hf_clip.checkpoints.in_memory import load_model

    model, processor = load_model(model_name)
    generator = torch.Generator().manual_seed(0)
    images = []
    size = model.config.vision_config.image_size
    rows = make_dataset(size, 2000)["train"].cast_column("image", ImageFeature(decode=False))
    for row in rows:
        image = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
        for _ in range(copies):
            turn, right, down = (torch.rand(3, generator=generator) * 2 - 1).tolist()
            moved = (round(2 * right), round(2 * down))
            colour = image.getpixel((0, 0))
            images.append(image.rotate(15 * turn, Image.Resampling.BILINEAR, translate=moved, fillcolor=colour))
    return encode_images(model, processor, images, batch_size=64).half()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="the demo's model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images, texts = made_vectors(options.images, options.width, texts=256)
    exact = EmbeddingMatrix(torch.arange(len(images)), images)
    found = {kind: QuantizedMatrix.quantize(exact, kind) for kind in KINDS}
    query = texts[:1]
    print(f"{read_cpu().name}, {options.threads} threads; {len(images):,} made vectors of {options.width} numbers")
    calls: dict[str, Callable[[], object]] = {"float16": lambda: exact.similarities(query).topk(10)}
    for kind, matrix in found.items():
        calls[kind] = lambda matrix=matrix: matrix.nearest(query, 10)  # type: ignore[misc]
    times = in_turn(calls)
    print(f"float16: {times['float16']:.1f} ms, {images.numel() * 2 / 1e6:.1f} MB")
    for kind, matrix in found.items():
        print(
            f"{kind}: {times[kind]:.1f} ms, {matrix.code_bytes / 1e6:.1f} MB; best compared again → recall@10 of "
            f"images, texts"
        )
        for count in (10, 50, 200, 1000):
            matrix.rescored = count
            print(f"    {count:>4} → {kept_recall(matrix):.4f}, {recall_of(matrix, texts):.4f}")
    if options.model:
        vectors = embed_demo(options.model, copies=10)
        print(f"{len(vectors):,} embeddings of the demo's images, turned and shifted; {vectors.shape[1]} numbers")
        for kind in KINDS:
            matrix = QuantizedMatrix.quantize(EmbeddingMatrix(torch.arange(len(vectors)), vectors), kind)
            for count in (10, 50, 200, 1000):
                matrix.rescored = count
                print(f"    {kind} {count:>4} → {kept_recall(matrix):.4f}")


if __name__ == "__main__":
    main()
