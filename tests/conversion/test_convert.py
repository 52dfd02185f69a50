"""Conversion: what is read, what is written, and that nothing is written otherwise."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor

from conversion.convert import main
from conversion.reference import build_reference, halve, reference_dimensions, write_archive
from hf_clip import VARIANTS, HfClipConfig, HfClipModel, HfClipProcessor, convert
from hf_clip.checkpoints import whole_folder as whole_folder_module
from hf_clip.checkpoints import write as writing
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.safetensors_stream import write_safetensors
from hf_clip.checkpoints.whole_folder import FolderInUseError, whole_folder
from hf_clip.model.checked_files import FolderReplacedError

from ..small import DIMENSIONS, IMAGE_SIZES, random_images, texts

ROOT = Path(__file__).resolve().parents[2]


def file_sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_folder_is_complete_and_loads(repository: Path, tower: str, reference: nn.Module):
    names = {path.name for path in repository.iterdir()}
    expected = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= names
    config = json.loads((repository / "config.json").read_text())
    assert config["model_type"] == "hf_clip"
    assert config["architectures"] == ["HfClipModel"]
    assert config["dtype"] == "float32"
    model, processor = AutoModel.from_pretrained(repository).eval(), AutoProcessor.from_pretrained(repository)
    assert model.dtype == torch.float32
    assert processor.image_processor.crop_size["height"] == IMAGE_SIZES[tower]
    assert processor.tokenizer.model_max_length == 20
    assert len(processor.tokenizer) == 1000
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(random_images(tower)), reference.encode_image(random_images(tower)), rtol=1e-4, atol=1e-5
        )


def test_every_kind_of_file_converts_to_the_same_weights(
    archives: dict[str, Path], tower: str, reference: nn.Module, tmp_path: Path
):
    state = reference.state_dict()
    torch.save(state, tmp_path / "state.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "state.safetensors")
    sums = set()
    for path in (archives[tower], *(tmp_path / name for name in ("state.pt", "legacy.pt", "state.safetensors"))):
        out = tmp_path / f"out-{path.name}"
        convert(path, out)
        sums.add(file_sums(out)["model.safetensors"])
    assert len(sums) == 1


def test_original_dtypes_are_kept_and_computed_in_float32(tower: str, tmp_path: Path):
    reference = build_reference(DIMENSIONS[tower], seed=5)
    halve(reference)
    write_archive(reference, tmp_path / "mixed.pt", IMAGE_SIZES[tower])
    convert(tmp_path / "mixed.pt", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} >= {torch.float16, torch.float32}
    assert stored["text_model.encoder.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    assert stored["text_model.final_layer_norm.weight"].dtype == torch.float32
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = reference.float().encode_text(texts())
        assert (model.encode_text(texts()) - expected).norm() / expected.norm() < 1e-5


def test_published_variant_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture):
    reference = build_reference(reference_dimensions(VARIANTS["RN50"]), seed=0)
    halve(reference)
    write_archive(reference, tmp_path / "some-name.pt", 224)
    assert main([str(tmp_path / "some-name.pt"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'out'}: RN50"


def test_converting_twice_gives_the_same_bytes(archives: dict[str, Path], tower: str, tmp_path: Path):
    for name in ("first", "second"):
        convert(archives[tower], tmp_path / name)
    assert file_sums(tmp_path / "first") == file_sums(tmp_path / "second")


def test_custom_shape_is_described(
    archives: dict[str, Path], tower: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main([str(archives[tower]), str(tmp_path / "out")]) == 0
    kind, size = {"vit": ("ViT", 48), "resnet": ("ResNet", 96)}[tower]
    assert f"a custom {kind} CLIP of {size} pixels" in capsys.readouterr().out


# --- refusals: nothing is written ----------------------------------------------------------------------------------


def test_existing_folder_is_refused_before_anything_is_read(archives: dict[str, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; .*--overwrite"):
        convert(archives["vit"], tmp_path / "out")
    assert file_sums(tmp_path / "out").keys() == {"notes.txt"}


def test_overwrite_replaces_the_model_and_keeps_the_rest(archives: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    convert(archives["vit"], out)
    (out / "README.md").write_text("mine")
    before = file_sums(out)
    convert(archives["resnet"], out, overwrite=True)
    after = file_sums(out)
    assert after["README.md"] == before["README.md"]
    assert after["model.safetensors"] != before["model.safetensors"]
    assert type(AutoModel.from_pretrained(out).vision_model).__name__ == "HfClipResNetModel"


def test_empty_folder_is_filled(archives: dict[str, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    convert(archives["vit"], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("stage", ["weights", "config", "processor"])
def test_failure_halfway_leaves_nothing(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    target = {
        "weights": (writing, "write_safetensors"),
        "config": (HfClipConfig, "save_pretrained"),
        "processor": (HfClipProcessor, "save_pretrained"),
    }[stage]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match="No space left"):
        convert(archives["vit"], tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_failure_while_overwriting_leaves_the_old_model(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(archives["vit"], tmp_path / "out")
    before = file_sums(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(HfClipProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(archives["resnet"], tmp_path / "out", overwrite=True)
    assert file_sums(tmp_path) == before


def test_published_name_with_other_content_is_refused(archives: dict[str, Path], tmp_path: Path):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(archives["vit"].read_bytes())
    with pytest.raises(CheckpointError, match=f"published ViT-B-32.pt has {VARIANTS['ViT-B/32'].sha256}.*--no-verify"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(path, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_published_name_with_the_published_content_is_accepted(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "RN101.pt"
    path.write_bytes(archives["resnet"].read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(VARIANTS, "RN101", replace(VARIANTS["RN101"], sha256=digest))
    convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def bad_inputs(folder: Path, archive: Path) -> dict[str, tuple[Path, str]]:
    (folder / "empty.pt").write_bytes(b"")
    (folder / "cut.pt").write_bytes(archive.read_bytes()[:5000])
    with zipfile.ZipFile(folder / "other.zip", "w") as other:
        other.writestr("a.txt", "a")
    torch.save({"bert.weight": torch.ones(2)}, folder / "bert.pt")
    return {
        "missing": (folder / "missing.pt", "There is no checkpoint file"),
        "folder": (folder, "is a folder without a model"),
        "empty": (folder / "empty.pt", "is empty"),
        "truncated": (folder / "cut.pt", "is truncated or damaged"),
        "zip": (folder / "other.zip", "is a zip file, but no PyTorch archive"),
        "other model": (folder / "bert.pt", "is the checkpoint of another model"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "truncated", "zip", "other model"])
def test_command_line_says_one_line_and_writes_nothing(
    archives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
):
    path, message = bad_inputs(tmp_path, archives["vit"])[kind]
    before = file_sums(tmp_path)
    assert main([str(path), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert str(path) in line
    assert message in line
    assert captured.out == ""
    assert file_sums(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_name_that_is_nearly_right_is_answered_with_the_right_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "model.pt").write_bytes(b"")
    for given, meant in [
        (str(tmp_path / "model"), str(tmp_path / "model.pt")),
        ("ViT-B-32", "ViT-B/32"),
        ("vit-l/14@336", None),
        ("clip-vit-l14-336px", "ViT-L/14@336px"),
        ("rn50", "RN50"),
    ]:
        assert main([given, str(tmp_path / "out"), "--offline"]) == 1
        err = capsys.readouterr().err
        assert (f"did you mean {meant}?" in err) == (meant is not None), err
        assert err.count("\n") == 1


def test_message_is_cut_whatever_was_given(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["x" * 5000, str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err) < 1000


def test_wrong_vocabulary_is_refused_before_anything_is_written(archives: dict[str, Path], tmp_path: Path):
    (tmp_path / "words.txt").write_text("a b\n")
    with pytest.raises(ValueError, match=r"words.txt doesn't fit 1000 ids"):
        convert(archives["vit"], tmp_path / "out", vocabulary=tmp_path / "words.txt")
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        convert(archives["vit"], tmp_path / "out", vocabulary=tmp_path / "nowhere.gz")
    assert not (tmp_path / "out").exists()


def test_command_runs_as_a_program(archives: dict[str, Path], tmp_path: Path):
    """From another folder, in a process of its own, with the installed package alone on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "conversion.convert", str(archives["vit"]), "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from hf_clip import convert
