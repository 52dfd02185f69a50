"""`accelerate launch -m hf_clip.commands.evaluate`: two processes write what one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_clip.commands import program

from ..evaluation.data_sets import TEMPLATES, captioned, stored_rows, write_class_folders, write_shards
from ..evaluation.forks import evaluate_in_two


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for each task, with an image that cannot be opened. Tests must not write there."""
    folder, rows = tmp_path_factory.mktemp("data"), stored_rows(digits)
    write_class_folders(folder / "shapes", rows + rows)
    (folder / "shapes" / "zero" / "damaged.png").write_bytes(b"no image")
    write_shards(folder / "stream", rows)
    table = captioned(rows)
    table.save_to_disk(folder / "captions")
    table.add_column("negative_caption", [row["caption"] for row in rows[1:] + rows[:1]]).save_to_disk(
        folder / "choices"
    )
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    write_class_folders(folder / "broken", rows[:16])
    (folder / "broken" / "zero").mkdir(exist_ok=True)
    for path in sorted((folder / "broken").rglob("*.png"))[8:10]:  # those of the second process
        path.write_bytes(b"no image")
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def test_two_processes_write_what_one_writes(
    digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    datasets = [data / "broken", data / "shapes", data / "stream"]
    tasks = [
        ["zero-shot", "--dataset", *datasets, "--templates", data / "templates.txt", "--no-plots"],
        ["retrieval", "--dataset", data / "captions", "--feature-cache", tmp_path / "cache"],
        ["compose", "--dataset", data / "choices"],
    ]
    runs = [[*map(str, task), "--model", str(digits / "vit"), "--batch-size", "8"] for task in tasks]
    one, two = tmp_path / "one", tmp_path / "two"
    both = evaluate_in_two(tmp_path, [[*words, "--output", str(two)] for words in runs])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has
    for words, (statuses, printed) in zip(runs, both, strict=True):
        status = program.main(["evaluate", *words, "--output", str(one)])
        assert statuses == [status] * 2
        shown = capsys.readouterr()
        lines = (shown.err + shown.out).replace(str(one), str(two)).splitlines()
        assert printed.splitlines() == lines  # once, by the main process
    torch.set_num_threads(threads)
    assert "1 of 16 images cannot be opened" in both[0][1]
    assert [statuses for statuses, _ in both] == [[2, 2], [0, 0], [0, 0]]
    assert len(records(one)) == 4
    assert records(one) == records(two)
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == ["00000.safetensors"]


@pytest.mark.slow  # the start of a launcher and two processes
def test_launcher_starts_it(digits: Path, data: Path, tmp_path: Path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command += ["hf_clip.commands.evaluate", "zero-shot", "--model", str(digits / "vit"), "--batch-size", "8"]
    command += ["--dataset", str(data / "broken"), str(data / "shapes"), "--output", str(tmp_path), "--no-plots"]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert f"error: {digits / 'vit'} on {data / 'broken'}: {data / 'broken'}: 1 of 16 images cannot" in done.stderr
    assert done.stdout.count("acc1") == 1
    assert len(records(tmp_path)) == 1
