"""Dynamic int8 quantisation of an ONNX graph, in operators that every engine has.

- A matrix of a linear layer is stored in int8, each column with its own scale, and multiplied in integers by
  activations that are quantised anew for every input. ONNX Runtime fuses these five operators into one. Seven of the
  eight bits are used: the products of two pairs then fit 16 bits, in which processors without VNNI add them up, and a
  graph gives the same numbers everywhere. (Unsigned weights could use all eight, at half the speed with VNNI.)
- A table of tokens is stored in int8, each row with its own scale, and scaled after the look-up.
- A convolution's kernel is stored in int8, each output channel with its own scale, and computes in float32: its
  activations would lose too much, and engines are slow at it.

ONNX Runtime's own quantiser gives a table one scale for all its rows, and trips over the types that PyTorch's exporter
notes for weights.
"""

from pathlib import Path
from typing import Any

import numpy as np

LEVELS = 127
MATRIX_LEVELS = 64
"""The largest integer that stands for a weight; of a matrix so that 2 × 255 × 64 < 2¹⁵."""

SMALLEST = 2**14
"""Elements below which a weight isn't worth further operators."""


class Quantizer:
    """Replaces the operators of one graph; `write_quantized` is its use."""

    def __init__(self, graph: Any):
        from onnx import TensorProto, helper, numpy_helper

        self.graph, self.helper, self.numpy = graph, helper, numpy_helper
        self.float, self.integer = TensorProto.FLOAT, TensorProto.INT8
        self.weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == self.float}
        self.nodes: list[Any] = []
        self.new_weights: dict[str, Any] = {}
        self.quantized_inputs: set[str] = set()

    def run(self) -> None:
        kinds = {"MatMul": (1, self.matmul), "Gather": (0, self.gather), "Conv": (1, self.convolution)}
        for node in self.graph.node:
            slot, replace = kinds.get(node.op_type, (0, None))
            weight = self.weights.get(node.input[slot]) if replace else None
            if replace is not None and weight is not None and np.prod(weight.dims) >= SMALLEST:
                replace(node, weight)
            else:
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        for field, values in [("node", self.nodes), ("initializer", [*kept, *self.new_weights.values()])]:
            self.graph.ClearField(field)
            getattr(self.graph, field).extend(values)
        self.graph.ClearField("value_info")

    def add(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(self.helper.make_node(operator, inputs, outputs, name=f"{outputs[0]}_node", **attributes))

    def store(self, weight: Any, axis: int, levels: int = LEVELS, keep_rank: bool = False) -> tuple[str, str]:
        """Put a weight and its scales, one for each index of `axis`, into the graph; returns their names."""
        names = f"{weight.name}_int8", f"{weight.name}_scale"
        if names[0] not in self.new_weights:
            values = self.numpy.to_array(weight)
            others = tuple(other for other in range(values.ndim) if other != axis)
            scales = np.abs(values).max(axis=others, keepdims=True) / levels
            scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
            integers = np.rint(values / scales).astype(np.int8)
            for name, array in zip(names, (integers, scales if keep_rank else scales.reshape(-1)), strict=True):
                self.new_weights[name] = self.numpy.from_array(array, name)
        return names

    def matmul(self, node: Any, weight: Any) -> None:
        matrix, scales = self.store(weight, axis=1, levels=MATRIX_LEVELS)
        (source, _), (out,) = node.input, node.output
        parts = [f"{source}_{part}" for part in ("uint8", "uint8_scale", "uint8_zero")]
        if source not in self.quantized_inputs:  # q, k and v share theirs
            self.add("DynamicQuantizeLinear", [source], parts)
            self.quantized_inputs.add(source)
        self.add("MatMulInteger", [parts[0], matrix, parts[2]], [f"{out}_int32"])
        self.add("Cast", [f"{out}_int32"], [f"{out}_float"], to=self.float)
        self.add("Mul", [parts[1], scales], [f"{out}_scales"])
        self.add("Mul", [f"{out}_float", f"{out}_scales"], [out])

    def gather(self, node: Any, weight: Any) -> None:
        table, scales = self.store(weight, axis=0, keep_rank=True)
        (_, index), (out,) = node.input, node.output
        self.add("Gather", [table, index], [f"{out}_int8"])
        self.add("Gather", [scales, index], [f"{out}_scale"])
        self.add("Cast", [f"{out}_int8"], [f"{out}_float"], to=self.float)
        self.add("Mul", [f"{out}_float", f"{out}_scale"], [out])

    def convolution(self, node: Any, weight: Any) -> None:
        kernel, scales = self.store(weight, axis=0)
        self.add("DequantizeLinear", [kernel, scales], [f"{weight.name}_float"], axis=0)
        node.input[1] = f"{weight.name}_float"
        self.nodes.append(node)


def write_quantized(source: Path, target: Path) -> None:
    import onnx

    model = onnx.load(source)
    Quantizer(model.graph).run()
    onnx.save(model, target)
