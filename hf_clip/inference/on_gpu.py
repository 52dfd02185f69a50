"""Make the changes that pay on a GPU to a model. Each is timed on this model and this GPU, and then kept or undone.

1. A ResNet whose BatchNorm was folded: the layout of its weights, its attention pool, ReLU and sums in cuDNN's pass.
2. Queries, keys and values from one product.
3. `encode_image` computes a ViT's last layer for the class token alone.
4. `encode_text` brings texts to a multiple of 8 columns, so that few shapes occur. Many texts are sorted by length.
5. Calls whose kernels take less time than Python needs to launch them become CUDA graphs.

Flash attention needs no change: torch takes it for float16 and bfloat16 wherever there is no mask. The text tower has
none as long as no `attention_mask` is given, since its attention is causal by itself.

Dimensions: B batch, T texts, L text length, D embedding, W tower width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model.attention import HfClipAttention, HfClipEncoderLayer
from ..model.matryoshka import truncate
from ..model.resnet_tower import HfClipAttentionPool
from ..model.text_ends import find_ends
from .batches import is_of_own_size, towers_of, wants_all_layers
from .cuda_graphs import Entry, Graphs, Outputs
from .gpu_layers import (
    CudnnConv2d,
    FusedAttention,
    can_fuse,
    compute_in_one_pass_,
    convolutions_of,
    has_cudnn,
    set_layout_,
)
from .gpu_times import batch_that_fills_the_gpu, gain_of
from .layers import SingleQueryAttentionPool
from .measure import LEAST_GAIN
from .needed_positions import can_encode_by_class_token, encode_by_class_token, parts_around_the_last_layer
from .replace import LEFT, has_hooks

LEAST_GAIN_OF_A_TOWER = 1.02
"""A change is kept if a whole tower, or the whole of `encode_image`, is at least this many times as fast with it."""

COLUMNS = 8
"""Texts are padded to a multiple of this."""

POSITIONS_WORTH_SORTING = 4096
"""Least number of positions T · L for which texts are sorted by length. The GPU then has to tell the lengths."""

LEAST_POSITIONS_OF_A_PART = 2048
"""A part of sorted texts has at least so many positions, unless it is the last."""


def suit_the_gpu_(model: Any) -> list[str]:
    """Make all changes of this file to a model on a GPU. Returns descriptions of what was done and what was left."""
    with torch.cuda.device(model.device), torch.inference_mode(False), torch.no_grad():
        by_class_token = can_encode_by_class_token(model)
        done: list[str] = []
        for tower in [module for module in model.modules() if hasattr(module, "attnpool")]:
            done += suit_convolutions_(tower)
        for tower in [module for module in model.modules() if hasattr(module, "encoder")]:
            done += fuse_projections_(tower)
        if by_class_token:
            gain, count = gain_of_class_token(model)
            by_class_token = gain >= LEAST_GAIN_OF_A_TOWER
            done.append(
                _describe("encode_image computes its last layer for the class token alone", gain, count, "images")
            )
        done += use_graphs_(model, by_class_token)
    return done


def _describe(what: str, gain: float, count: int, unit: str) -> str:
    if not gain:
        return f"{what}: {LEFT}; there is not enough memory to time it with {count} {unit}"
    kept = "" if gain >= LEAST_GAIN_OF_A_TOWER else f": {LEFT}"
    return f"{what}{kept}; with {count} {unit} {gain:.2f} times as fast here"


def example_of(tower: Any, count: int) -> Tensor:
    """Random images (count, C, Y, X) for a tower, or texts (count, L) of full length."""
    device = next(tower.parameters()).device
    if tower.main_input_name == "pixel_values":
        shape = (count, tower.config.num_channels, tower.config.image_size, tower.config.image_size)
        return torch.rand(shape, device=device, dtype=tower.dtype)
    ids = torch.ones(count, tower.config.max_position_embeddings, device=device, dtype=torch.long)
    ids[:, 0] = tower.config.bos_token_id or 0
    ids[:, -1] = tower.config.eos_token_id or 0
    return ids


def gain_of_switch(tower: Any, switch: Callable[[bool], None], count: int) -> float:
    """Return how many times as fast a tower is with a change; 0 if memory ran out. It is left without the change."""
    example = example_of(tower, count)

    def work() -> None:
        tower(example)

    try:
        return gain_of(work, work, switch)
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        switch(False)


def _batch_of(tower: Any) -> int:
    def work_of(count: int) -> Callable[[], object]:
        example = example_of(tower, count)
        return lambda: tower(example)

    return batch_that_fills_the_gpu(work_of)


# --- ResNets --------------------------------------------------------------------------------------------------------


def suit_convolutions_(tower: Any) -> list[str]:
    """Choose the layout of a ResNet's weights, its attention pool, and whether cuDNN computes ReLU and sums too."""
    if not convolutions_of(tower):  # it was left as it was, and a line says why
        return []
    done, count = [], _batch_of(tower)
    if tower.dtype == torch.float32:  # tensor cores, which take two-byte numbers, have channels last
        set_layout_(tower, torch.contiguous_format)
        gain = gain_of_switch(tower, lambda is_so: set_layout_(tower, _layout(is_so)), count)
        is_better = gain >= LEAST_GAIN_OF_A_TOWER
        set_layout_(tower, _layout(is_better))
        done.append(_describe("convolutions with channels last", gain, count, "images"))
    if isinstance(tower.attnpool, SingleQueryAttentionPool):

        def switch(has_single_query: bool) -> None:
            tower.attnpool.__class__ = SingleQueryAttentionPool if has_single_query else HfClipAttentionPool

        gain = gain_of_switch(tower, switch, count)
        switch(gain >= LEAST_GAIN_OF_A_TOWER)
        done.append(_describe("the attention pool's one query instead of keys and values", gain, count, "images"))
    if has_cudnn():
        what = "ReLU and sums in cuDNN's pass of the convolutions"
        if not is_right_in_one_pass(tower):
            return [*done, f"{what}: {LEFT}; cuDNN has no kernels for them here, or wrong ones"]
        gain = gain_of_switch(tower, lambda is_so: compute_in_one_pass_(tower, is_so), count)
        compute_in_one_pass_(tower, gain >= LEAST_GAIN_OF_A_TOWER)
        done.append(_describe(what, gain, count, "images"))
    return done


