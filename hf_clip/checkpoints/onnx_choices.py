"""What an ONNX export may be asked for: known without torch, for the help and for a command line that is refused."""

PRECISIONS = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
"""By the names that the command takes: what the files are called after the graph's name."""

LEAST_COSINE = 0.99
"""Between an embedding of a smaller graph and the model's."""

__all__ = ["LEAST_COSINE", "PRECISIONS"]
