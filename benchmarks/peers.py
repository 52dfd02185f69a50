"""Ours and the peers as image and text encoders, all with the same random weights, which lie in a folder on disk.

An encoder takes a batch (pixel_values, or input_ids with attention_mask, and `padded`, the ids filled with zeros to
77 columns as OpenAI's and open_clip's code takes them) and returns features (B, D), not normalised. Ours is what a
user gets from `from_pretrained(...).eval()`. The engines run a model that was exported from transformers' CLIP, or from
OpenAI's code for a ResNet, so that what they are given doesn't depend on ours.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel

from conversion.reference import build_reference, load_open_clip_module, load_reference_module, reference_dimensions
from hf_clip import HfClipConfig, HfClipModel, Variant
from hf_clip.checkpoints.keys import convert_names, original_names

from .ceiling import TEXT_LAYERS
from .measuring import OURS, PRECISIONS, LeftOutError, first_line

OPTIMIZED = f"{OURS}, optimized"
INT8 = f"{OURS}, int8"
OPENAI, STOCK, OPEN_CLIP = "openai-clip", "transformers", "open_clip"
ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"
OPENVINO_INT8 = f"{OPENVINO}, int8"
IN_INT8 = (INT8, OPENVINO_INT8)
"""Measured beside bfloat16, in which what is no product stays."""

COMPILED, WITHOUT_FLASH = "compiled", "without flash"
CONTEXT = 77

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision's operators are not there

Batch = dict[str, Tensor]
Encoder = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """What an implementation is to be built for: kind is "image" or "text"."""

    variant: Variant
    folder: Path
    kind: str
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1


@contextmanager
def weights_folder(variant: Variant) -> Iterator[Path]:
    """A temporary folder with a model of ours, as `save_pretrained` writes it, that has OpenAI's random weights."""
    config = HfClipConfig.from_variant(variant.name)
    with torch.device("meta"):
        model = HfClipModel(config)
    state = convert_names(build_reference(reference_dimensions(variant), seed=0).state_dict(), config)
    model.load_state_dict(state, assign=True)
    with tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as folder:
        model.save_pretrained(folder)
        del model, state
        yield Path(folder)


def load_ours(folder: Path) -> HfClipModel:
    return HfClipModel.from_pretrained(folder).eval()


def load_openai(variant: Variant, folder: Path) -> nn.Module:
    model = load_reference_module("model").CLIP(**reference_dimensions(variant)).eval()
    state = original_names(load_file(folder / "model.safetensors"), HfClipConfig.from_pretrained(folder))
    model.load_state_dict(state, assign=True)
    return model


def load_stock(variant: Variant, folder: Path) -> CLIPModel:
    if variant.patch_size is None:
        raise LeftOutError("it has no ResNets")
    config = HfClipConfig.from_pretrained(folder).to_dict()
    return CLIPModel.from_pretrained(folder, config=CLIPConfig(**config)).eval()


def load_open_clip(variant: Variant, folder: Path) -> nn.Module:
    model = new_open_clip(variant)
    state = original_names(load_file(folder / "model.safetensors"), HfClipConfig.from_pretrained(folder))
    model.load_state_dict(state, assign=True)
    return model.eval()


def new_open_clip(variant: Variant, text_layers: int = TEXT_LAYERS) -> nn.Module:
    """open_clip's CLIP with weights of its own."""
    module = load_open_clip_module("model")
    if module is None:
        raise LeftOutError("it is not installed (pip install --no-deps open_clip_torch)")
    vision: dict[str, Any] = {"image_size": variant.image_size, "layers": variant.vision_layers}
    vision |= {"width": variant.vision_width}
    if variant.patch_size:
        vision |= {"patch_size": variant.patch_size, "head_width": variant.vision_width // variant.vision_heads}
    text: dict[str, Any] = {
        "context_length": CONTEXT,
        "vocab_size": 49408,
        "width": variant.text_width,
        "heads": variant.text_heads,
    }
    text |= {"layers": text_layers}
    return module.CLIP(embed_dim=variant.embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=True)


def cast(model: nn.Module, case: Case) -> nn.Module:
    """To the case's device and precision.

    OpenAI's LayerNorm computes in float32 whatever it is given, so its gains stay there, as in `convert_weights`.
    """
    model = model.to(case.device, PRECISIONS[case.precision])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and type(module).__module__.startswith("openai_clip"):
            module.float()
    return model


def encoder_of(model: Any, case: Case) -> Encoder:
    """The call that gives features, each project's own."""
    dtype = PRECISIONS[case.precision]
    if isinstance(model, CLIPModel):
        if case.kind == "image":
            return lambda batch: model.get_image_features(batch["pixel_values"].to(dtype)).pooler_output
        return lambda batch: model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    if case.kind == "image":
        return lambda batch: model.encode_image(batch["pixel_values"].to(dtype))
    if isinstance(model, HfClipModel):
        return lambda batch: model.encode_text(batch["input_ids"], batch["attention_mask"])
    return lambda batch: model.encode_text(batch["padded"])


def optimized(case: Case, precision: str | None = None) -> Encoder:
    model: Any = cast(load_ours(case.folder), case)
    model.optimize_for_inference(precision=precision)
    return encoder_of(model, case)


def compiled(model: nn.Module, case: Case) -> Encoder:
    return torch.compile(encoder_of(model, case), dynamic=False)


def without_flash(model: nn.Module, case: Case) -> Encoder:
    encode = encoder_of(model, case)

    def restricted(batch: Batch) -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return encode(batch)

    return restricted


class ExportedTower(nn.Module):
    """A peer's tower as a module of tensors, which is what can be exported."""

    def __init__(self, case: Case):
        super().__init__()
        self.kind = case.kind
        self.is_stock = case.variant.patch_size is not None
        loaded = load_stock(case.variant, case.folder) if self.is_stock else load_openai(case.variant, case.folder)
        self.model: Any = loaded

    def forward(self, first: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if not self.is_stock:
            return self.model.encode_image(first) if self.kind == "image" else self.model.encode_text(first)
        if self.kind == "image":
            return self.model.get_image_features(first).pooler_output
        return self.model.get_text_features(first, attention_mask).pooler_output


def export_inputs(case: Case) -> dict[str, Tensor]:
    """Two examples; what a tower takes, by name."""
    if case.kind == "image":
        return {"pixel_values": torch.randn(2, 3, case.variant.image_size, case.variant.image_size)}
    ids = torch.tensor([[49406, *range(320, 328), 49407], [49406, *range(330, 338), 49407]])
    if case.variant.patch_size is None:
        return {"padded": nn.functional.pad(ids, (0, CONTEXT - ids.shape[1]))}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def openvino(case: Case, *, in_int8: bool = False) -> Encoder:
    """`in_int8`: weights in int8, and activations quantised in each call, so that nothing has to be calibrated."""
    if find_spec("openvino") is None:
        raise LeftOutError("it is not installed (pip install openvino)")
    import openvino

    inputs = export_inputs(case)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every shape that it fixes
        exported = openvino.convert_model(ExportedTower(case).eval(), example_input=tuple(inputs.values()))
    more = {}
    if in_int8:
        if find_spec("nncf") is None:
            raise LeftOutError("nncf is not installed (pip install nncf)")
        import nncf

        nncf.set_log_level(logging.ERROR)
        exported = nncf.compress_weights(exported, mode=nncf.CompressWeightsMode.INT8_SYM)
        more = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}  # the fastest of the sizes that it took here
    hint = {"float32": "f32", "bf16": "bf16"}[case.precision]
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
    } | more
    run = openvino.Core().compile_model(exported, "CPU", settings)
    return lambda batch: torch.from_numpy(run([batch[name].numpy() for name in inputs])[0])


