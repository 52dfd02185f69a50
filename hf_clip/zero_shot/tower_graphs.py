"""Open the graphs of both towers that `hf-clip export-onnx` wrote, while the program that needs them goes on.

To open a graph takes longer than to run it once: its weights are read and laid out for this processor.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..extras import require
from ..model.checked_files import one_line
from ..model.variants import VARIANTS, refuse_unknown_variant

ENDINGS = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
"""By the names that `hf-clip export-onnx` takes: what the files are called after the graph's name."""


def find_graphs(model: str, precision: str) -> dict[str, Path]:
    """Find the graphs of both towers.

    Args:
        model: The folder that `hf-clip export-onnx` wrote to.
        precision: A key of `ENDINGS`.

    Returns:
        The files of "text_model" and "vision_model".

    Raises:
        FileNotFoundError: It is no folder, or has no such graphs. The error names the command that makes them.
        ValueError: It is a name like those of OpenAI's models, and none of them.
    """
    folder = Path(model)
    if not folder.is_dir():
        refuse_unknown_variant(model)
        if model in VARIANTS or folder.is_file():
            raise FileNotFoundError(
                f"--onnx reads the graphs of a folder, and {model} is none; make one of it first: hf-clip convert "
                f"{model} FOLDER, then hf-clip export-onnx FOLDER."
            )
        raise FileNotFoundError(
            f"--onnx reads the graphs of a folder, and {model} is none; write them from a repository of that name: "
            f"hf-clip export-onnx {model} FOLDER."
        )
    paths = {name: folder / "onnx" / f"{name}{ENDINGS[precision]}.onnx" for name in ("text_model", "vision_model")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no onnx/{path.name}: {export_again(path)} writes it.")
    return paths


def export_again(path: Path) -> str:
    """The command that writes a graph."""
    precision = next((name for name, end in ENDINGS.items() if end and path.stem.endswith(end)), None)
    return f"hf-clip export-onnx {path.parents[1]}" + (f" --precision {precision}" if precision else "")


def open_graph(path: Path) -> Any:
    """Open a graph with ONNX Runtime, on the processor and with as many threads as it has cores.

    Raises:
        ValueError: The file is damaged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said once, by the error
    # Threads that wait sleep: otherwise they take the cores from those that prepare the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read by ONNX Runtime ({one_line(error)}); export it again: {export_again(path)}."
        ) from error


class TowerGraphs:
    """The graphs of both towers, which two threads begin to open at once.

    Args:
        model: The folder that `hf-clip export-onnx` wrote to.
        precision: "fp32", "fp16" or "int8", as it was exported.

    Attributes:
        folder: The folder.
        paths: The files of "text_model" and "vision_model".
        sessions: Their sessions of ONNX Runtime, in the making. A damaged file is a ValueError of `result()`.

    Raises:
        FileNotFoundError: The folder has no such graphs.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, model: str | Path, precision: str = "fp32"):
        require("Classifying with ONNX Runtime", "onnx", ["onnxruntime"])
        self.folder, self.paths = Path(model), find_graphs(str(model), precision)
        pool = ThreadPoolExecutor(len(self.paths), thread_name_prefix="hf_clip graphs")
        self.sessions: dict[str, Future[Any]] = {
            name: pool.submit(open_graph, path) for name, path in self.paths.items()
        }
        pool.shutdown(wait=False)


__all__ = ["ENDINGS", "TowerGraphs", "export_again", "find_graphs"]
