"""`python -m benchmarks.gpu` where there is no GPU: every path with tiny models, and what is said when one fails."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import measuring
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import processes
from benchmarks.gpu.models import Implementations, variant_of
from benchmarks.gpu.report import Report, Setup
from hf_clip import HfClipImageProcessor, HfClipModel
from hf_clip.training import gradient_caching
from hf_clip.training.data.image_batch import DecodedImages, Normalisation
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import global_contrastive_loss

from .waiting import LONGEST_WAIT, until

QUICK = ("parity", "optimized", "losses", "training", "images", "speed")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WARM_UP_CALLS", 1)


def dry_run(folder: Path, *words: str) -> list[dict]:
    """The rows of a run that ends well."""
    files = ["--json", str(folder / "gpu.json"), "--picture", str(folder / "gpu.png")]
    assert program.main([*words, "--dry-run", *files]) == 0
    return json.loads((folder / "gpu.json").read_text())["rows"]


def test_every_path_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # which a machine with a GPU may not have
    rows = dry_run(tmp_path, *QUICK)
    assert {row["section"] for row in rows} == set(QUICK)
    states = {row["state"] for row in rows}
    assert states <= {"ok", "measured", "below its goal", "left out"}
    left_out = [row["what"] for row in rows if row["state"] == "left out"]
    assert left_out == ["beside memeff", "beside inf_cl"]  # which have kernels for GPUs alone
    with Image.open(tmp_path / "gpu.png") as picture:
        assert picture.size > (500, 300)


@pytest.mark.slow
def test_every_path_in_processes_of_their_own(tmp_path: Path):
    rows = dry_run(tmp_path, "processes", "survival")
    assert len([row for row in rows if row["state"] == "ok"]) >= 16
    assert [row["what"] for row in rows if row["state"] == "left out"] == ["float16 with a scaler"]


def run_sections(monkeypatch: pytest.MonkeyPatch, parts: dict, *words: str) -> int:
    sections = {name: ("what it is", ((part, 5.0),), 1.0) for name, part in parts.items()}
    monkeypatch.setattr(program, "SECTIONS", sections)
    return program.main(["--dry-run", *words])


def test_part_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def falls(setup: Setup) -> None:
        raise RuntimeError("no kernel image is available\nand much more")

    def stands(setup: Setup) -> None:
        setup.report.check("a number", 1e-7, 1e-6)

    assert run_sections(monkeypatch, {"first": falls, "second": stands}) == 1
    printed = capsys.readouterr().out
    assert "1 failed, 1 ok" in printed
    assert "failed         first     falls" in printed
    assert "RuntimeError: no kernel image is available" in printed
    assert run_sections(monkeypatch, {"second": stands}) == 0


@pytest.mark.parametrize("value", [1e-5, float("nan"), float("inf")])
def test_what_is_wrong_is_the_exit_status(
    value: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_sections(monkeypatch, {"only": lambda setup: setup.report.check("a number", value, 1e-6)}) == 1
    assert "1 WRONG" in capsys.readouterr().out


def test_goal_that_is_missed_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run_sections(monkeypatch, {"only": lambda setup: setup.report.goal("a ratio", 1.0, 1.2)}) == 0
    assert "below its goal only      a ratio" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_said(capsys: pytest.CaptureFixture[str]):
    report = Report(10.0)
    assert report.has_time("something", 5.0)
    assert not report.has_time("something longer", 50.0)
    assert "skipped" in (printed := capsys.readouterr().out)
    assert "10 s are left, and it may take 50" in printed
    assert not report.is_wrong()


def test_each_section_has_its_time_and_what_others_left(monkeypatch: pytest.MonkeyPatch):
    """Of the 8 minutes the first of two equal sections has half. What it does not need the second one has too."""
    left: dict[str, float] = {}

    def note(setup: Setup) -> None:
        left[setup.report.section] = setup.report.left()

    assert run_sections(monkeypatch, {"first": note, "second": note}) == 0
    assert left["first"] == pytest.approx(240, abs=20)
    assert left["second"] == pytest.approx(480, abs=20)
    assert run_sections(monkeypatch, {"first": note, "second": note}, "second", "--minutes", "2") == 0
    assert left["second"] == pytest.approx(120, abs=20)
    shares = [share for _, _, share in program.SECTIONS.values()]
    assert all(share > 0 for share in shares)


def test_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    watched: list[tuple[float, bool]] = []
    monkeypatch.setattr(program.faulthandler, "dump_traceback_later", lambda s, exit, file: watched.append((s, exit)))
    monkeypatch.setattr(program.faulthandler, "cancel_dump_traceback_later", lambda: watched.append((0.0, False)))
    assert run_sections(monkeypatch, {"only": lambda setup: None}, "--minutes", "3") == 0
    assert watched == [(180 + program.HANGS, True), (0.0, False)]


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]):
    assert program.main([]) == 1
    assert program.main(["speeds", "--dry-run"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: torch sees no GPU here; pass --dry-run to try every path on a CPU"
    assert errors[1].startswith("error: there is no section 'speeds'; there are parity, optimized")


def test_process_that_fails_or_hangs_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "GRACE", 0.2)
    codes = ['print(\'ROW {"what": "a check", "is_so": true, "note": ""}\'); raise SystemExit(\'no room\')']
    codes.append("import time; print('waiting', flush=True); time.sleep(1000)")
    started = []
    for rank, code in enumerate(codes):
        log = tmp_path / f"{rank}.log"
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)
        started.append(processes.Started("two", rank, process, log))
    until(started[1].log.read_text)
    setup = Setup(Report(60.0), "cpu", True)
    ended = processes.wait(started, LONGEST_WAIT)
    assert ended == started[1:]
    processes.take_in(setup, started, ended)
    rows = [(row.what, row.state, row.note) for row in setup.report.rows]
    assert rows == [
        ("a check", "ok", ""),
        ("two, process 0", "failed", "exit status 1: no room"),
        ("two, process 1", "failed", "ended after its time limit; waiting"),
    ]


# What a CPU does not show: tensors that are made on the CPU where the model lies elsewhere. torch refuses to compute
# with both, also where "elsewhere" is its device without numbers.


def model_elsewhere(name: str) -> HfClipModel:
    """A tiny model without numbers."""
    with torch.device("meta"):
        return HfClipModel(Implementations(variant_of(name, True), "cpu").config)


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which that device has not."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
@pytest.mark.usefixtures("no_autocast")
def test_step_by_micro_batches_makes_nothing_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch):
    class NoState:
        def __init__(self, device: torch.device):
            assert device.type == "meta"

        def replayed(self) -> contextlib.nullcontext:
            return contextlib.nullcontext()

    monkeypatch.setattr(gradient_caching, "_RandomState", NoState)
    monkeypatch.setattr("hf_clip.training.tiles.TILE_ROWS", {"cpu": 4, "meta": 4})
    monkeypatch.setattr("hf_clip.training.tiles.TILE_LOGITS", {"cpu": 8, "meta": 8})
    model = model_elsewhere(name).eval()
    batch = {"pixel_values": torch.zeros(6, 3, 64, 64), "input_ids": torch.zeros(6, 16, dtype=torch.long)}

    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> gradient_caching.ContrastiveResult:
        return global_contrastive_loss(images, texts, scale, label_smoothing=0.1)

    result = backpropagate(model, batch, loss, micro_batch_size=4)
    assert result.global_loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.usefixtures("no_autocast")
def test_scaling_on_the_device_makes_nothing_on_the_cpu(fit: str):
    steps = HfClipImageProcessor(fit=fit).steps()
    sizes = [(64, 48), (40, 70)]
    levels = torch.zeros(sum(3 * width * height for width, height in sizes), dtype=torch.uint8)
    colours = [(1.0, 1.1, 0.9), (1.0, 1.0, 1.0)]
    images = DecodedImages(levels, sizes, [True, False], colours, Normalisation(steps, False, False))
    assert images.to("meta").device.type == "meta"
    assert steps.run_tensor(torch.zeros(2, 3, 48, 64, dtype=torch.uint8, device="meta")).device.type == "meta"
