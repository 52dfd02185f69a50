"""The independent reference: `openai-clip`'s own model, with seeded random weights, in the original's file format.

`import clip` would ask for torchvision, so the package's `model.py` and `simple_tokenizer.py` are loaded as files, and
so are open_clip's.
"""

import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from hf_clip import Variant


@cache
def load_reference_module(name: str) -> ModuleType:
    """`openai-clip`'s module of this name (`model` or `simple_tokenizer`)."""
    package = find_spec("clip")
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders or not (path := Path(folders[0]) / f"{name}.py").is_file():
        raise ModuleNotFoundError("The reference implementation is missing: pip install openai-clip==1.0.1")
    spec = spec_from_file_location(f"openai_clip_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPEN_CLIP_FILES = "open_clip_files"


def load_open_clip_module(name: str) -> ModuleType | None:
    """open_clip's module of this name (`model` or `loss`), as a file; None where the package isn't installed.

    `import open_clip` wants torchvision, of which these modules need one name, and that for locked towers alone.
    """
    package = find_spec("open_clip")
    if package is None:
        return None
    if OPEN_CLIP_FILES not in sys.modules:
        files = ModuleType(OPEN_CLIP_FILES)
        files.__path__ = list(package.submodule_search_locations or [])
        sys.modules[OPEN_CLIP_FILES] = files
    stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Identity  # type: ignore[attr-defined]
    absent = {name: stub for name, stub in stubs.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        return import_module(f"{OPEN_CLIP_FILES}.{name}")
    finally:
        for stub in absent:
            del sys.modules[stub]


def reference_dimensions(variant: Variant) -> dict[str, object]:
    """The arguments of the reference's constructor for one of the nine models."""
    return {
        "embed_dim": variant.embed_dim,
        "image_resolution": variant.image_size,
        "vision_layers": variant.vision_layers,
        "vision_width": variant.vision_width,
        "vision_patch_size": variant.patch_size,
        "context_length": 77,
        "vocab_size": 49408,
        "transformer_width": variant.text_width,
        "transformer_heads": variant.text_heads,
        "transformer_layers": 12,
    }


@torch.no_grad()
def build_reference(dimensions: dict[str, object], seed: int) -> nn.Module:
    """The reference model in evaluation mode, float32, every parameter and statistic random.

    Fresh weights would hide errors: gains of one, biases of zero and unit statistics make whole layers invisible.
    """
    torch.manual_seed(seed)
    model = load_reference_module("model").CLIP(**dimensions).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(std=0.1)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
            module.get_buffer("num_batches_tracked").fill_(1000)
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_bias.normal_(std=0.1)
            module.out_proj.bias.normal_(std=0.1)
    return model


def halve(model: nn.Module) -> None:
    """Store the weights as the originals do: matrices in float16, gains, biases and statistics in float32."""
    load_reference_module("model").convert_weights(model)


class _Branch(nn.Module):
    """A node of the tree of names; it computes nothing."""


def _branch_at(root: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in dict(root.named_children()):
            root.add_module(name, _Branch())
        root = root.get_submodule(name)
    return root


def write_archive(model: nn.Module, path: Path, image_size: int) -> None:
    """Write a model's tensors as a TorchScript archive, the format of the published checkpoints.

    The three scalars that the originals carry beside their weights are written too.
    """
    root = _Branch()
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        *parents, leaf = name.split(".")
        branch = _branch_at(root, parents)
        if name in parameters:
            branch.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            branch.register_buffer(leaf, tensor)
    context_length, vocab_size = (len(parameters[n]) for n in ("positional_embedding", "token_embedding.weight"))
    sizes = {"input_resolution": image_size, "context_length": context_length, "vocab_size": vocab_size}
    for name, value in sizes.items():
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; this is the one way to its real files
        torch.jit.save(torch.jit.script(root), str(path))