# Not ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(peak())
for number, source in enumerate(sys.argv[2:]):
    convert(source, f"{sys.argv[1]}{number}")
    print(peak())
"""


def peaks(out: Path, *sources: Path) -> list[int]:
    """A fresh process's peak of resident memory in bytes: before it converts, and after each of the files."""
    command = [sys.executable, "-c", MEASURE, str(out), *map(str, sources)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [1024 * int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_conversion_needs_much_less_memory_than_the_file(tmp_path: Path):
    reference = build_reference(reference_dimensions(VARIANTS["ViT-B/32"]), seed=0)
    halve(reference)
    write_archive(reference, tmp_path / "file.pt", 224)
    size = (tmp_path / "file.pt").stat().st_size
    assert size > 300e6
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, tmp_path / "file.safetensors")
    base, *found = peaks(tmp_path / "out", tmp_path / "file.pt", tmp_path / "file.safetensors")
    assert all(peak - base < size * 0.7 for peak in found)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_converting_the_largest_model_peaks_below_1_3_times_its_file(tmp_path: Path):
    """The whole process, PyTorch included, as the design promises it for RN50x64."""
    reference = build_reference(reference_dimensions(VARIANTS["RN50x64"]), seed=0)
    halve(reference)
    write_archive(reference, tmp_path / "file.pt", 448)
    del reference
    size = (tmp_path / "file.pt").stat().st_size
    _, peak = peaks(tmp_path / "out", tmp_path / "file.pt")
    print(f"file {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / size:.2f}")
    assert peak < 1.3 * size


# --- the writer ----------------------------------------------------------------------------------------------------


def test_streamed_file_equals_what_the_library_reads(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "view": torch.randn(4, 6).T[1:, ::2],
        "scalar": torch.tensor(4.6),
        "integer": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "brain": torch.randn(7).bfloat16(),
    }
    written: list[int] = []
    write_safetensors(tmp_path / "file.safetensors", tensors, written.append)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())


