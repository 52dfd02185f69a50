"""What ends a run from outside, and what keeps two runs from one folder."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from hf_clip.checkpoints.whole_folder import FolderInUseError
from hf_clip.training import stopping
from hf_clip.training.checkpoint import list_checkpoints
from hf_clip.training.output import held

from ..finetuning import options, records, train, words
from ..waiting import LONGEST_WAIT, until
from .turns import Turns

# --- the folder ------------------------------------------------------------------------------------------------------


def test_folder_is_held_by_one_run_which_is_named(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    message = rf"out is in use by another program \(process {os.getpid()} on .*\); wait until it is done or end it, or"
    with held(out):
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=message) as error:
                train(digits, out)
            assert error.value.holder == f"process {os.getpid()} on {socket.gethostname()}"
    assert not out.exists()
    train(digits, out, max_steps=1)
    train(digits, out, max_steps=1, overwrite_output_dir=True)


def test_killed_run_lets_go_of_its_folder(tmp_path: Path):
    holding = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
    holding += "print('held', flush=True); input()"
    command = [sys.executable, "-c", holding, str(tmp_path / ".out.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match="is in use by another program"), held(tmp_path / "out"):
        pass
    holder.kill()
    holder.communicate()
    with held(tmp_path / "out"):
        pass


def test_next_run_removes_what_a_killed_one_left(tmp_path: Path):
    out = tmp_path / "out[1]"
    left = [out / ".out[1]-unfinished-abcdefgh", tmp_path / ".out[1]-unfinished-ijklmnop"]
    left += [out / "checkpoints" / f".step-00000003{kind}.unfinished" for kind in ("", "-removed")]
    kept = [out / "checkpoints" / "step-00000002", out / "checkpoints" / "step-abc", tmp_path / ".out1-unfinished-def"]
    for folder in left + kept:
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    (out / "checkpoints" / "best").mkdir()
    for path in (out / "checkpoints" / "best" / ".model.unfinished", out / f".metrics.jsonl-{'0' * 32}.unfinished"):
        path.write_text("half")
    with held(out):
        assert not any(path.exists() for path in left)
        assert all(path.is_dir() for path in kept)
        assert list((out / "checkpoints" / "best").iterdir()) == []
        assert [path.name for path in out.iterdir()] == ["checkpoints"]


# --- the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_whose_launcher_is_killed_ends_with_a_checkpoint(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    flags = options(
        digits, out, max_steps=100_000, per_device_train_batch_size=16, logging_steps=1, dataloader_num_workers=1
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines"]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_clip.commands.finetune"]
    command += words(flags)
    log = (tmp_path / "log").open("w")
    launcher = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: (out / "metrics.jsonl").is_file() and len(records(out)) > 2)
        (child,) = psutil.Process(launcher.pid).children()
        family = [child, *child.children(recursive=True)]
        launcher.kill()
        launcher.wait()
        until(lambda: not any(each.is_running() and each.status() != "zombie" for each in family))
    finally:
        launcher.kill()
        log.close()
    (last,) = list_checkpoints(out)
    assert int(last.name.removeprefix("step-")) == records(out)[-1]["step"]
    assert (
        f"ended by SIGTERM: the {records(out)[-1]['step']} steps so far are in {last}" in (tmp_path / "log").read_text()
    )


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("/env/bin/python3.11 /env/bin/accelerate launch finetune.py", True),
        ("/env/bin/python -m accelerate.commands.launch --num_processes 2 finetune.py", True),
        ("/env/bin/python /env/bin/torchrun --nproc_per_node 2 finetune.py", True),
        ("/env/bin/python -m torch.distributed.run finetune.py", True),
        ("-bash", False),
        ("sh -c 'cd accelerate && python finetune.py'", False),
        ("/env/bin/python /home/me/accelerate-runs/night.py finetune.py", False),
        ("", False),
    ],
)
def test_launchers_are_known_and_shells_may_end_before_their_programs(
    monkeypatch: pytest.MonkeyPatch, command: str, is_launcher: bool
):
    monkeypatch.setattr(psutil, "Process", lambda _: SimpleNamespace(cmdline=lambda: shlex.split(command)))
    assert (stopping.find_launcher() == os.getppid()) == is_launcher


# --- the others ------------------------------------------------------------------------------------------------------


def test_process_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch):
    turns, wait = Turns(monkeypatch), timedelta(seconds=LONGEST_WAIT)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    connections = [dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=wait) for _ in "ab"]
    lives = [stopping.SignsOfLife(connection, rank, 2) for rank, connection in enumerate(connections)]
    found: list[tuple[str, bool]] = []
    for life in lives:
        life.give()  # what gives no more signs stands still from here on
    _, second = (turns.start(life, lambda *end: found.append(end)) for life in lives)
    turns.take(10)  # longer than a process may stand still
    assert found == []
    second.is_over = True  # the second ends, which is no standing still
    turns.take(10)
    assert not second.thread.is_alive()
    assert found == []
    lives[1].give()  # its last sign
    turns.take(5)
    assert found == []
    turns.take(1)
    assert found == [(f"process 1 of 2 (process id {os.getpid()} on {socket.gethostname()})", True)]
    turns.end()


def test_processes_that_all_stood_still_go_on(monkeypatch: pytest.MonkeyPatch):
    """As after Ctrl-Z and fg: the other's count is as old as this one's last look."""
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    store = SimpleNamespace(check=lambda keys: True, get=lambda key: b"process id 7 on here, 1")
    life = stopping.SignsOfLife(store, 0, 2)
    for still, passed in [
        (None, 1),
        (None, 3600),
        (None, 20),
        (None, 20),
        ("process 1 of 2 (process id 7 on here)", 20),
    ]:
        now[0] += passed
        assert life.find_still() == still


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = stopping.Signals()
        with stopping.heeded(signals):
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(stopping.Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            signals.are_deferred = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
