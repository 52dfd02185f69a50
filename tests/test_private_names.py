"""Names of other libraries that are not public: which are used, where, why, and that the installed versions have them.

A release that takes one away fails here, with its name. Whoever needs another one adds it with its reason, and looks
for a public way first.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted((ROOT / "hf_clip").rglob("*.py")), ROOT / "finetune.py"]

INTERNAL_MODULES = {
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.integrations.deepspeed",
    "transformers.utils.generic",
    "transformers.utils.output_capturing",
}
"""Modules without a private name whose content their library documents nowhere. All of it counts as private here."""


@dataclass(frozen=True)
class Private:
    """A name that is not public.

    Attributes:
        owner: Module, or module and class, that has it.
        name: The name.
        places: The files of ours that use it.
        reason: What it is needed for, and why there is no public way.
    """

    owner: str
    name: str
    places: tuple[str, ...]
    reason: str


MODEL = "transformers.modeling_utils.PreTrainedModel"
IMAGES = "transformers.image_processing_utils.BaseImageProcessor"
PIPELINE = "transformers.pipelines.base.Pipeline"
MODULE = "torch.nn.Module"
TOWERS = ("resnet_tower.py", "text_tower.py", "vit_tower.py")

DECLARED = "a model declares this to transformers, whose own models declare it in the same way"
HOOK = "transformers calls this method to have it done, and there is no public one to override"

NAMES = [
    # transformers
    *(
        Private(MODEL, name, ("base.py",), DECLARED)
        for name in (
            "_no_split_modules",
            "_supports_sdpa",
            "_supports_flash_attn",
            "_supports_flex_attn",
            "_supports_attention_backend",
        )
    ),
    Private(MODEL, "_can_record_outputs", TOWERS, DECLARED),
    Private(MODEL, "_keys_to_ignore_on_load_unexpected", ("modeling_hf_clip.py", *TOWERS), DECLARED),
    Private(MODEL, "_keep_in_fp32_modules_strict", ("resnet_tower.py",), DECLARED),
    Private(MODEL, "_input_embed_layer", TOWERS, DECLARED),
    Private(MODEL, "_init_weights", ("modeling_hf_clip.py", *TOWERS), HOOK),
    Private(MODEL, "_initialize_weights", ("base.py",), HOOK),
    Private(MODEL, "_can_set_attn_implementation", ("base.py",), HOOK),
    Private(MODEL, "_from_config", ("modeling_hf_clip.py",), "a tower takes the dtype and attention of its part"),
    Private(
        "transformers.configuration_utils.PreTrainedConfig",
        "_attn_implementation",
        ("attention.py", "replace.py"),
        "the chosen attention; only setting it has a public name, and that of a whole model",
    ),
    Private(
        "transformers.utils.hub.PushToHubMixin",
        "_upload_modified_files",
        ("hub_repository.py",),
        "the last step of push_to_hub, before which code and card are added",
    ),
    Private(
        "transformers.utils.hub.cached_files",
        "_raise_exceptions_for_missing_entries",
        ("checked_files.py",),
        "without it a missing file and a missing repository raise the same error",
    ),
    Private(
        "transformers.processing_utils.ProcessorMixin",
        "_get_arguments_from_pretrained",
        ("processing_hf_clip.py",),
        HOOK,
    ),
    Private(IMAGES, "_preprocess_image_like_inputs", ("image_processing_hf_clip.py",), HOOK),
    Private(IMAGES, "_set_attributes", ("image_processing_hf_clip.py",), "the settings become attributes"),
    Private(IMAGES, "_standardize_kwargs", ("image_processing_hf_clip.py",), "settings as a call would take them"),
    Private(IMAGES, "_valid_kwargs_names", ("image_processing_hf_clip.py",), "names of the settings"),
    Private("transformers.PreTrainedTokenizerFast", "_encode_plus", ("tokenization_hf_clip.py",), HOOK),
    Private(PIPELINE, "_forward", ("pipeline.py",), HOOK),
    Private(PIPELINE, "_sanitize_parameters", ("pipeline.py",), HOOK),
    Private(PIPELINE, "_preprocess_params", ("pipeline.py",), "what the pipeline was made with"),
    Private(PIPELINE, "_batch_size", ("pipeline.py",), "whether the pipeline was made with a batch size"),
    *(
        Private(PIPELINE, f"_load_{part}", ("pipeline.py",), "the registry's entry declares what has to be loaded")
        for part in ("processor", "image_processor", "video_processor", "feature_extractor", "tokenizer")
    ),
    Private(
        "transformers.integrations.peft.PeftAdapterMixin",
        "_hf_peft_config_loaded",
        ("lora.py",),
        "a model whose adapters were merged has none; transformers has no way to say so but to delete them",
    ),
    Private(
        "transformers.conversion_mapping",
        "register_checkpoint_conversion_mapping",
        ("base.py",),
        "a tower alone reads and writes the names that it has in a whole model",
    ),
    Private("transformers.core_model_loading", "PrefixChange", ("base.py",), "what that mapping consists of"),
    Private("transformers.utils.generic", "can_return_tuple", ("modeling_hf_clip.py",), "return_dict=False"),
    Private(
        "transformers.utils.generic",
        "merge_with_config_defaults",
        TOWERS,
        "output_hidden_states and others of a config",
    ),
    Private("transformers.utils.output_capturing", "capture_outputs", TOWERS, "collects hidden states and attentions"),
    Private(
        "transformers.integrations.deepspeed",
        "unset_hf_deepspeed_config",
        ("launching.py",),
        "a model is built whole, and not in DeepSpeed's parts",
    ),
    # torch
    *(
        Private(MODULE, name, ("linear_map.py",), "whether someone listens to a layer that is to be computed otherwise")
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
            "_compiled_call_impl",
        )
    ),
    Private(MODULE, "_modules", ("cuda_graphs.py",), "whether a layer was replaced; asked in every call"),
    Private("torch.nn.modules.module", "_has_any_global_hook", ("linear_map.py",), "the same for all modules at once"),
    Private(MODULE, "_apply", ("optimized.py",), "every way of moving a model comes down to this"),
    Private(MODULE, "_load_from_state_dict", ("optimized.py",), "the way by which a module around it is loaded"),
    *(
        Private("torch.ops.mkldnn", name, ("layers.py",), "oneDNN with weights in its own order has no public operator")
        for name in (
            "_reorder_linear_weight",
            "_linear_pointwise",
            "_reorder_convolution_weight",
            "_convolution_pointwise",
            "_convolution_pointwise_",
        )
    ),
    Private("torch.ops.mkldnn", "data_ptr", ("huge_pages.py",), "the address of a weight in oneDNN's order"),
    *(
        Private("torch.ops.onednn", name, ("int8_layers.py",), "torch multiplies integers in no public operator")
        for name in ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise")
    ),
    Private(
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        ("failures.py",),
        "the processes of a run agree on which of them reports an error",
    ),
    # ftfy
    Private("ftfy", "_fix_encoding_one_step_and_explain", ("repair_text.py",), "one step at a time, as in fix_text"),
]

PUBLIC = {"_replace", "_exit"}
"""Documented in spite of their underscore: those of named tuples and of os."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def members_of(tree: ast.AST) -> set[str]:
    """What the classes of a file have: methods, fields, and what is set on self or cls."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    found.add(inner.name)
                elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
                    targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
                    if any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets):
                        found |= set(ast.literal_eval(inner.value))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls") else set()
    return found


def names_in(tree: ast.AST) -> set[str]:
    """Every function, class and variable of a file, and what it imports of ours."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return found


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MEMBERS = set().union(*map(members_of, TREES.values()))