def test_converted_weights_load_into_a_model_strictly(repository: Path, model: HfClipModel):
    model.load_state_dict(load_file(repository / "model.safetensors"), strict=True)


# --- readers and writers at once -----------------------------------------------------------------------------------


@pytest.fixture
def two_models(archives: dict[str, Path], tmp_path: Path, references: dict[str, nn.Module]) -> dict[str, Path]:
    """Two checkpoints of one shape that differ in activation and weights: a mixture would load without an error."""
    other = {name: tensor * 2 for name, tensor in references["vit"].state_dict().items()}
    (tmp_path / "sources").mkdir()
    for activation in ("quick_gelu", "gelu"):
        state = other if activation == "gelu" else references["vit"].state_dict()
        path = tmp_path / "sources" / f"{activation}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return {name: tmp_path / "sources" / f"{name}.safetensors" for name in ("quick_gelu", "gelu")}


def write(sources: dict[str, Path], name: str, out: Path) -> None:
    convert(sources[name], out, activation=name, overwrite=True)


def replace_once(monkeypatch: pytest.MonkeyPatch, replace: Callable[[], None]) -> None:
    """Between the configuration and the weights of whoever loads next, another writer comes."""
    real, left = HfClipConfig.from_dict.__func__, [replace]

    def from_dict(cls: type, *args: object, **kwargs: object) -> object:
        config = real(cls, *args, **kwargs)
        if left:
            left.pop()()
        return config

    monkeypatch.setattr(HfClipConfig, "from_dict", classmethod(from_dict))


def is_whole(model: HfClipModel, references: dict[str, nn.Module]) -> bool:
    scale = {"quick_gelu": 1, "gelu": 2}[model.config.text_config.hidden_act]
    return torch.equal(model.logit_scale.detach(), references["vit"].logit_scale.detach() * scale)


