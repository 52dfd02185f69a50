"""JSON files of any shape and Git-LFS pointers in a model's folder: one line each, and nothing is written."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from conversion.convert import main
from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, convert
from hf_clip.model.checked_files import MOST_DEPTH, list_shards, one_line, read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NAMES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "open_clip_config.json")

SCALARS = st.one_of(
    st.sampled_from([None, True, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "cat", "float32", "load", "../../x", "/etc/passwd", "x" * 3000, "\ud800", "a\n\x1b[31mb"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "height", "eps", "a"]), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("dtype", "id2label", "text_config", "vision_config_dict", "to_dict"),
        *("preprocess", "gguf_file", "tokenizer_file", "added_tokens_decoder", "extra_special_tokens"),
        *("model_max_length", "auto_map", "size", "resample", "model_cfg"),
        *("configuration_files", "transformers_weights", "quantization_config", "rope_scaling", "attribute_map"),
    ]
)


def edit(path: Path, *keys: str, value: Any) -> None:
    """Put a value at the end of a way of keys into a JSON file."""
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(repositories: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(repositories["vit"], tmp_path / "model"))


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, list[int], str, Any]:
    """Which file, the way into it as places, the name of the field there, and its new value."""
    return draw(st.sampled_from(NAMES)), draw(st.lists(st.integers(0, 40), max_size=3)), draw(FIELDS), draw(VALUES)


def damage(path: Path, way: list[int], field: str, value: Any) -> None:
    """Replace what stands at the end of the way, or add a field there."""
    values = inner = json.loads(path.read_text())
    for place in way:
        key: Any = list(inner)[place % len(inner)] if isinstance(inner, dict) else place % len(inner)
        if not isinstance(inner[key], (dict, list)) or not inner[key]:
            inner[key] = value
            break
        inner = inner[key]
    else:
        if isinstance(inner, dict):
            inner[field] = value
        else:
            inner[0] = value
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def layouts(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    open_clip = tmp_path_factory.mktemp("layouts") / "open_clip"
    convert(repositories["vit"], open_clip, layout="open_clip")
    return [repositories["vit"], repositories["resnet"], open_clip]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(damages(), st.integers(0, 2))
def test_any_value_anywhere_converts_or_is_refused_in_one_line(
    layouts: list[Path], tmp_path_factory: pytest.TempPathFactory, damaged: tuple, layout: int
):
    name, way, field, value = damaged
    base = tmp_path_factory.mktemp("case")
    folder = Path(shutil.copytree(layouts[layout], base / "model"))
    present = name if (folder / name).is_file() else "tokenizer_config.json"
    damage(folder / present, way, field, value)
    refused = None
    try:
        convert(folder, base / "out")
    except (OSError, ValueError) as error:
        refused = str(error)
    assert (base / "out").exists() == (refused is None)
    assert refused is None or (len(refused) < 1000 and "\n" not in refused)
    shutil.rmtree(base)


REFUSALS: list[tuple[str, tuple[str, ...], Any, str]] = [
    ("config.json", ("dtype",), 7, "dtype is 7, but the name of a torch.dtype is needed"),
    ("config.json", ("dtype",), "load", "dtype is <function load"),
    ("config.json", ("text_config", "dtype"), [1], r"dtype is \[1\], but the name"),
    ("config.json", ("id2label",), "cat", "The configuration of .*model is refused: .*'str' object has no attribute"),
    ("config.json", ("text_config", "num_hidden_layers"), 2**63, "num_hidden_layers is 9.223e.18, but at most 1,000"),
    ("config.json", ("text_config", "num_hidden_layers"), -1, "num_hidden_layers is -1, but it must not be negative"),
    ("config.json", ("text_config", "num_hidden_layers"), 900, "tensors, too few for the 903 layers of its config"),
    ("config.json", ("vision_config", "hidden_size"), 2**62, "hidden_size is 4.612e.18, but at most 1,048,576"),
    ("config.json", ("text_config", "layer_norm_eps"), float("nan"), "layer_norm_eps is nan, but a finite number"),
    ("config.json", ("text_config", "hidden_act"), "sine", "hidden_act is 'sine', but transformers has no activation"),
    ("config.json", ("to_dict",), 1, "its field to_dict is the name of a method"),
    ("config.json", ("configuration_files",), ["../config.4.json"], "names the file '../config.4.json', which doesn't"),
    ("config.json", ("transformers_weights",), "/tmp/x.safetensors", "which doesn't lie beside it"),
    ("processor_config.json", ("image_processor", "image_std"), [1, 0, 1], "image_std holds 0, but pixels are divided"),
    ("processor_config.json", ("image_processor", "image_std"), float("nan"), "image_std holds nan, but a finite"),
    ("processor_config.json", ("image_processor", "image_mean"), [0.5, 0.5], "image_mean has 2 values; images need"),
    ("processor_config.json", ("image_processor", "image_mean"), ["a"], "image_mean holds 'a', but a finite number"),
    ("processor_config.json", ("image_processor", "size"), {"shortest_edge": 0}, "size is .* is needed"),
    ("processor_config.json", ("image_processor", "size"), {"shortest_edge": -5}, "size has a side of -5, but a whole"),
    ("processor_config.json", ("image_processor", "crop_size"), {"height": 2**40, "width": 2}, "a side of 1099511627"),
    ("processor_config.json", ("image_processor", "resample"), 99, "resample is 99, but one of PIL.Image.Resampling"),
    ("processor_config.json", ("image_processor", "rescale_factor"), 0, "rescale_factor holds 0, but pixels are"),
    ("processor_config.json", ("image_processor", "do_resize"), "no", "do_resize is 'no', but True or False is needed"),
    ("processor_config.json", ("image_processor",), "cat", "describes a HfClipImageProcessor with a str"),
    ("tokenizer.json", ("model", "vocab"), {"a": 2**32 - 1}, "numbers the token 'a' 4294967295; whole numbers from 0"),
    ("tokenizer.json", ("model", "merges"), [["a"]], "holds no list of merges, each of two tokens"),
    ("tokenizer.json", ("added_tokens",), [{"id": 3}], "holds added_tokens that are no list of tokens"),
    ("tokenizer.json", ("model",), 3, "holds no byte-pair encoding"),
    ("tokenizer_config.json", ("model_max_length",), "long", "model_max_length is 'long', but a positive number"),
    ("tokenizer_config.json", ("gguf_file",), "../x.gguf", "gguf_file names the file '../x.gguf', which doesn't lie"),
    ("tokenizer_config.json", ("fast_tokenizer_files",), ["../tokenizer.1.0.json"], "which doesn't lie beside it"),
]


@pytest.mark.parametrize("place", range(len(REFUSALS)), ids=lambda place: f"{'.'.join(REFUSALS[place][1])}-{place}")
def test_wrong_value_is_refused_by_what_it_is(folder: Path, place: int, tmp_path: Path):
    name, keys, value, message = REFUSALS[place]
    edit(folder / name, *keys, value=value)
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert time.process_time() - start < 20  # 2**63 layers would never end
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


OPEN_CLIP_REFUSALS: list[tuple[tuple[str, ...], Any, str]] = [
    (("model_cfg",), 3, "is no configuration of open_clip's"),
    (("model_cfg", "vision_cfg", "width"), "wide", "its vision_cfg has width='wide', but a number is needed"),
    (("model_cfg", "vision_cfg", "layers"), [], "depths is \\[\\], but a CLIP ResNet has four stages"),
    (("model_cfg", "vision_cfg", "image_size"), [48, 64], r"image_size is \[48, 64\], but .* take square images"),
    (("model_cfg", "text_cfg", "layers"), 2**63, "its text_cfg has layers=9223372036854775808, but a number"),
    (("model_cfg", "text_cfg", "heads"), 0, "its text_cfg has heads=0, but a positive number is needed"),
    (("model_cfg", "embed_dim"), None, "its model_cfg has embed_dim=None, but a number is needed"),
    (("preprocess_cfg",), ["a"], "has a preprocess_cfg that is no object of fields"),
    (("preprocess_cfg", "std"), 0.0001 - 0.0001, "converts"),
    (("preprocess_cfg", "std"), [0, 0, 0], "image_std holds 0, but pixels are divided by it"),
    (("preprocess_cfg", "interpolation"), ["a"], r"asks for interpolation \['a'\]"),
]


@pytest.mark.parametrize("place", range(len(OPEN_CLIP_REFUSALS)), ids=str)
def test_wrong_value_in_open_clips_configuration(layouts: list[Path], place: int, tmp_path: Path):
    keys, value, message = OPEN_CLIP_REFUSALS[place]
    folder = Path(shutil.copytree(layouts[2], tmp_path / "model"))
    edit(folder / "open_clip_config.json", *keys, value=value)
    if message == "converts":  # like a field that is left out
        convert(folder, tmp_path / "out")
        return
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 60 + "1" + "}" * 60], ids=["lists", "objects"]
)
def test_deep_nesting_is_refused(folder: Path, name: str, text: str, tmp_path: Path):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} nests lists or objects more than {MOST_DEPTH} deep"):
        convert(folder, tmp_path / "out")


def test_limits_of_the_reader(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("[" * MOST_DEPTH + "1" + "]" * MOST_DEPTH)
    assert read_json(path)
    path.write_text("[" * (MOST_DEPTH + 1) + "1" + "]" * (MOST_DEPTH + 1))
    with pytest.raises(ValueError, match="deep"):
        read_json(path)
    path.write_text('"' + "a" * 100 + '"')
    with pytest.raises(ValueError, match="has 102 bytes, but at most 99 are read of a file of its kind"):
        read_json(path, most_bytes=99)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_json(tmp_path / "b.json")


def test_strangers_words_are_cut_and_printable():
    assert one_line("a\n  b\x1b[31m") == "a b�[31m"
    assert len(one_line("x" * 10**6)) == 400


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_git_lfs_pointer_is_named(folder: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (folder / name).write_bytes(POINTER)
    assert main([str(folder), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert f"{name} is a Git-LFS pointer, not the file itself" in err
    assert f"Run `git lfs pull` in {folder}" in err
    assert err.count("\n") == 1


def test_git_lfs_pointer_in_place_of_a_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (folder / "some.pt").write_bytes(POINTER)
    assert main([str(folder / "some.pt"), str(tmp_path / "out")]) == 1
    assert "some.pt is a Git-LFS pointer" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"model.safetensors is a Git-LFS pointer"):
        HfClipModel.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "a\\b", 7, ""])
def test_index_that_leads_out_of_its_folder(folder: Path, shard: Any, tmp_path: Path):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": shard}}))
    for load in (lambda: convert(folder, tmp_path / "out"), lambda: AutoModel.from_pretrained(folder)):
        with pytest.raises(
            ValueError, match=r"index.json is refused: it names the file .*, which doesn't lie beside it"
        ):
            load()


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_index_that_is_none(content: str, tmp_path: Path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json (is no index of weights|holds no object)"):
        list_shards(tmp_path / "index.json")


@pytest.mark.parametrize(
    ("name", "keys", "value", "kind"),
    [
        ("config.json", ("id2label",), "cat", HfClipConfig),
        ("config.json", ("id2label",), "cat", HfClipModel),
        ("config.json", ("text_config", "hidden_size"), "wide", HfClipModel),
        ("processor_config.json", ("image_processor", "size"), [[1]], HfClipImageProcessor),
        ("processor_config.json", ("image_processor", "preprocess"), 1, HfClipImageProcessor),
        ("tokenizer.json", ("model", "vocab"), {"a": "b"}, HfClipTokenizer),
        ("tokenizer.json", ("decoder",), {"type": "None"}, HfClipTokenizer),
        ("tokenizer_config.json", ("extra_special_tokens",), 7, HfClipProcessor),
    ],
)
def test_from_pretrained_answers_in_one_line(folder: Path, name: str, keys: tuple, value: Any, kind: Any):
    edit(folder / name, *keys, value=value)
    with pytest.raises(ValueError, match="model.* is (refused|damaged)|numbers the token") as caught:
        kind.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_cut_weights_name_their_folder(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"The weights in .*model are damaged or cut off"):
        HfClipModel.from_pretrained(folder)


def test_tokenizer_is_read_from_its_own_folder_alone(folder: Path, tmp_path: Path):
    """An entry of old repositories names a file of another machine; it must be left unread, not followed."""
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"] = {f"x{number}": number for number in range(10)}
    other["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(other))
    edit(folder / "tokenizer_config.json", "tokenizer_file", value=str(tmp_path / "other.json"))
    assert len(HfClipTokenizer.from_pretrained(folder)) == 1000
