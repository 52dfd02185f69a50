"""Runs that are killed, that have no room, whose processes die: what remains, and what is said."""

import os
import random
import resource
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Image, load_from_disk

from hf_clip.training import checkpoint, failures, run_steps, stopping
from hf_clip.training.checkpoint import UnwrittenCheckpointError, list_checkpoints, read_state
from hf_clip.training.config import TrainingConfig
from hf_clip.training.records import Records, read_metrics

from ..finetuning import options, records, train, weights, words
from ..waiting import LONGEST_WAIT
from .forked_runs import ForkedRun
from .sources import write_tar
from .test_resume import assert_same_checkpoint, chosen, plain
from .turns import Turns

# --- killed ----------------------------------------------------------------------------------------------------------


def write_tars(digits: Path, folder: Path) -> Path:
    rows = load_from_disk(str(digits / "pairs"))["train"].cast_column("image", Image(decode=False)).select(range(160))
    images, texts = [row["bytes"] for row in rows["image"]], rows["caption"][:]
    folder.mkdir()
    for shard in range(2):
        part = slice(80 * shard, 80 * (shard + 1))
        write_tar(folder / f"{shard}.tar", images[part], texts[part], start=80 * shard)
    return folder


def survives(digits: Path, tmp_path: Path, kills: int, source: str, processes: int, **fields: Any) -> None:
    """Kill a run while it writes, at places drawn at random, go on each time, and compare with one that was not."""
    given = chosen(digits, per_device_train_batch_size=24 // processes, logging_steps=1, save_steps=2, validation="20")
    given |= {"max_steps": 8} | fields
    if source != "table":
        given |= {"streaming": True, "validation": "20"}
    if source == "tars":
        given |= {"dataset": [str(write_tars(digits, tmp_path / "tars") / "*.tar")]}

    def run(out: Path, kill_at: int | None, **more: Any) -> ForkedRun:
        faults: dict[int, list[tuple]] = {0: [("writes", str(out), kill_at)]}
        return ForkedRun(words(options(digits, out, **given | more)), tmp_path / "printed", processes, faults)

    whole, out = tmp_path / "whole", tmp_path / "out"
    uninterrupted = run(whole, None)
    assert uninterrupted.wait() == [0] * processes, uninterrupted.printed
    drawn = random.Random(kills)
    killed = 0
    while True:
        kill_at = drawn.randrange(1, uninterrupted.writes()) if killed < kills else None
        has_one = bool(list_checkpoints(out))
        more = {"resume_from_checkpoint": "latest"} if has_one else {"overwrite_output_dir": True}
        status = (going := run(out, kill_at, **more)).wait_for_one(0)
        if status == 0:
            if killed == kills:
                break
            continue  # so near to its end that it wrote less often than that
        assert status == -signal.SIGKILL, going.printed
        killed += 1
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert plain(out) == plain(whole)
    assert_same_checkpoint(list_checkpoints(out)[-1], list_checkpoints(whole)[-1])
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (out, whole)]
    assert names[0] == names[1]
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "whole", "printed", "tars"}


def test_run_that_is_killed_while_it_writes_ends_as_if_nothing_had_happened(digits: Path, tmp_path: Path):
    survives(digits, tmp_path, 2, "table", 1, max_steps=5, metric_for_best_model=None, validation=None)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("source", ["table", "stream", "tars"])
