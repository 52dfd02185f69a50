"""A CLIP as ONNX graphs, for browsers and inference servers.

onnx/{model,text_model,vision_model}{,_fp16,_quantized}.onnx, with the inputs and outputs of a stock CLIP. Each graph is
run by ONNX Runtime and held against the model, for several batch sizes and text lengths, before any file is put in
place. What transformers.js reads beside the graphs and the model's folder lacks is written too.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..extras import require
from ..model.checked_files import find_file, read_object
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import VARIANTS
from .folders import in_one_line
from .onnx_choices import LEAST_COSINE, PRECISIONS
from .onnx_graphs import GRAPHS, Graph, write_graph
from .onnx_int8 import write_quantized
from .onnx_precision import MOST_ERROR, Comparison, Deviation, write_half
from .stock import stock_image_processor
from .whole_file import write_json
from .whole_folder import check_destination, whole_folder
from .write import print_note

BESIDE = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
"""What goes along into another folder: all but the weights."""


@dataclass
class Written:
    """One file of weights and graph, with what lies beside it."""

    name: str
    nbytes: int
    deviation: Deviation
    external: bool


def load_model(source: str | Path) -> HfClipModel:
    """The model in float32.

    Raises ValueError for what must be converted first and for a folder that holds a part of a model or a damaged file,
    OSError for what isn't there.
    """
    if str(source) in VARIANTS or Path(source).is_file():
        kind = "a file" if Path(source).is_file() else "one of OpenAI's checkpoints"
        raise ValueError(f"{source} is {kind}; make a folder of it first: hf-clip convert {source} FOLDER")
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    with in_one_line(source):
        model, loaded = HfClipModel.from_pretrained(source, **settings)
    if absent := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{source} has no weights for {absent[0]} and {len(absent) - 1:,} more, which would be random numbers: it "
            f"holds a part of a model, and both towers with their projections are needed."
        )
    return model.eval()


def check(name: str, precision: str, deviation: Deviation, force: bool) -> None:
    """Refuse a graph that is too far from the model; NaN is."""
    if precision == "fp32":
        if not deviation.error <= MOST_ERROR:
            raise ValueError(
                f"{name} differs from the model by {deviation.error:.1e}, and only {MOST_ERROR:.0e} can be rounding; "
                f"nothing was written. Report this with the versions of torch, onnx and onnxruntime."
            )
    elif not deviation.cosine >= LEAST_COSINE and not force:
        raise ValueError(
            f"{name} has a cosine of {deviation.cosine:.4f} with the model's embeddings, below {LEAST_COSINE}; nothing "
            f"was written. Leave {precision} out, or pass --force to write it all the same."
        )


def write_precisions(graph: Graph, folder: Path, precisions: list[str], force: bool) -> list[Written]:
    """Write and check one graph's files."""
    written = []
    comparison = Comparison(graph)
    plain = folder / f"{graph.name}.onnx"
    for precision in ["fp32", *(name for name in precisions if name != "fp32")]:
        path = folder / f"{graph.name}{PRECISIONS[precision]}.onnx"
        if precision == "fp32":
            write_graph(graph, path)
        else:
            (write_half if precision == "fp16" else write_quantized)(plain, path)
        deviation = comparison.measure(path)
        check(path.name, precision, deviation, force)
        files = [path, data] if (data := Path(f"{path}_data")).exists() else [path]
        size = sum(file.stat().st_size for file in files)
        written.append(Written(path.name, size, deviation, external=len(files) > 1))
    if "fp32" in precisions:
        return written
    for file in [plain, Path(f"{plain}_data")]:
        file.unlink(missing_ok=True)
    return written[1:]


def write_descriptions(
    source: str | Path,
    out: Path,
    folder: Path,
    model: HfClipModel,
    written: list[Written],
    note: Callable[[str], None],
) -> None:
    """Put into `folder` what `out` needs beside its graphs and lacks.

    source: where the model was read from; `out` itself, or a folder or repository whose descriptions are copied
    """
    is_elsewhere = not Path(source).is_dir() or Path(source).resolve() != out.resolve()
    found = {name: find_file(source, name, {}) for name in BESIDE}
    if found["config.json"] is None:  # another library's layout
        if not is_elsewhere:
            raise ValueError(f"{source} has no config.json, which browsers read; name another folder to write to.")
        model.config.save_pretrained(folder)
        HfClipProcessor.from_pretrained(source).save_pretrained(folder)
    elif is_elsewhere:
        for name, path in found.items():
            if path is not None:
                shutil.copyfile(path, folder / name)
    config = Path(found["config.json"] or folder / "config.json")
    describe_data_files(config, out / "config.json", folder / "config.json", written)
    if found["preprocessor_config.json"] is None:
        try:
            images = stock_image_processor(HfClipImageProcessor.from_pretrained(source))
        except (OSError, ValueError) as error:
            note(f"there is no preprocessor_config.json for transformers.js: {error}")
            return
        write_json(folder / "preprocessor_config.json", images, sort_keys=True)


def describe_data_files(config: Path, earlier: Path, target: Path, written: list[Written]) -> None:
    """Say in config.json which graphs have their weights in a file beside them; transformers.js looks there.

    earlier: what an earlier export may have said of graphs that stay
    """
    values = read_object(config)
    settings = (read_object(earlier) if earlier.is_file() else values).get("transformers.js_config", {})
    settings = settings if isinstance(settings, dict) else {}
    before = settings.get("use_external_data_format", {})
    known = dict(before) if isinstance(before, dict) else {}
    for file in written:
        known.pop(file.name, None)
        if file.external:
            known[file.name] = 1
    if known or before:
        values["transformers.js_config"] = settings | {"use_external_data_format": known}
        write_json(target, values)


@contextmanager
def graph_folder(out: Path, beside: Path) -> Iterator[Path]:
    """Where graphs are written until they are whole. An `onnx` that `out` has already is added to."""
    if (out / "onnx").is_dir():
        with whole_folder(out / "onnx") as folder:
            yield folder
    else:
        (beside / "onnx").mkdir()
        yield beside / "onnx"


def export_onnx(
    source: str | Path,
    out: str | Path | None = None,
    *,
    precisions: list[str] | None = None,
    force: bool = False,
    note: Callable[[str], None] = print_note,
) -> list[Written]:
    """Export a model into `out/onnx`; see the module.

    Args:
        source: A folder or repository that HfClipModel.from_pretrained reads.
        out: The folder to write to; by default `source` itself, if it is a folder.
        precisions: Names of `PRECISIONS`; by default float32 alone.
        force: Whether smaller graphs are written that are further from the model than they should be.
        note: Called with a line that the user should read.

    Returns:
        The files, and how far each graph is from the model.

    Raises:
        ImportError: A package of the extra `onnx` is missing.
        OSError: A file or folder is missing, in use or full.
        ValueError: The source is no folder of a whole model, or a graph is too far from it. Nothing is written then.
    """
    precisions = list(dict.fromkeys(precisions or ["fp32"]))
    require("Exporting to ONNX", "onnx")
    if out is None and not Path(source).is_dir():
        raise ValueError(f"{source} is no folder; name one to write to: hf-clip export-onnx {source} OUT")
    out = check_destination(source if out is None else out, overwrite=True)
    model = load_model(source)
    written: list[Written] = []
    with whole_folder(out) as beside, graph_folder(out, beside) as folder:
        for kind in GRAPHS:
            written += write_precisions(kind(model), folder, precisions, force)
        write_descriptions(source, out, beside, model, written, note)
    return written


__all__ = ["LEAST_COSINE", "PRECISIONS", "Written", "export_onnx"]
