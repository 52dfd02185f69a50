"""Where texts begin and end: stock's rule of the highest id, rows without an end, padding on the left."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from conversion.reference import build_reference
from hf_clip import (
    EndOfTextError,
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipTokenizer,
    convert,
)
from hf_clip.checkpoints.keys import config_from_shapes, convert_names

from ..small import DIMENSIONS, VOCAB_SIZE, random_images, texts

START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}


@pytest.fixture
def tower() -> str:
    """One is enough: the text tower is the same beside both kinds of image tower."""
    return "vit"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- stock's `eos_token_id: 2` --------------------------------------------------------------------------------------


def rows_of(vocab_size: int) -> Tensor:
    """Texts with the end in several places, padded with it and with zeros; one has an added token, a higher id."""
    start, end = min(vocab_size, 49409) - 3, min(vocab_size, 49409) - 2
    return torch.tensor(
        [
            [start, 5, 6, end, end, end],
            [start, 5, 7, 8, 9, end],
            [start, 2, end, 0, 0, 0],
            [start, 5, vocab_size - 1, 8, end, 0],
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize("vocab_size", [600, 49409])
def test_features_of_old_stock_repositories_are_stocks(vocab_size: int, tmp_path: Path):
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": vocab_size}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval()
    whole.save_pretrained(tmp_path / "whole")
    tower = CLIPTextModel(CLIPTextConfig(**text)).eval()
    tower.save_pretrained(tmp_path / "tower")
    ids = rows_of(vocab_size)
    expected, of_tower = whole.get_text_features(ids).pooler_output, tower(ids).pooler_output
    ours = HfClipModel.from_pretrained(tmp_path / "whole").eval()
    again = HfClipModel(HfClipConfig(**CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16).to_dict()))
    again.load_state_dict(whole.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]["eos_token_id"] is None
    saved = AutoModel.from_pretrained(tmp_path / "ours").eval()
    for model in (ours, again.eval(), saved):
        assert relative_error(model.encode_text(ids), expected) < 1e-5
    alone = HfClipTextModelWithProjection.from_pretrained(tmp_path / "whole").eval()
    assert relative_error(alone(ids).text_embeds, expected) < 1e-5
    assert (
        relative_error(HfClipTextModel.from_pretrained(tmp_path / "tower").eval()(ids).pooler_output, of_tower) < 1e-5
    )
    saved.optimize_for_inference()
    assert relative_error(saved.encode_text(ids), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("added", [False, True], ids=["as trained", "with an added token"])
def test_converted_stock_repository_names_its_end(added: bool, tmp_path: Path):
    """Where the tokenizer's end is its highest id it is named; else stock's rule stays. The 2 never does."""
    tokenizer = HfClipTokenizer.train_from_iterator(["a cat", "two dogs"], vocab_size=600, model_max_length=12)
    if added:
        tokenizer.add_tokens(["sks"])
    text = TEXT | {"vocab_size": len(tokenizer) + 7}  # a table may have more rows than there are tokens
    torch.manual_seed(0)
    stock = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval()
    stock.save_pretrained(tmp_path / "stock")
    HfClipProcessor(HfClipImageProcessor.for_image_size(32), tokenizer).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]
    expected = None if added else tokenizer.eos_token_id
    assert (saved["eos_token_id"], saved["pad_token_id"]) == (expected, expected)
    ids = tokenizer(["a cat", "two sks dogs", ""], return_tensors="pt").input_ids
    ours = AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert relative_error(ours.encode_text(ids), stock.get_text_features(ids).pooler_output) < 1e-5
    convert(tmp_path / "ours", tmp_path / "back", layout="transformers")
    back = CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back.get_text_features(ids).pooler_output, stock.get_text_features(ids).pooler_output)


@torch.no_grad()
def test_highest_id_is_sought_where_the_text_is():
    """Padding on the left with the highest id, and a mask."""
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = HfClipModel(HfClipConfig(text_config=text, vision_config=VISION)).eval()
    right, left = torch.tensor([[8, 5, 6, 50, 59, 59]]), torch.tensor([[59, 59, 8, 5, 6, 50]])
    masks = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model.encode_text(right[:, :4])
    assert relative_error(model.encode_text(left, masks[1]), expected) < 1e-5


@torch.no_grad()
def test_larger_table_of_an_original_takes_its_rule_of_the_highest_id():
    """With rows that were added behind OpenAI's vocabulary, no text ends with the last of them."""
    dimensions = DIMENSIONS["vit"] | {"vocab_size": 49472, "transformer_layers": 1, "vision_layers": 1}
    reference = build_reference(dimensions, seed=2)
    state = {name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("attn_mask")}
    config = config_from_shapes(state)
    model = HfClipModel(config).eval()
    model.load_state_dict(convert_names(state, config))
    ids = torch.zeros(3, 20, dtype=torch.long)
    ids[:, :5] = torch.tensor([[49406, 320, 2368, 49407, 0], [49406, 320, 1929, 7, 49407], [49406, 49407, 0, 0, 0]])
    assert relative_error(model.encode_text(ids), reference.encode_text(ids)) < 3e-6


# --- rows without an end --------------------------------------------------------------------------------------------


def without_end() -> Tensor:
    """Rows 1 and 3 of four have no end."""
    ids = texts((20, 20, 20, 20))
    ids[[1, 3], -1] = 5
    return ids