def test_run_that_is_killed_twenty_times_ends_as_if_nothing_had_happened(
    digits: Path, tmp_path: Path, source: str, processes: int
):
    survives(digits, tmp_path, 20, source, processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_that_is_killed_at_any_moment_ends_as_if_nothing_had_happened(digits: Path, tmp_path: Path, processes: int):
    """By the clock: in the midst of a step, of a file, of an exchange."""
    given = chosen(digits, per_device_train_batch_size=24 // processes, logging_steps=1, save_steps=1, max_steps=60)
    whole = train(digits, tmp_path / "whole", **given) if processes == 1 else tmp_path / "whole"
    if processes == 2:
        assert ForkedRun(words(options(digits, whole, **given)), tmp_path / "printed", 2).wait() == [0, 0]
    out, drawn = tmp_path / "out", random.Random(0)
    for kill in range(21):
        more = {"resume_from_checkpoint": "latest"} if list_checkpoints(out) else {"overwrite_output_dir": True}
        run = ForkedRun(words(options(digits, out, **given | more)), tmp_path / "printed", processes)
        if kill < 20:
            before, until = len(list_checkpoints(out)), time.monotonic() + 60
            while len(list_checkpoints(out)) == before and run.processes[0].is_alive() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(drawn.random())
            run.end()
        else:
            assert run.wait() == [0] * processes, run.printed
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert plain(out) == plain(whole)


# --- signals and deaths in one process of two ------------------------------------------------------------------------


def two(digits: Path, out: Path, **fields: Any) -> dict[str, Any]:
    return options(digits, out, per_device_train_batch_size=12, logging_steps=1, max_steps=5) | fields


def test_signal_to_one_of_two_processes_ends_both_with_a_checkpoint_of_its_step(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    run = ForkedRun(words(two(digits, out)), tmp_path / "printed", 2, {1: [("step", 3, signal.SIGTERM)]})
    assert run.wait() == [143, 143], run.printed
    (last,) = list_checkpoints(out)
    said = "".join(run.printed)
    assert said.count("ended by SIGTERM") == 1
    assert f"ended by SIGTERM: the 3 steps so far are in {last}; --resume" in run.printed[0]
    assert [record["step"] for record in records(out)] == [1, 2, 3]
    assert read_state(last).step == 3


def test_dead_process_is_named_by_the_others(digits: Path, tmp_path: Path):
    """Killed in the midst of the third step, without a launcher that would tell."""
    flags = two(digits, tmp_path / "out", save_steps=2)
    run = ForkedRun(words(flags), tmp_path / "printed", 2, {0: [("quicker", 0.2)], 1: [("step", 3, signal.SIGKILL)]})
    statuses = run.wait()
    assert statuses == [1, -signal.SIGKILL], run.printed
    line = run.printed[0].splitlines()[-1]
    who = f"process 1 of 2 (process id {run.processes[1].pid} on {socket.gethostname()})"
    assert line.startswith(
        f"error: {who} is gone: it was killed, or its machine is. The others cannot go on without it."
    )
    assert "Traceback" not in run.printed[0]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["step-00000002"]


def lives_of(count: int, port: int) -> list[stopping.SignsOfLife]:
    wait = timedelta(seconds=LONGEST_WAIT)
    return [
        stopping.SignsOfLife(dist.TCPStore("127.0.0.1", port, is_master=False, timeout=wait), rank, count)
        for rank in range(count)
    ]


def test_all_processes_learn_which_one_is_gone(monkeypatch: pytest.MonkeyPatch):
    """Of three, of which only the one before it watches the last."""
    turns = Turns(monkeypatch)
    monkeypatch.setattr(stopping, "LONGEST_WITHOUT_STORE", 0.0)
    wait = timedelta(seconds=LONGEST_WAIT)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    lives = lives_of(3, store.port)
    lives[2].give()
    found: list[tuple[str, bool]] = []
    for life in lives[:2]:
        turns.start(life, lambda *end: found.append(end))
    turns.take(4)
    assert found == []
    turns.take(2)
    who = f"process 2 of 3 (process id {os.getpid()} on {socket.gethostname()})"
    assert found == [(who, True), ("", False)]
    turns.end()
    assert lives[0].find_gone() in (who, f"process 1{who[9:]}")  # neither of both gives signs any more
    store.set("hf_clip_alive_1", stopping.ENDED)
    assert lives[0].find_gone() == who
    store.set("hf_clip_alive_2", stopping.ENDED)
    assert lives[0].find_gone() is None
    del store  # with the process that kept it
    assert lives[1].find_gone() == "process 0 of 3"
    found.clear()
    lives[1].watch(lambda *end: found.append(end), threading.Event())
    assert found == [("process 0 of 3", True)]


# --- no room ---------------------------------------------------------------------------------------------------------


def without_room(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], size: int) -> None:
    """No file of the checkpoints of these steps can be larger than so many bytes, whatever writes it."""
    save = checkpoint.save_states

    def save_states(learner: Any, folder: Path) -> None:
        is_full = int(folder.name.split("-")[1].split(".")[0]) in steps
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]) if is_full else before)
        try:
            save(learner, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoint, "save_states", save_states)


def test_full_disk_ends_a_run_in_one_line_or_not_at_all_and_the_checkpoint_before_is_whole(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    given = {"save_steps": 2, "max_steps": 7, "per_device_train_batch_size": 16, "logging_steps": 1}
    with monkeypatch.context() as patch:
        without_room(patch, (4,), 900_000)  # the weights have room, the optimizer's state has not
        with pytest.raises(UnwrittenCheckpointError) as error:
            train(digits, out, **given)
    (last,) = list_checkpoints(out)
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000002"]
    assert read_state(last).step == 2
    found = error.value
    written = sum(path.stat().st_size for path in last.iterdir())
    assert written <= found.needed <= written + 2**20
    assert str(found) == (
        f"No space left for the checkpoint {last.parent / 'step-00000004'}: it needs {found.needed:,} bytes, and "
        f"{found.free:,} are free in {last.parent}. {last} is whole: make room, and go on with --resume_from_"
        f"checkpoint latest. --keep_going_without_checkpoints trains on all the same."
    )
    capsys.readouterr()
    with monkeypatch.context() as patch:
        without_room(patch, (4,), 300_000)  # no room for the weights
        train(digits, out, resume_from_checkpoint="latest", keep_going_without_checkpoints=True, **given)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: No space left")]
    assert line.endswith(f"are free in {out / 'checkpoints'}. The run goes on without.")
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000002", "step-00000006"]
    whole = train(digits, tmp_path / "whole", **given)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())


def test_room_is_looked_for_before_anything_is_written_and_a_signal_says_what_remains(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(checkpoint, "save_states", None)  # it is not called

    def check_loss(run: run_steps.Run, loss: torch.Tensor) -> None:
        if run.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_steps.Run, "check_loss", check_loss)
    out = tmp_path / "out"
    with pytest.raises(stopping.Stopped) as stop:
        train(digits, out, per_device_train_batch_size=16, max_steps=4)
    assert failures.report_stop(stop.value) == 143
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"ended by SIGTERM: No space left for the checkpoint {out / 'checkpoints/step-00000002'}: it "
    )
    assert line.endswith(f"bytes, and 1,000 are free in {out / 'checkpoints'}. No checkpoint was written before")
    assert not (out / "checkpoints").exists()


def test_records_wait_for_room(digits: Path, tmp_path: Path):
    """Half of a line is no record, and the next one would stand behind it."""
    given = options(digits, tmp_path, save_steps=2, keep_going_without_checkpoints=True)
    accelerator: Any = type("Alone", (), {"is_main_process": True})
    kept, strict = (
        Records(TrainingConfig(**given), accelerator),
        Records(TrainingConfig(**options(digits, tmp_path)), accelerator),
    )
    kept.add({"step": 1, "loss": 2.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        with pytest.raises(OSError, match=r"No space left for 25 bytes in .*metrics.jsonl. Make room, and go on with"):
            strict.add({"step": 2, "loss": 2.0})
        kept.add({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    kept.add({"step": 3, "loss": 0.5})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [2.0, 1.0, 0.5]
