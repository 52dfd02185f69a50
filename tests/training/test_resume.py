"""A run that was interrupted and goes on ends as if nothing had happened."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_clip.commands import finetune
from hf_clip.training import run_steps, stopping
from hf_clip.training.best import step_of_best
from hf_clip.training.checkpoint import find_checkpoint, list_checkpoints, read_state
from hf_clip.training.checksums import SUMS, write_checksums
from hf_clip.training.data.loader import PairLoader, Position
from hf_clip.training.option_names import RENAMED
from hf_clip.training.run_state import check_identity

from ..finetuning import largest_difference, options, records, train, weights, words
from ..two_processes import TwoProcesses

SPEED = ("images_per_second", "data_wait", "peak_memory_gb")


AUGMENT_ON = {"vit": "worker", "resnet": "device"}


class Interrupted(Exception):  # noqa: N818
    pass


def chosen(digits: Path, **fields: Any) -> dict[str, Any]:
    """Several captions, images that are cropped and turned, bad rows, a moving average, a place within an epoch."""
    given = {
        "dataset": [str(digits / "several")],
        "per_device_train_batch_size": 24,
        "max_bad_fraction": 0.5,
        "max_steps": 14,
    }
    given |= {"augmentation": "crop=0.5,flip=0.5,jitter=0.2", "ema_decay": 0.9, "logging_steps": 3}
    return given | {"save_steps": 4, "validation": "20", "metric_for_best_model": "recall@10"} | fields


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        tower: train(digits, folder / tower, tower, **chosen(digits, augment_on=AUGMENT_ON[tower]))
        for tower in ("vit", "resnet")
    }


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    check = run_steps.Run.check_loss

    def check_loss(run: run_steps.Run, loss: torch.Tensor) -> None:
        check(run, loss)
        if run.state.step + 1 == at:
            raise Interrupted

    monkeypatch.setattr(run_steps.Run, "check_loss", check_loss)


def plain(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in SPEED} for record in records(folder, "step")]


def tensors(stored: Any) -> Any:
    """What was stored, tensors as their bytes."""
    if isinstance(stored, dict):
        return {key: tensors(value) for key, value in stored.items()}
    if isinstance(stored, list | tuple):
        return [tensors(value) for value in stored]
    return stored.numpy().tobytes() if isinstance(stored, torch.Tensor) else stored


def assert_same_checkpoint(first: Path, second: Path) -> None:
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    found = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (first, second)]
    assert tensors(found[0]) == tensors(found[1])


@pytest.mark.parametrize("resume", ["latest", "PATH"])
def test_resumed_run_ends_as_the_uninterrupted_one(
    digits: Path,
    tmp_path: Path,
    tower: str,
    resume: str,
    uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
):
    out, given = tmp_path / "out", chosen(digits, augment_on=AUGMENT_ON[tower])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, at=11)
        train(digits, out, tower, **given)
    assert not (out / "model.safetensors").exists()
    assert [path.name for path in list_checkpoints(out)] == ["step-00000004", "step-00000008"]
    assert plain(out)[-1]["step"] == 9
    start = "latest" if resume == "latest" else str(out / "checkpoints" / "step-00000004")
    train(digits, out, tower, **given, resume_from_checkpoint=start)

    first, second = weights(uninterrupted[tower]), weights(out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain(out) == plain(uninterrupted[tower])
    (*_, last), (*_, expected) = list_checkpoints(out), list_checkpoints(uninterrupted[tower])
    assert_same_checkpoint(last, expected)
    state = json.loads((last / "run.json").read_text())
    assert (state["step"], state["epoch"], state["batch"]) == (12, 2, 4)  # four batches in an epoch of 108 rows
    assert state["bad_rows"][0]["bad"] > 0


def test_last_checkpoints_are_kept_and_nothing_unfinished(uninterrupted: dict[str, Path]):
    for out in uninterrupted.values():
        found = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert found == ["best", "step-00000008", "step-00000012"]
        assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate '2e-3', and this one has '1e-3'"),
        ({"ema_decay": None}, "ema_decay 0.9, and this one has None"),
        ({"augmentation": "none"}, "augmentation 'crop=0.5,flip=0.5,jitter=0.2', and this one has 'none'"),
        ({"per_device_train_batch_size": 12}, "pairs in a batch 24, and this one has 12"),
        ({"max_steps": 20}, "steps 14, and this one has 20"),
        ({"metric_for_best_model": "recall@1"}, "metric_for_best_model 'recall@10', and this one has 'recall@1'"),
    ],
)
def test_other_options_are_refused_and_change_nothing(
    digits: Path, uninterrupted: dict[str, Path], change: dict, message: str
):
    out = uninterrupted["vit"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=f"step-00000012 was written by a run with {message}: (it could not go on|the order)"
    ):
        train(digits, out, **chosen(digits, resume_from_checkpoint="latest", **change))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_checkpoints_are_found_when_they_are_whole(tmp_path: Path):
    for name in (
        "step-00000010",
        "step-00000009",
        ".step-00000011.unfinished",
        "step-00000012",
        "step-abc",
        "step-",
        "step-10-copy",
        "step-\u0661",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000012":
            (tmp_path / "checkpoints" / name / "run.json").write_text(
                f'{{"step": {int(name[-8:])}, "format": 2, "identity": {{"seed": 0}}}}' if name[-8:].isdigit() else "{}"
            )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert find_checkpoint(tmp_path, "latest").name == "step-00000010"
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint .*12; those of .*: .*step-00000009, .*10\."):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step-00000012"))
    state = read_state(tmp_path / "checkpoints" / "step-00000009")
    check_identity(tmp_path, state, {"seed": 0})
    assert state.step == 9


@pytest.mark.parametrize(
    ("name", "size"), [("run.json", 0), ("run.json", 20), ("model.safetensors", 0), ("model.safetensors", 999),
                       ("optimizer.pt", 0), ("optimizer.pt", 999), ("random_states_00000.json", None),
                       ("schedule.json", 0), ("schedule.json", None), ("moving_average.safetensors", 99)]
)  # fmt: skip
def test_damaged_checkpoint_is_refused_and_others_are_named(
    digits: Path, uninterrupted: dict[str, Path], tmp_path: Path, name: str, size: int | None
):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted["vit"], out)
    (*_, before, last) = list_checkpoints(out)
    path = last / name
    if size is None:
        path.write_bytes(b"no pickle")
    else:
        path.write_bytes(path.read_bytes()[:size])
    message = rf"The checkpoint {last} is damaged \(.*\). Go on from another with --resume_from_checkpoint {before}\.$"
    for is_signed in (False, True):  # the digests refuse it, and so do those who read it
        with pytest.raises(ValueError, match=message) as error:
            train(digits, out, **chosen(digits, resume_from_checkpoint=str(last)))
        assert len(str(error.value).splitlines()) == 1
        if name == "run.json":
            break
        assert (f"{name} is not as it was written" in str(error.value)) is not is_signed
        write_checksums(last)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "run.json", SUMS])
def test_one_flipped_bit_in_the_latest_is_named_and_the_newest_whole_checkpoint_is_taken(
    digits: Path, uninterrupted: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted["vit"], out)
    (before, last) = list_checkpoints(out)
    content = bytearray((last / name).read_bytes())
    content[-1 - len(content) // 3] ^= 1
    (last / name).write_bytes(content)
    assert find_checkpoint(out, "latest") == before
    line = capsys.readouterr().err
    assert re.fullmatch(rf"warning: The checkpoint {last} is damaged \(.+\). The run goes on from {before}.\n", line)
    if name == "model.safetensors":
        assert f"({name} is not as it was written: its checksum differs)" in line
        train(digits, out, **chosen(digits, resume_from_checkpoint="latest"))
        assert plain(out) == plain(uninterrupted["vit"])
        assert all(torch.equal(value, weights(out)[key]) for key, value in weights(uninterrupted["vit"]).items())
    (before / name).unlink()
    (last / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{last} is damaged .*There is no other that is whole: start anew|no checkp"):
        find_checkpoint(out, "latest")


def test_digests_are_those_of_sha256sum(uninterrupted: dict[str, Path]):
    """And each file of a checkpoint has one."""
    last = list_checkpoints(uninterrupted["vit"])[-1]
    *lines, _ = (last / SUMS).read_text().splitlines()
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.iterdir()}
    del expected[SUMS]
    assert dict(line.split("  ")[::-1] for line in lines) == expected


def test_options_that_were_called_otherwise_are_known_again(uninterrupted: dict[str, Path], tmp_path: Path):
    """In a checkpoint of a run that was written before options took Hugging Face's names."""
    written = list_checkpoints(uninterrupted["vit"])[-1]
    values = json.loads((written / "run.json").read_text())
    identity = values["identity"]
    old = {new: name for name, new in RENAMED.items()}
    values["identity"] = {old.get(name, name): value for name, value in identity.items()}
    assert {"optimizer", "scheduler", "keep_best"} <= values["identity"].keys()
    values["format"] = 2  # which had no digests
    (tmp_path / "run.json").write_text(json.dumps(values))
    state = replace(read_state(tmp_path), format=3)
    assert state == read_state(written)
    check_identity(tmp_path, state, identity)
    with pytest.raises(ValueError, match="with optim 'AdamW', and this one has 'SGD'"):
        check_identity(tmp_path, state, identity | {"optim": "SGD"})


