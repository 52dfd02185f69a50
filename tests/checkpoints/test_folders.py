"""Folders of models that are damaged: every program refuses them in one line, and writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError

from conversion.convert import main as convert
from conversion.publish import main as publish
from hf_clip.checkpoints import folders
from hf_clip.checkpoints.folders import check_folder, check_reached, in_one_line
from hf_clip.checkpoints.in_memory import load_model
from hf_clip.checkpoints.read import check_model
from hf_clip.model.checked_files import read_object

DAMAGES: list[tuple[str, Callable[[bytes], bytes] | None, str]] = [
    ("model.safetensors", lambda content: b"", "model.safetensors is empty"),
    ("model.safetensors", lambda content: content[: len(content) // 2], "model.safetensors is truncated or damaged"),
    ("model.safetensors", lambda content: content[:100], "model.safetensors is truncated or damaged"),
    ("model.safetensors", None, "has no weights: none of model.safetensors, pytorch_model.bin"),
    ("config.json", lambda content: b"", "config.json is no JSON (Expecting value"),
    ("config.json", lambda content: content[: len(content) // 2], "config.json is no JSON (Unterminated string"),
    ("config.json", lambda content: b"hello", "config.json is no JSON (Expecting value"),
    ("config.json", lambda content: b"\xff\xfe", "config.json is no JSON ('utf-8' codec can't decode"),
    ("config.json", lambda content: b"[]", "config.json holds no object of fields"),
    ("config.json", lambda content: b"{}", "holds a config.json without a model_type"),
    ("config.json", lambda content: content.replace(b"128", b'"128"', 1), "is refused: Validation error for field"),
    ("config.json", lambda content: content.replace(b": 128", b": 64"), "where its configuration needs"),
    ("tokenizer.json", lambda content: b"", "tokenizer.json is no JSON"),
    ("tokenizer.json", lambda content: content[: len(content) // 2], "tokenizer.json is no JSON"),
    ("tokenizer.json", None, "has no tokenizer (tokenizer.json or vocab.json); save the model's processor there"),
    ("processor_config.json", lambda content: content[:99], "processor_config.json is no JSON"),
    ("processor_config.json", None, "has no image processor (processor_config.json or preprocessor_config.json)"),
]


@pytest.fixture(params=range(len(DAMAGES)), ids=lambda place: f"{DAMAGES[place][0]}-{place}")
def damaged(request: pytest.FixtureRequest, repositories: dict[str, Path], tmp_path: Path) -> tuple[Path, str]:
    """A model with one file that is damaged or missing, and what is to be said of it."""
    name, change, message = DAMAGES[request.param]
    folder = tmp_path / "model"
    shutil.copytree(repositories["vit"], folder)
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder, message


@pytest.mark.parametrize("program", ["publish", "publish stock", "convert"])
def test_damaged_model_is_refused_in_one_line(
    damaged: tuple[Path, str], program: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder, message = damaged
    if program == "convert":
        status = convert([str(folder), str(tmp_path / "out")])
    else:
        more = ["--format", "transformers"] if program == "publish stock" else []
        status = publish([str(folder), "org/name", "--dry-run", *more])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_whole_model_passes(repository: Path):
    assert check_model(repository).to_dict() == check_model(str(repository)).to_dict()


def test_open_clips_layout_needs_no_processor(tmp_path: Path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        ValueError, match=r"holds a 'bert' model by its config.json; a whole CLIP is needed, hf_clip or"
    ):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["org/nothing", "a/b/c"])
def test_what_the_hub_says_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert([name, str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert f"error: There is no folder '{name}', and no model of that name could be loaded from the Hub (" in err
    assert "Check the path or the name" in err
    assert err.count("\n") == 1


def test_errors_with_words_of_their_own_keep_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="^mine$"), in_one_line("org/nothing"):
        raise FileNotFoundError("mine")
    with pytest.raises(OSError, match="^of a disk$"), in_one_line(tmp_path):
        raise OSError("of a disk")
    with pytest.raises(ValueError, match="The configuration of x is refused: a b"), in_one_line("x"):
        raise StrictDataclassError("a\n  b")


def test_files_with_fields(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(FileNotFoundError, match="There is no file .*b.json; check the path"):
        read_object(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no JSON"), (b'{"model_type": "hf_cl', "is no JSON"), (b"[]", "no object"), (None, "check the path")],
    ids=["empty", "truncated", "a list", "missing"],
)
def test_damaged_config_of_a_checkpoint(
    content: bytes | None, message: str, archives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    status = convert([str(archives["vit"]), str(tmp_path / "out"), "--config", str(tmp_path / "config.json")])
    err = capsys.readouterr().err
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0, 10, 0.5])
def test_cut_checkpoint_files(part: float, archives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    content = archives["vit"].read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(part * len(content)) if part < 1 else int(part)])
    assert convert([str(tmp_path / "cut.pt"), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert ("cut.pt is empty" if part == 0 else "cut.pt is truncated or damaged") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_asked_for_one_file(monkeypatch: pytest.MonkeyPatch):
    """Its client tries for half a minute each time."""
    asked = []

    def fail(*given: str) -> str:
        asked.append(given)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(folders, "hf_hub_download", fail)
    monkeypatch.setattr(folders.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(folders.constants, "ENDPOINT", "https://hub.example")
    with pytest.raises(FileNotFoundError) as error:
        load_model("org/none")
    assert str(error.value) == (
        "There is no folder 'org/none', and no model of that name could be loaded from the Hub (https://hub.example "
        "cannot be reached.) Check the path or the name; without a network only models are found that were downloaded "
        "before."
    )
    assert asked == [("org/none", "config.json")]


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_repository_that_was_loaded_before_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of open_clip's has no config.json."""
    repository, commit = tmp_path / "models--org--known", "0" * 40
    stored = repository / "snapshots" / commit / name
    stored.parent.mkdir(parents=True)
    stored.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(folders.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(folders.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(folders, "hf_hub_download", lambda *given: pytest.fail(f"the Hub was asked for {given}"))
    check_reached("org/known")
    with pytest.raises(pytest.fail.Exception, match="the Hub was asked for .'org/another', 'config.json'"):
        check_reached("org/another")
