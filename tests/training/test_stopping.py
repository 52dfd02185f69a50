"""What ends a run from outside, and what keeps two runs from one folder."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from hf_clip.training import stopping
from hf_clip.training.checkpoint import list_checkpoints
from hf_clip.training.output import FolderInUseError, held

from ..finetuning import ROOT, options, records, train, words

# --- the folder ------------------------------------------------------------------------------------------------------


def test_folder_is_held_by_one_run_which_is_named(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    holding = "import sys; from hf_clip.training.output import held\n"
    holding += "with held(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):
        with pytest.raises(
            FolderInUseError, match=r"out is in use by another run \(process \d+ on .*\). Wait"
        ) as error:
            train(digits, out)
        assert error.value.holder.startswith(f"process {holder.pid} on ")
    assert not out.exists()
    holder.kill()  # as a run that is killed
    holder.communicate()
    train(digits, out, max_steps=1)
    train(digits, out, max_steps=1, overwrite=True)


def test_next_run_removes_what_a_killed_one_left(tmp_path: Path):
    out = tmp_path / "out[1]"
    left = [out / ".out[1]-unfinished-abc", tmp_path / ".out[1]-unfinished-def"]
    left += [out / "checkpoints" / ".step-00000003.unfinished"]
    kept = [out / "checkpoints" / "step-00000002", out / "checkpoints" / "step-abc", tmp_path / ".out1-unfinished-def"]
    for folder in left + kept:
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    (out / "checkpoints" / "best").mkdir()
    (out / "checkpoints" / "best" / ".model.unfinished").write_text("half")
    with held(out):
        assert not any(path.exists() for path in left)
        assert all(path.is_dir() for path in kept)
        assert list((out / "checkpoints" / "best").iterdir()) == []


# --- the launcher ----------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.1)


def test_run_whose_launcher_is_killed_ends_with_a_checkpoint(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    flags = options(digits, out, max_steps=100_000, batch_size=16, logging_steps=1, num_workers=1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines"]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "finetune.py"), *words(flags)]
    log = (tmp_path / "log").open("w")
    launcher = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: (out / "metrics.jsonl").is_file() and len(records(out)) > 2)
        (child,) = psutil.Process(launcher.pid).children()
        family = [child, *child.children(recursive=True)]
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(each.is_running() and each.status() != "zombie" for each in family))
    finally:
        launcher.kill()
        log.close()
    (last,) = list_checkpoints(out)
    assert int(last.name.removeprefix("step-")) == records(out)[-1]["step"]
    assert (
        f"ended by SIGTERM: the {records(out)[-1]['step']} steps so far are in {last}" in (tmp_path / "log").read_text()
    )


def test_shell_may_end_before_its_program_and_a_launcher_is_known():
    assert stopping.find_launcher() is None or "xdist" in sys.modules
    program = "from hf_clip.training.stopping import find_launcher; print(find_launcher())"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    plain = [sys.executable, "-c", launcher, program]
    assert subprocess.run(plain, capture_output=True, text=True, check=True, env=env).stdout == "None\n"


# --- the others ------------------------------------------------------------------------------------------------------


def test_process_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "LONGEST_STILL", 0.5)
    monkeypatch.setattr(stopping, "INTERVAL", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    connections = [dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5)) for _ in "ab"]
    lives = [stopping.SignsOfLife(connection, rank, 2) for rank, connection in enumerate(connections)]
    found: list[str] = []
    overs = [threading.Event(), threading.Event()]
    threads = [
        threading.Thread(target=life.watch, args=(found.append, over)) for life, over in zip(lives, overs, strict=True)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # longer than a process may stand still
    assert found == []
    overs[1].set()  # the second has ended, which is no standing still
    threads[1].join()
    time.sleep(1.0)
    assert found == []
    lives[1].give()  # its last sign
    threads[0].join(timeout=10)
    assert found == [f"process 1 of 2 (process id {os.getpid()} on {stopping.socket.gethostname()})"]
    overs[0].set()


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