def _layout(has_channels_last: bool) -> torch.memory_format:
    return torch.channels_last if has_channels_last else torch.contiguous_format


def is_right_in_one_pass(tower: Any) -> bool:
    """Whether cuDNN's operators with ReLU give a ResNet's features, whatever was in the memory of their outputs.

    torch hands the empty output to cuDNN as a summand with the factor 0. If a kernel did multiply it, a NaN that lies
    there would spread. So the memory that the outputs will get is filled with NaN before.
    """
    images = example_of(tower, 3)
    try:
        expected = tower(images).pooler_output.float()
        compute_in_one_pass_(tower, True)
        torch.cuda.empty_cache()
        free = [torch.full((2**20 * mebibytes // 4,), float("nan"), device=images.device) for mebibytes in (512, 64, 1)]
        del free
        found = tower(images).pooler_output.float()
        is_used = any(isinstance(layer, CudnnConv2d) and not layer.has_no_kernel for layer in tower.modules())
    except RuntimeError:
        return False
    finally:
        compute_in_one_pass_(tower, False)
    tolerance = 1e-5 if tower.dtype == torch.float32 and not _rounds_to_tf32() else 2e-2
    return is_used and bool((found - expected).norm() <= tolerance * expected.norm())


def _rounds_to_tf32() -> bool:
    """Whether convolutions of float32 may be computed in TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the precision was set in another of torch's ways
        return True


# --- transformers ---------------------------------------------------------------------------------------------------


def fuse_projections_(tower: Any) -> list[str]:
    """Let queries, keys and values come from one product, in the layers of a tower where that is possible."""
    layers: list[Any] = [module for module in tower.modules() if isinstance(module, HfClipEncoderLayer)]
    attentions = [layer.self_attn for layer in layers if can_fuse(layer.self_attn)]
    if not attentions:
        return []
    for attention in attentions:
        FusedAttention.join_weights_(attention)

    def switch(is_fused: bool) -> None:
        for attention in attentions:
            attention.__class__ = FusedAttention if is_fused else HfClipAttention

    count = _batch_of(tower)
    gain = gain_of_switch(tower, switch, count)
    switch(gain >= LEAST_GAIN_OF_A_TOWER)
    unit = "images" if tower.main_input_name == "pixel_values" else "texts"
    return [_describe(f"queries, keys and values of {len(attentions)} layers in one product", gain, count, unit)]


def gain_of_class_token(model: Any) -> tuple[float, int]:
    """Return how many times as fast images are encoded with the last layer for the class token alone, and how many.

    The first is 0 if memory ran out.
    """
    tower = model.vision_model
    count = _batch_of(tower)
    images = example_of(tower, count)
    try:
        return gain_of(lambda: model.encode_image(images), lambda: encode_by_class_token(model, images)), count
    except torch.OutOfMemoryError:
        return 0.0, count


# --- texts and graphs -----------------------------------------------------------------------------------------------


def _is_ours(model: Any, name: str, *methods: str) -> bool:
    """Whether a method is this package's, and not that of a subclass or a patch."""
    return name not in vars(model) and getattr(getattr(type(model), name, None), "__qualname__", None) in methods


def _is_graph() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def use_graphs_(model: Any, by_class_token: bool) -> list[str]:
    """Let `encode_image`, `encode_text` and the towers by themselves become graphs where that is faster."""
    done: list[str] = []
    graphs = Graphs(model.device, done.append)
    changed: list[tuple[Any, str, tuple[Callable[..., Any], Entry]]] = []
    tried: list[tuple[Any, str, Tensor]] = []
    if _is_ours(model, "encode_image", "HfClipModel.encode_image"):
        changed.append((model, "encode_image", image_encoder(model, graphs, by_class_token)))
        tried.append((model, "encode_image", example_of(model.vision_model, 1)))
    if _is_ours(model, "encode_text", "HfClipModel.encode_text"):
        changed.append((model, "encode_text", text_encoder(model, graphs)))
        tried.append((model, "encode_text", example_of(model.text_model, 1)[:, -2 * COLUMNS :]))
        done.append(f"encode_text pads to a multiple of {COLUMNS} columns, and sorts many texts by length")
    for tower in towers_of(model):
        if _is_ours(tower, "forward", *(f"HfClip{kind}Model.forward" for kind in ("Text", "ViT", "ResNet"))):
            changed.append((tower, "forward", tower_encoder(tower, graphs)))
            tried += [] if hasattr(model, "encode_image") else [(tower, "forward", example_of(tower, 1))]
    if not changed:
        return []
    done.append(f"a shape of input that comes again becomes a CUDA graph if that is {LEAST_GAIN} times as fast")
    for owner, name, (function, _) in changed:
        setattr(owner, name, function)
    for _, _, (_, entry) in changed:  # after all of them, since they are part of one another
        entry.watch()
        if not entry.is_as_recorded():
            done.append(f"CUDA graphs of {entry.name}: {LEFT}; a part has hooks, or a forward that was replaced")
    for owner, name, example in tried:
        for _ in range(2):  # at the second time the graph is made
            getattr(owner, name)(example)
    graphs.say = lambda line: model.optimizations.append(line)
    return done


def image_encoder(model: Any, graphs: Graphs, by_class_token: bool) -> tuple[Callable[..., Tensor], Entry]:
    """Make an `encode_image` that uses graphs."""
    whole, tower = model.encode_image, model.vision_model

    def compute(images: Tensor) -> Outputs:
        if by_class_token and not any(map(has_hooks, parts_around_the_last_layer(tower))):
            return (encode_by_class_token(model, images),)
        return (whole(images),)

    entry = Entry("encode_image", compute, (tower, model.visual_projection))

    def encode_image(
        pixel_values: Tensor, interpolate_pos_encoding: bool = False, truncate_dim: int | None = None
    ) -> Tensor:
        if _is_graph() or not is_of_own_size(pixel_values, tower) or not len(pixel_values):
            return whole(pixel_values, interpolate_pos_encoding, truncate_dim)
        (features,) = graphs.run(entry, pixel_values)
        return truncate(features, truncate_dim, model.config)

    return encode_image, entry


def text_encoder(model: Any, graphs: Graphs) -> tuple[Callable[..., Tensor], Entry]:
    """Make an `encode_text` that uses graphs for few texts, and sorts many by length."""
    whole, config = model.encode_text, model.config.text_config
    limit = config.max_position_embeddings
    # Columns that are added lie after the end of the text, where they change no feature. They must not hold an end,
    # since a text without an end has to be found out.
    filler = next(id for id in range(3) if id not in (config.bos_token_id, config.eos_token_id))

    def compute(ids: Tensor, mask: Tensor | None = None) -> Outputs:
        return (whole(ids, mask),)

    entry = Entry("encode_text", compute, (model.text_model, model.text_projection))

    def is_simple(ids: Any, mask: Any) -> bool:
        is_batch = isinstance(ids, Tensor) and ids.ndim == 2 and min(ids.shape) > 0 and ids.shape[1] <= limit
        is_masked = isinstance(mask, Tensor) and is_batch and mask.shape == ids.shape
        return is_batch and not ids.is_floating_point() and (mask is None or is_masked) and not _is_graph()

    def encode_text(input_ids: Tensor, attention_mask: Tensor | None = None, truncate_dim: int | None = None) -> Tensor:
        if not is_simple(input_ids, attention_mask):
            return whole(input_ids, attention_mask, truncate_dim)
        is_long = input_ids.numel() >= POSITIONS_WORTH_SORTING and input_ids.shape[1] > COLUMNS
        if is_long and graphs.is_ordinary(input_ids) and not torch.cuda.is_current_stream_capturing():
            features = encode_by_length(model, whole, graphs, input_ids, attention_mask)
        else:
            given = [input_ids] if attention_mask is None else [input_ids, attention_mask]
            if rest := min(-input_ids.shape[1] % COLUMNS, limit - input_ids.shape[1]):
                fillers = (filler, 0)
                given = [functional.pad(part, (0, rest), value=fillers[n]) for n, part in enumerate(given)]
            (features,) = graphs.run(entry, *given)
        return truncate(features, truncate_dim, model.config)

    return encode_text, entry


def encode_by_length(
    model: Any, whole: Callable[..., Tensor], graphs: Graphs, ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Encode texts sorted by length, in parts that have as many columns as their longest text needs.

    The lengths are read once, for which the program waits for the GPU. Nothing else is read.

    Args:
        model: The model.
        whole: Its method that encodes texts as they are.
        graphs: The model's graphs, which are not used for parts: hardly any part has the shape of another.
        ids: (T, L) token ids.
        mask: (T, L), or None.

    Returns:
        Features (T, D), with NaN for texts without an end.
    """
    ends, is_endless = find_ends(ids, None, model.config.text_config)
    lengths = ends + 1
    # What a mask hides after the end of a text changes no feature. A mask that hides something else is heeded.
    is_needless = torch.ones((), dtype=torch.bool, device=ids.device)
    if mask is not None:
        is_needed = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        is_needless = (mask.to(ids.device).ne(0) | ~is_needed).all()
    *read, can_leave_out = torch.cat([lengths, is_needless[None]]).tolist()
    if not can_leave_out:
        return whole(ids, mask)
    order, features = lengths.argsort(), []
    with graphs.one_by_one():
        for first, last, columns in parts_by_length(sorted(read)):
            features.append(whole(ids[order[first:last], :columns]))
    found = torch.cat(features)[order.argsort()]
    return found if is_endless is None else found.masked_fill(is_endless[:, None], float("nan"))


def parts_by_length(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Divide sorted texts into parts. A new part begins where texts need more columns and the part is large enough.

    Returns:
        For each part the first text, the one after the last, and the number of columns, a multiple of COLUMNS.
    """
    columns = [-(-length // COLUMNS) * COLUMNS for length in lengths]
    parts, first = [], 0
    for place in range(1, len(lengths) + 1):
        is_last = place == len(lengths)
        is_large = (place - first) * columns[place - 1] >= LEAST_POSITIONS_OF_A_PART
        if is_last or (is_large and columns[place] > columns[place - 1]):
            parts.append((first, place, columns[place - 1]))
            first = place
    return parts


def tower_encoder(tower: Any, graphs: Graphs) -> tuple[Callable[..., Any], Entry]:
    """Make a tower's `forward` that uses graphs, unless the outputs of all layers or something unusual is asked for."""
    whole, main = tower.forward, tower.main_input_name
    rank = 4 if main == "pixel_values" else 2
    name = "the image tower" if rank == 4 else "the text tower"

    def compute(input: Tensor, mask: Tensor | None = None) -> Outputs:
        masked = {} if mask is None else {"attention_mask": mask}
        outputs = whole(input, **masked, return_dict=True)
        return outputs.last_hidden_state, outputs.pooler_output

    entry = Entry(name, compute, (tower,))

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        input = kwargs.pop(main, input)
        unusual = {name: value for name, value in kwargs.items() if name not in ("return_dict", "attention_mask")}
        is_simple = isinstance(input, Tensor) and input.ndim == rank and not args and not _is_graph()
        is_simple = is_simple and all(value is None or value is False for value in unusual.values())
        is_simple = is_simple and not wants_all_layers(tower, kwargs)
        mask = kwargs.get("attention_mask") if rank == 2 else None
        if not is_simple or not (mask is None or isinstance(mask, Tensor)):
            return whole(input, *args, **kwargs)
        found = graphs.run(entry, *(tensor for tensor in (input, mask) if tensor is not None))
        output = BaseModelOutputWithPooling(last_hidden_state=found[0], pooler_output=found[1])
        return output.to_tuple() if kwargs.get("return_dict", tower.config.return_dict) is False else output

    return forward, entry
