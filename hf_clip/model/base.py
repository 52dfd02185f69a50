"""The base class of all models, and every hook into transformers: loading, saving, attention kinds, checkpointing."""

from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import TransformersKwargs

from .attention import BUILT_IN_ATTENTION, attention_of
from .checked_files import DamagedWeightsError, FolderReplacedError, check_weights, read_unchanged
from .configuration_hf_clip import HfClipConfig, HfClipPreTrainedConfig
from .hub_repository import HUB_ARGUMENTS, HubUpload, find_foreign
from .optimized import Optimizable

POSITION_COUNTERS = r"embeddings\.position_ids$"  # in stock repositories from before transformers 4.31

BESIDE_THE_TOWERS = [POSITION_COUNTERS, r"^text_projection\.", r"^visual_projection\.", r"^logit_(scale|bias)$"]
"""Tensors in the file of a whole model that a single tower does not read, besides those of the other tower."""

HEEDED = {"return_dict", "attention_mask", "use_cache", "debug_io", "debug_io_dir", "prune_layers"}

HEEDED |= {*TransformersKwargs.__annotations__} - {"position_ids"}
"""Arguments that have an effect although no `forward` names them: attention and transformers' wrappers read them."""

BY_PRODUCTS = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"}
"""Fields of a tokenizer's output that are ignored without an error: nobody expects an effect of them."""

INSTEAD = {
    "labels": "the loss of pairs is had by return_loss=True, that of classes from HfClipForImageClassification",
    "inputs_embeds": "texts are taken as input_ids",
}


Model = TypeVar("Model", bound="HfClipPreTrainedModel")
"""The class on which `from_pretrained` is called."""


class HfClipPreTrainedModel(HubUpload, Optimizable, PreTrainedModel):
    """Base class of all CLIP models: loading, saving, kinds of attention and gradient checkpointing."""

    config_class = HfClipConfig
    base_model_prefix = "hf_clip"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # otherwise Trainer expects the model to divide the loss by the accumulation steps
    _no_split_modules = [
        "HfClipTextEmbeddings",
        "HfClipViTEmbeddings",
        "HfClipEncoderLayer",
        "HfClipBottleneck",
        "HfClipAttentionPool",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
    ) -> Model:
        """Load a model from a folder or from a repository on the Hub.

        Besides the layout of this package it reads the layout of stock CLIP. With the package installed it also reads
        repositories of open_clip.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` or the converter wrote, or the name of a
                repository, such as "org/clip-vit-b32".
            *args: As for any model of transformers.
            **kwargs: As for any model of transformers: `dtype` (default: that of the
                configuration), `device_map`, `attn_implementation`, `revision`, `subfolder`, `token`, …

        Returns:
            The model in evaluation mode.

        Raises:
            OSError: There is no such folder or repository, its weights are damaged, or the folder was replaced while it
                was read.
            ValueError: The configuration is refused, or the path is that of a single checkpoint file, which must be
                converted first.

        Example::

            model = HfClipModel.from_pretrained("org/clip-vit-l14-336", dtype=torch.bfloat16)
        """
        source, given = pretrained_model_name_or_path, kwargs.get("config")
        model = read_unchanged(source, lambda: cls._read(source, *args, **kwargs), kwargs.get("subfolder"))
        if isinstance(given, HfClipPreTrainedConfig) and not given.is_of_this_writing(source, kwargs.get("subfolder")):
            raise FolderReplacedError(source)
        return model

    @classmethod
    def _read(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        foreign = None if kwargs.get("state_dict") is not None else find_foreign(source, kwargs)
        if foreign is None:
            check_weights(source, kwargs.get("subfolder"))
            try:
                return super().from_pretrained(source, *args, **kwargs)
            except SafetensorError as error:
                raise DamagedWeightsError(source, error) from error
        own = {name: kwargs.pop(name) for name in ("config", "dtype", "torch_dtype") if name in kwargs}
        if isinstance(config := own.pop("config", None), PreTrainedConfig):
            given = kwargs
        else:
            config, given = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
        unused = own | {name: value for name, value in given.items() if name not in HUB_ARGUMENTS}
        model = super().from_pretrained(None, *args, config=config, state_dict=foreign.tensors(), **unused)
        loaded = model[0] if kwargs.get("output_loading_info") else model
        loaded.config.name_or_path = str(source)
        return model

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True, which is right for all models here. transformers would guess it from the class's source text."""
        return True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module, unless its tensors have been loaded.

        For classes outside of transformers, modules without tensors of their own count as loaded, so layers and whole
        models would never be initialised. That rule protects code that writes to tensors directly. Ours does not, so
        the rule is switched off here.
        """
        super()._initialize_weights(module)


def refuse_ignored(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise TypeError for an argument that would have no effect, as Python does for functions without `**kwargs`.

    An argument that is None or False is allowed. With an attention that the user registered every argument is allowed,
    since that attention may read it.
    """
    if attention_of(model.config) not in BUILT_IN_ATTENTION:
        return
    for name, value in arguments.items():
        if name not in HEEDED and name not in BY_PRODUCTS and value is not None and value is not False:
            reason = INSTEAD.get(name, "it would be ignored")
            raise TypeError(f"{type(model).__name__} takes no argument {name!r}: {reason}. Leave it out.")


# A single tower reads and writes its tensors under the names that they have in a whole model, as in stock CLIP.
for _tower, _prefix in [
    ("HfClipTextModel", "text_model"),
    ("HfClipViTModel", "vision_model"),
    ("HfClipResNetModel", "vision_model"),
]:
    register_checkpoint_conversion_mapping(_tower, [PrefixChange(prefix_to_remove=_prefix)], overwrite=True)
