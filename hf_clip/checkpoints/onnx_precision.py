"""How far a graph's outputs are from the model's, and graphs in float16.

float16 halves the weights. Inputs and outputs stay float32, and so does the arithmetic of what adds up many values:
LayerNorm, softmax and the norm of an embedding.

Dimensions: B texts or images, D embedding.
"""

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .onnx_graphs import Graph, quiet

FLOAT32_OPERATORS = ("LayerNormalization", "ReduceL2", "Softmax")
LARGEST_CONSTANT = 1e4
"""In float16, where the mask's lowest float32 would be infinite, and a text of padding alone not a number."""

MOST_ERROR = 1e-4
"""What a graph in float32 may differ by from the model, relative to the length of the embedding."""


@dataclass
class Deviation:
    """How far a graph is from the model, the worst over all embeddings that were compared.

    error:  ‖graph − model‖ / ‖model‖; of logits relative to the logit scale, since they may be zero
    cosine: of the angle between the two
    """

    error: float = 0.0
    cosine: float = 1.0

    def add(self, error: float, cosine: float) -> None:
        # What is no number stays: max() and min() would pass over it.
        if not (isnan(self.error) or error <= self.error):
            self.error = error
        if not (isnan(self.cosine) or cosine >= self.cosine):
            self.cosine = cosine


def sizes_to_compare(limit: int) -> list[tuple[int, int, int]]:
    """Texts, text length and images of the batches by which graphs are compared; `limit` is the longest text."""
    return [(1, 1, 1), (3, min(9, limit), 2), (2, limit, 1)]


def _embedding_deviation(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Both (B, D)."""
    found, expected = found.double(), expected.double()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.max().item(), torch.cosine_similarity(found, expected, dim=-1).min().item()


class Comparison:
    """The model's outputs for a few batches, against which the files of one graph are held."""

    @torch.no_grad()
    def __init__(self, graph: Graph):
        config = graph.model.config
        self.outputs = graph.outputs
        self.scale = graph.model.logit_scale.exp().item()
        sizes = sizes_to_compare(config.text_config.max_position_embeddings)
        self.batches = [graph.random_batch(*size, seed=seed) for seed, size in enumerate(sizes)]
        self.expected = [graph(**batch) for batch in self.batches]

    def measure(self, path: Path) -> Deviation:
        session = open_session(path)
        worst = Deviation()
        for batch, expected in zip(self.batches, self.expected, strict=True):
            results = session.run(list(self.outputs), {name: tensor.numpy() for name, tensor in batch.items()})
            for name, result, target in zip(self.outputs, results, expected, strict=True):
                found = torch.from_numpy(result)
                if found.shape != target.shape:
                    raise ValueError(f"{path.name} returns {name} of shape {found.shape} instead of {target.shape}.")
                if name.startswith("logits"):
                    worst.add((found - target).abs().max().item() / self.scale, 1.0)
                else:
                    worst.add(*_embedding_deviation(found, target))
        return worst


def open_session(path: Path) -> Any:
    """ONNX Runtime's session on the processor, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def give_own_weights(graph: Any) -> None:
    """Undo the sharing of equal weights, such as fresh gains, for operators that stay in float32.

    The converter would write one cast for each use of a weight, all under one name.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        shared = [slot for slot, name in enumerate(node.input) if name in weights]
        for slot in shared if node.op_type in FLOAT32_OPERATORS else []:
            own = graph.initializer.add()
            own.CopyFrom(weights[node.input[slot]])
            own.name = node.input[slot] = f"{node.name}_{slot}"


def write_half(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(source)
    give_own_weights(model.graph)
    with quiet():
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            max_finite_val=LARGEST_CONSTANT,
            disable_shape_infer=True,  # the exporter wrote all types, and it would not take more than 2 GiB
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS],
        )
    onnx.save(half, target)