class Planted:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.mark),))


def planted_pickles(mark: Path) -> list[bytes]:
    """As pickle and torch write them."""
    buffer = io.BytesIO()
    torch.save({"state": Planted(mark), "param_groups": []}, buffer)
    return [pickle.dumps(Planted(mark)), buffer.getvalue()]


def test_no_file_of_a_checkpoint_runs_code(digits: Path, uninterrupted: dict[str, Path], tmp_path: Path):
    mark = tmp_path / "ran"
    for pickled in planted_pickles(mark):
        with suppress(Exception):
            torch.load(io.BytesIO(pickled), weights_only=False)
        with suppress(Exception):
            pickle.loads(pickled)
        assert mark.exists(), "the test's own pickles run"
        mark.rmdir()
    out = tmp_path / "out"
    shutil.copytree(uninterrupted["vit"], out)
    last = list_checkpoints(out)[-1]
    paths = [*last.iterdir(), out / "checkpoints" / "best" / "model.safetensors"]
    assert len(paths) == 8
    for path in paths:
        good = path.read_bytes()
        for pickled in planted_pickles(mark):
            path.write_bytes(pickled)
            if path.name != SUMS:
                write_checksums(last)
            with pytest.raises(ValueError, match="damaged") as error:
                train(digits, out, **chosen(digits, resume_from_checkpoint=str(last)))
            assert len(str(error.value).splitlines()) == 1
            assert "weights_only" not in str(error.value)
            assert not mark.exists(), path.name
        path.write_bytes(good)
    write_checksums(last)
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "optimizer.bin", "scaler.pt"):
        (last / name).write_bytes(pickled)  # what accelerate would read
    train(digits, out, **chosen(digits, resume_from_checkpoint="latest"))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, r"written by another version of hf_clip \(format 1, .*: some of its files could run code"),
        ({"format": 4}, r"written by another version of hf_clip \(format 4, .*: this one cannot read it. Go on with"),
        ({"step": "12"}, "is damaged .step in run.json is '12'"),
        ({"batch": -1}, "is damaged .batch in run.json is '-1'"),
        ({"best": []}, "is damaged .best in run.json is"),
        ({"step": 11}, "is damaged .step in run.json is 11, and the folder's name has another"),
        ({"step": 15}, "is damaged .step in run.json is 15, and can be 14 at most"),
        ({"epoch": 13}, "is damaged .epoch in run.json is 13, and can be 12 at most"),
        ({"batch": 11}, "is damaged .batch in run.json is 11, and can be 10 at most"),
        ({"best_step": 13}, "is damaged .best_step in run.json is 13, and can be 12 at most"),
        ({"evaluations_since": 10**9}, "is damaged .evaluations_since in run.json is 1000000000, and can be 13"),
        ({"identity": [1]}, "is damaged .identity in run.json is"),
        ({"losses": ["x"]}, "is damaged .losses, accuracies and best in run.json are not all numbers"),
        ({"losses": [10**400], "accuracies": [1]}, "is damaged .losses, accuracies and best in run.json are"),
        ({"accuracies": [0.5]}, "is damaged .run.json has 0 losses and 1 accuracies"),
        ({"more": 1}, "is damaged .*unexpected keyword argument 'more'"),
        ({"bad_rows": [{}, {}]}, "is damaged .bad_rows in run.json has 2 counters, which is not one for each process"),
        ({"bad_rows": [3]}, "is damaged .bad_rows in run.json has '3'"),
        ({"bad_rows": [{"drawn": 5, "bad": 0}]}, "is damaged .bad_rows in run.json has .{'drawn': 5"),
        ({"bad_rows": [{"drawn": "5", "bad": 0, "first": ""}]}, "is damaged .bad_rows in run.json has"),
        ({"bad_rows": [{"drawn": 5, "bad": -1, "first": ""}]}, "is damaged .bad_rows in run.json has"),
        ({"bad_rows": [{"drawn": 5, "bad": 6, "first": ""}]}, "is damaged .bad_rows in run.json has"),
    ],
    ids=[
        *("older", "newer", "word", "negative", "list", "other step", "step", "epoch", "batch", "best step"),
        *("evaluations", "identity", "losses", "huge loss", "pairs of figures", "unknown"),
        *("counters", "no counter", "half a counter", "text for a number", "negative number", "more bad than all"),
    ],
)
def test_states_that_no_run_wrote_are_refused(
    uninterrupted: dict[str, Path], tmp_path: Path, change: dict, message: str
):
    values = json.loads((list_checkpoints(uninterrupted["vit"])[-1] / "run.json").read_text()) | change
    folder = tmp_path / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    stored = {name: value for name, value in values.items() if value is not None or name == "best"}
    (folder / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        read_state(folder)
    for text in ("[" * 100_000, "[]", "3", '"step"', "{}x"):
        (folder / "run.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged") as error:
            read_state(folder)
        assert len(str(error.value)) < 1000


# --- signals ---------------------------------------------------------------------------------------------------------


def send(monkeypatch: pytest.MonkeyPatch, signum: int, at: int, times: int = 1) -> None:
    """To this process, while batch number `at` is computed."""
    check, seen = run_steps.Run.check_loss, []

    def check_loss(run: run_steps.Run, loss: torch.Tensor) -> None:
        check(run, loss)
        seen.append(loss)
        if len(seen) == at:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(run_steps.Run, "check_loss", check_loss)


@pytest.mark.parametrize(
    ("signum", "status", "at"),
    [(signal.SIGTERM, 143, 6), (signal.SIGHUP, 129, 8), (signal.SIGINT, 130, 6)],  # step 8 is one to be evaluated
)
def test_signal_ends_the_run_with_a_checkpoint_of_its_step(
    digits: Path,
    tmp_path: Path,
    uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    signum: signal.Signals,
    status: int,
    at: int,
):
    out = tmp_path / "out"
    given = words(options(digits, out, **chosen(digits)))
    handlers = [signal.getsignal(each) for each in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *given])
        send(patch, signum, at=at)
        assert finetune.main() == status
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == handlers
    assert [path.name for path in list_checkpoints(out)] == ["step-00000004", f"step-{at:08}"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ended by" in line]
    saved = out / "checkpoints" / f"step-{at:08}"
    remains = f"the {at} steps so far are in {saved}; --resume_from_checkpoint latest goes on from there"
    assert line == f"ended by {signum.name}: {remains}"
    train(digits, out, **chosen(digits, resume_from_checkpoint="latest"))
    first, second = weights(uninterrupted["vit"]), weights(out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain(out) == plain(uninterrupted["vit"])
    assert [path.name for path in list_checkpoints(out)] == ["step-00000008", "step-00000012"]


def test_signal_waits_for_an_accumulated_step_and_a_failure_goes_back_to_the_last_whole_one(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    given = chosen(digits, max_steps=4, save_steps=None, metric_for_best_model=None, validation=None)
    whole = train(digits, tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, at=8)  # the second batch of the third step
        with pytest.raises(stopping.Stopped):
            train(digits, tmp_path / "out", **given)
    original = PairLoader.batches

    def batches(loader: PairLoader, position: Position) -> Iterator[Any]:
        yield from islice(original(loader, position), 8)
        raise ValueError("the data are gone.")

    with monkeypatch.context() as patch:
        patch.setattr(PairLoader, "batches", batches)
        with pytest.raises(
            ValueError, match=r"the data are gone. The 2 steps so far are in .*step-00000002; --resume_from_checkpoint"
        ):
            train(digits, tmp_path / "gone", **given)
    # Six or nine batches, five in an epoch.
    for name, where in (("out", (3, 1, 4)), ("gone", (2, 1, 1))):
        (last,) = list_checkpoints(tmp_path / name)
        state = read_state(last)
        assert (state.step, state.epoch, state.batch) == where
        assert len(state.losses) == 3 * (state.step % 3)  # those since the last record, of every third step
        out = train(digits, tmp_path / name, resume_from_checkpoint="latest", **given)
        assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
        assert plain(out) == plain(whole)


def test_second_signal_ends_at_once_and_one_before_the_steps_too(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        send(patch, signal.SIGINT, at=6, times=2)
        with pytest.raises(stopping.Stopped) as stop:
            train(digits, tmp_path / "out", **chosen(digits))
    assert stop.value.saved.endswith("--resume_from_checkpoint latest goes on from the last checkpoint, if any")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["step-00000004"]

    def check_run(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_steps, "check_run", check_run)
    with pytest.raises(stopping.Stopped) as stop:
        train(digits, tmp_path / "early", **chosen(digits))
    assert (stop.value.status, stop.value.saved) == (143, "")
    assert not (tmp_path / "early").exists()


def test_record_that_was_cut_off_is_passed_over(digits: Path, uninterrupted: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted["vit"], out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    train(digits, out, **chosen(digits, resume_from_checkpoint="latest"))
    assert plain(out) == plain(uninterrupted["vit"])


def test_run_that_went_back_leaves_nothing_of_where_it_was(
    digits: Path, uninterrupted: dict[str, Path], tmp_path: Path
):
    """Checkpoints of later steps would be taken for the latest, and the best weights for those of this run."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted["vit"], out)
    (earlier, later) = list_checkpoints(out)
    changed = chosen(digits, resume_from_checkpoint=str(earlier), save_steps=1)
    best = json.loads((earlier / "run.json").read_text())["best_step"]
    save_file({"broken": torch.zeros(1)}, out / "checkpoints" / "best" / "model.safetensors", {"step": "13"})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, at=11)
        train(digits, out, **changed)
    assert [path.name for path in list_checkpoints(out)] == ["step-00000009", "step-00000010"]
    assert not later.exists()
    assert step_of_best(out) in (9, 10)
    assert best <= 8


def test_other_launchers_are_refused(digits: Path, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="with gradient_accumulation_steps 1, and this one has 2"):
        train(digits, uninterrupted["vit"], **chosen(digits, resume_from_checkpoint="latest"))


def test_two_processes_go_on_where_they_stopped(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    """Each with its own count of rows that cannot be used."""
    flags = {"dataset": [str(digits / "several")], "max_bad_fraction": 0.5, "max_steps": 7, "save_steps": 3}
    flags |= {"per_device_train_batch_size": 12, "logging_steps": 1}
    for resume in (None, "latest"):
        two_processes.run(words(options(digits, tmp_path / "two", resume_from_checkpoint=resume, **flags)))
        last = list_checkpoints(tmp_path / "two")[-1]
        counts = [(each["drawn"], each["bad"]) for each in json.loads((last / "run.json").read_text())["bad_rows"]]
        assert [drawn for drawn, _ in counts] == [6 * 12, 6 * 12]
        assert sum(bad for _, bad in counts) > 0
        if resume is None:
            expected, expected_counts = weights(tmp_path / "two"), counts
            shutil.rmtree(last)
    assert counts == expected_counts
    found = weights(tmp_path / "two")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    message = (
        r"pairs in a batch 24, and this one has 12: the order of the pairs is that of the batches, .* Pass --per_d"
    )
    with pytest.raises(ValueError, match=message + "evice_train_batch_size 24, or start anew"):
        train(digits, tmp_path / "two", resume_from_checkpoint="latest", **flags)


def test_one_process_goes_on_with_the_batches_of_two(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    """And counts the rows that cannot be used on from the sum of theirs."""
    flags = {"dataset": [str(digits / "several")], "max_bad_fraction": 0.5, "max_steps": 7, "save_steps": 3}
    flags |= {"per_device_train_batch_size": 12, "logging_steps": 1}
    whole = options(digits, tmp_path / "two", **flags)
    two_processes.run(words(whole))
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for path in list_checkpoints(tmp_path / "one")[1:]:
        shutil.rmtree(path)
    flags["per_device_train_batch_size"] = 24
    one = train(digits, tmp_path / "one", resume_from_checkpoint="latest", **flags)
    counts = [
        [sum(each[name] for each in read_state(list_checkpoints(folder)[-1]).bad_rows) for name in ("drawn", "bad")]
        for folder in (one, tmp_path / "two")
    ]
    assert counts[0] == counts[1] == [6 * 24, counts[0][1]]
    losses = [[record["loss"] for record in records(folder)] for folder in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert largest_difference(weights(one), weights(tmp_path / "two")) < 1e-5