def export_to_onnx(case: Case, path: Path) -> tuple[str, ...]:
    """Write the tower as an ONNX file that takes any batch and text length; the names of its inputs."""
    inputs = export_inputs(case)
    shapes: list[dict[int, Any]] = [{0: torch.export.Dim.DYNAMIC} for _ in inputs]
    if "attention_mask" in inputs:
        shapes = [shape | {1: torch.export.Dim.DYNAMIC} for shape in shapes]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            ExportedTower(case).eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            dynamic_shapes=tuple(shapes),
            dynamo=True,
            verbose=False,
        )
    return tuple(inputs)


def onnx_runtime(case: Case) -> Encoder:
    if absent := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise LeftOutError(f"{absent[0]} is not installed (pip install onnx onnxscript onnxruntime)")
    if case.precision != "float32":
        raise LeftOutError(f"it has no {case.precision} on a CPU")
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as folder:
        names = export_to_onnx(case, Path(folder) / "tower.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.log_severity_level = 3
        path = str(Path(folder) / "tower.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])


BUILDERS: dict[str, Callable[[Case], Encoder]] = {
    OURS: lambda case: encoder_of(cast(load_ours(case.folder), case), case),
    OPTIMIZED: optimized,
    f"{OURS}, {COMPILED}": lambda case: compiled(cast(load_ours(case.folder), case), case),
    f"{OURS}, {WITHOUT_FLASH}": lambda case: without_flash(cast(load_ours(case.folder), case), case),
    OPENAI: lambda case: encoder_of(cast(load_openai(case.variant, case.folder), case), case),
    STOCK: lambda case: encoder_of(cast(load_stock(case.variant, case.folder), case), case),
    OPEN_CLIP: lambda case: encoder_of(cast(load_open_clip(case.variant, case.folder), case), case),
    f"{STOCK}, {COMPILED}": lambda case: compiled(cast(load_stock(case.variant, case.folder), case), case),
    f"{STOCK}, {WITHOUT_FLASH}": lambda case: without_flash(cast(load_stock(case.variant, case.folder), case), case),
    ONNX_RUNTIME: onnx_runtime,
    OPENVINO: openvino,
    INT8: lambda case: optimized(case, "int8"),
    OPENVINO_INT8: lambda case: openvino(case, in_int8=True),
}
ON_CPU = (
    OURS,
    OPTIMIZED,
    INT8,
    OPENAI,
    STOCK,
    OPEN_CLIP,
    f"{STOCK}, {COMPILED}",
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_INT8,
)
ON_GPU = tuple(name for name in BUILDERS if name not in (ONNX_RUNTIME, OPENVINO, *IN_INT8))


def build(name: str, case: Case) -> Encoder:
    """One implementation, to be called in inference mode by itself. Raises LeftOutError where that can't be."""
    try:
        encode = BUILDERS[name](case)
    except LeftOutError as error:
        raise LeftOutError(f"{name} is left out: {error}") from None
    except Exception as error:
        raise LeftOutError(f"{name} is left out: {first_line(error)}") from error

    @torch.inference_mode()
    def encode_in_inference_mode(batch: Batch) -> Tensor:
        return encode(batch)

    return encode_in_inference_mode