CALLS: dict[str, Callable[[HfClipModel, Tensor, Any], Tensor]] = {
    "encode_text": lambda model, ids, mask: model.encode_text(ids, mask),
    "get_text_features": lambda model, ids, mask: model.get_text_features(ids, attention_mask=mask).pooler_output,
    "forward": lambda model, ids, mask: model.text_projection(model.text_model(ids, attention_mask=mask).pooler_output),
}


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_row_without_its_end_is_refused(model: HfClipModel, call: str, optimized: bool):
    if optimized:
        model.optimize_for_inference()
    for mask in (None, torch.ones(80, 20, dtype=torch.long)):
        with pytest.raises(
            EndOfTextError, match=f"no end-of-text id {END} in rows 1, 3, 5, 7, 9 and 35 more"
        ) as caught:
            CALLS[call](model, without_end().repeat(20, 1), mask)
        assert caught.value.rows == list(range(1, 80, 2))
    with pytest.raises(ValueError, match="in row 1, but the text feature is taken there. Tokenize with"):
        CALLS[call](model, without_end()[:3], None)


def test_error_of_a_row_survives_pickling():
    error = pickle.loads(pickle.dumps(EndOfTextError("in row 3", [3])))
    assert (str(error), error.rows) == ("in row 3", [3])


def in_graphs(model: HfClipModel, ids: Tensor) -> dict[str, Tensor]:
    """Features of graphs and of torch.vmap, where no value can be looked at."""
    torch.compiler.reset()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model.encode_text(ids)

    good = texts((20, 20, 20, 20))
    encoder = Encoder()
    return {
        "compiled": torch.compile(encoder, fullgraph=True, backend="eager")(ids),
        "exported": torch.export.export(encoder, (good,), strict=False).module()(ids),
        "traced": torch.jit.trace(encoder, good)(ids),
        "vmapped": torch.vmap(lambda row: encoder(row[None])[0])(ids),
    }


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_row_without_its_end_is_nan_in_graphs(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    expected = model.encode_text(texts((20, 20, 20, 20)))
    for name, found in in_graphs(model, without_end()).items():
        assert found[[1, 3]].isnan().all(), name
        assert relative_error(found[[0, 2]], expected[[0, 2]]) < 1e-5, name


# --- padding on the left --------------------------------------------------------------------------------------------

LENGTHS = (3, 12, 7, 20)


def left(pad: int) -> tuple[Tensor, Tensor]:
    """The texts of `small.texts`, padded on the left; ids and mask."""
    right = texts(LENGTHS)
    ids, mask = torch.full_like(right, pad), torch.zeros_like(right)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = right[row, :length], 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pad", [END, 0], ids=["end of text", "zero"])
def test_padding_on_the_left_gives_the_features_of_padding_on_the_right(
    model: HfClipModel, tower: str, pad: int, attention: str
):
    model.set_attn_implementation(attention)
    expected = model.encode_text(texts(LENGTHS))
    states = model.text_model(texts(LENGTHS)).last_hidden_state
    ids, mask = left(pad)
    for kind in (mask, mask.bool(), mask.float()):
        for name, call in CALLS.items():
            assert relative_error(call(model, ids, kind), expected) < 1e-5, name
    found = model.text_model(ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(LENGTHS):
        assert relative_error(found[row, -length:], states[row, :length]) < 1e-5
    embeds = model(input_ids=ids, attention_mask=mask, pixel_values=random_images(tower)).text_embeds
    assert relative_error(embeds, torch.nn.functional.normalize(expected, dim=-1)) < 1e-5
    model.optimize_for_inference()
    for name, call in CALLS.items():
        assert relative_error(call(model, ids, mask), expected) < 1e-5, name


@torch.no_grad()
def test_padding_on_the_left_in_graphs(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    expected, (ids, mask) = model.encode_text(texts(LENGTHS)), left(END)
    torch.compiler.reset()
    compiled = torch.compile(model.text_model, fullgraph=True, backend="eager")
    assert relative_error(model.text_projection(compiled(ids, attention_mask=mask).pooler_output), expected) < 1e-5
    given = {"input_ids": texts(LENGTHS), "attention_mask": torch.ones_like(mask)}
    exported = torch.export.export(model.text_model, (), given, strict=False).module()
    found = model.text_projection(exported(input_ids=ids, attention_mask=mask).pooler_output)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("pad", [END, 0], ids=["end of text", "zero"])
def test_padding_on_the_left_without_its_mask_is_refused(model: HfClipModel, pad: int):
    ids, mask = left(pad)
    for given in (None, torch.ones_like(mask)):
        with pytest.raises(EndOfTextError, match=f"start-of-text id {START} in rows 0, 1, 2: padding on the left") as e:
            model.encode_text(ids, given)
        assert e.value.rows == [0, 1, 2]


@torch.no_grad()
def test_start_of_text_within_a_text_is_no_padding(model: HfClipModel):
    """Texts may spell the special token; and a start id that is not the end's neighbour is nobody's."""
    ids = texts((9, 9))
    ids[:, 4] = START
    assert model.encode_text(ids).isfinite().all()
    model.config.text_config.bos_token_id = model.text_model.config.bos_token_id = 7
    ids[:, 5] = 7
    assert model.encode_text(ids).isfinite().all()


@torch.no_grad()
def test_positions_that_are_given_are_taken(model: HfClipModel):
    ids, mask = left(END)
    positions = torch.arange(20).expand(4, 20)
    shifted = (positions - (20 - mask.sum(-1, keepdim=True))).clamp(min=0)
    found = model.get_text_features(ids, attention_mask=mask, position_ids=shifted).pooler_output
    assert relative_error(found, model.encode_text(texts(LENGTHS))) < 1e-5
    other = model.get_text_features(ids, attention_mask=mask, position_ids=positions).pooler_output
    assert relative_error(other, found) > 1e-2