def foreign_names(tree: ast.AST) -> set[str]:
    """What a file calls the modules and classes that it imports from other packages."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def uses_in(tree: ast.AST) -> Iterator[str]:
    """Private names of others that a file writes out."""
    own, foreign = MEMBERS | names_in(tree), foreign_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert not any(map(is_private, (node.module or "").split("."))), ast.unparse(node)
            is_internal = node.module in INTERNAL_MODULES
            yield from (alias.name for alias in node.names if is_internal or is_private(alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not any(map(is_private, alias.name.split("."))), ast.unparse(node)
                assert alias.name not in INTERNAL_MODULES, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"torch\.ops\.\w+", ast.unparse(node.value)):
            yield node.attr  # operators have no public documentation, underscore or not
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            of = node.value
            is_theirs = isinstance(of, ast.Name) and of.id in foreign
            is_theirs |= isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super"
            if is_theirs or node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.keyword) and is_private(node.arg or ""):
            yield str(node.arg)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
                yield from (str(name.value) for _ in range(is_private(str(name.value)) and name.value not in own))


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def overridden() -> Iterator[tuple[str, str]]:
    """(file, name): what our classes, mixins included, have under a private name of a foreign base class."""
    for path, tree in TREES.items():
        if path.name in ("__init__.py", "finetune.py"):
            continue
        for value in vars(module_of(path)).values():
            if not inspect.isclass(value) or not value.__module__.startswith("hf_clip"):
                continue
            theirs = [base for base in value.__mro__ if base.__module__.split(".")[0] in ("torch", "transformers")]
            for ours in set(value.__mro__) - set(theirs):
                if ours.__module__ == module_of(path).__name__:
                    named = [name for name in vars(ours) if is_private(name) and name in members_of(tree)]
                    yield from ((path.name, n) for n in named if any(n in vars(base) for base in theirs))


def resolve(owner: str) -> Any:
    """The module, or what it has under the rest of the name."""
    parts = owner.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(owner)


def test_every_private_name_is_listed_where_it_is_used():
    used = {(path.name, name) for path, tree in TREES.items() for name in uses_in(tree)} | set(overridden())
    listed = {(place, private.name) for private in NAMES for place in private.places}
    assert used - listed == set(), "find a public way, or list it with the reason why there is none"
    assert listed - used == set(), "no longer used: take it from the list"


@pytest.mark.parametrize("private", NAMES, ids=lambda private: f"{private.owner}.{private.name}")
def test_installed_version_has_it(private: Private):
    owner = resolve(private.owner)
    # What an instance has, and the arguments of a function, are found in the source.
    is_there = hasattr(owner, private.name) or re.search(rf"\b{private.name}\b", inspect.getsource(owner))
    assert is_there, f"{private.owner} has no {private.name} any more; {', '.join(private.places)}: {private.reason}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._name", ["_name"]),
        ("from torch import _name", ["_name"]),
        ("from transformers.utils.generic import anything", ["anything"]),
        ("f(_name=1)", ["_name"]),
        ("import torch\ntorch.ops.library.name.overload", ["name"]),
        ("getattr(x, '_name')", ["_name"]),
        ("class A:\n    def f(self): return super()._name", ["_name"]),
        ("class A:\n    _name = 1\nA()._name", []),
        ("import os\nos._exit(0)", []),
    ],
)
def test_search_finds_what_it_is_for(source: str, found: list[str]):
    assert list(uses_in(ast.parse(source))) == found