def test_model_of_a_folder_that_is_replaced_meanwhile_is_read_again(
    two_models: dict[str, Path], references: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    write(two_models, "quick_gelu", out)
    replace_once(monkeypatch, lambda: write(two_models, "gelu", out))
    model = HfClipModel.from_pretrained(out)
    assert model.config.text_config.hidden_act == "gelu"
    assert is_whole(model, references)


def test_auto_class_that_has_read_another_configuration_is_refused(
    two_models: dict[str, Path], references: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    write(two_models, "quick_gelu", out)
    replace_once(monkeypatch, lambda: write(two_models, "gelu", out))
    with pytest.raises(FolderReplacedError, match="was replaced by another model while it was being read") as caught:
        AutoModel.from_pretrained(out)
    assert caught.value.folder == out
    assert is_whole(AutoModel.from_pretrained(out), references)


def test_configuration_that_was_changed_and_saved_by_the_reader_is_taken(repository: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(repository, out)
    config = AutoConfig.from_pretrained(out)
    config.text_config.hidden_act = "gelu"
    config.save_pretrained(out)
    assert "_writing" not in json.loads((out / "config.json").read_text())
    model = AutoModel.from_pretrained(out, config=config)
    assert model.config.text_config.hidden_act == "gelu"


def test_conversion_of_a_folder_that_is_replaced_meanwhile_is_of_one_model(
    two_models: dict[str, Path], references: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(two_models, "quick_gelu", tmp_path / "source")
    replace_once(monkeypatch, lambda: write(two_models, "gelu", tmp_path / "source"))
    convert(tmp_path / "source", tmp_path / "out")
    assert is_whole(HfClipModel.from_pretrained(tmp_path / "out"), references)


def test_readers_beside_two_converters_see_no_mixture(
    two_models: dict[str, Path], references: dict[str, nn.Module], tmp_path: Path
):
    out, over = tmp_path / "out", threading.Event()
    write(two_models, "quick_gelu", out)
    written = dict.fromkeys(two_models, 0)

    def go_on_writing(name: str) -> None:
        while not over.is_set():
            try:
                write(two_models, name, out)
                written[name] += 1
            except FolderInUseError:
                pass
            over.wait(0.2)

    writers = [threading.Thread(target=go_on_writing, args=(name,)) for name in two_models]
    for writer in writers:
        writer.start()
    read, mixtures, end = 0, 0, time.monotonic() + 300  # for a machine on which one of them hardly gets the lock
    try:
        while (read < 4 or min(written.values()) == 0) and time.monotonic() < end:
            try:
                model = (AutoModel if read % 2 else HfClipModel).from_pretrained(out)
            except OSError:  # between two, or replaced while it was read
                continue
            read += 1
            mixtures += not is_whole(model, references)
    finally:
        over.set()
        for writer in writers:
            writer.join()
    assert min(written.values()) > 0
    assert read >= 4
    assert mixtures == 0


def test_second_of_two_conversions_is_refused(archives: dict[str, Path], tmp_path: Path):
    """Both find the place empty before they read; the second must find it again before it writes."""
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out, overwrite=False) as folder:
        with pytest.raises(FolderInUseError, match="out is in use by another program"):
            convert(archives["resnet"], out)
        (folder / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(archives["resnet"], out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("format_name", ["hf_clip", "openai"])
@pytest.mark.parametrize("is_known", [True, False], ids=["before", "while writing"])
def test_full_disk_is_one_line_and_leaves_nothing(
    archives: dict[str, Path],
    small_disk: Path,
    format_name: str,
    is_known: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    if not is_known:  # as under a quota
        monkeypatch.setattr(whole_folder_module, "free_bytes", lambda place: None)
    assert main([str(archives["vit"]), str(small_disk / "out"), "--format", format_name]) == 1
    err = capsys.readouterr().err
    assert "error: No space left for " in err
    assert re.search(r"out: it needs [\d,]+ bytes", err)
    assert err.rstrip().endswith("Make room there, or name a folder on another disk.")
    assert "Traceback" not in err
    assert list(small_disk.iterdir()) == []
