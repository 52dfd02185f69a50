"""A long run over data of which one row in a hundred is poison, killed again and again."""

import json
import signal
import struct
import zlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_from_disk

from hf_clip.training.checkpoint import list_checkpoints
from hf_clip.training.data.load_pairs import load_pairs

from ..finetuning import options, weights, words
from .forked_runs import ForkedRun
from .test_resume import plain

STEPS, BATCH, ROWS = 2000, 8, 600
KILLED_EVERY = 100


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 × 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def write_poisoned(digits: Path, folder: Path) -> tuple[set[int], set[int]]:
    """Returns the rows whose images cannot be used, and those whose captions are odd and can be."""
    stored = (
        load_from_disk(str(digits / "pairs"))["train"].cast_column("image", Image(decode=False)).select(range(ROWS))
    )
    rows = [{"image": row["image"], "caption": row["caption"]} for row in stored]
    good = rows[0]["image"]["bytes"]
    images = {"truncated": good[: len(good) // 2], "empty": b"", "bomb": bomb(), "text": b"this is no image"}
    for place, content in zip((50, 170, 290, 410), images.values(), strict=True):
        rows[place]["image"] = {"bytes": content, "path": f"{place}.jpg"}
    rows[530]["caption"] = "a photo of a " * 8000  # 100 kB
    rows[580]["caption"] = "a \0 photo\0"
    features = Features({"image": Image(), "caption": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(folder)
    return {50, 170, 290, 410}, {530, 580}


@pytest.mark.slow
def test_soak(digits: Path, tmp_path: Path):
    bad, odd = write_poisoned(digits, tmp_path / "data")
    flags = {"dataset": [str(tmp_path / "data")], "per_device_train_batch_size": BATCH, "max_steps": STEPS}
    flags |= {"save_steps": 50, "logging_steps": 10, "max_bad_fraction": 0.02}
    whole, out = tmp_path / "whole", tmp_path / "out"
    watched = [("watched", str(tmp_path / "watched"), 100)]
    given = words(options(digits, whole, **flags | {"dataloader_num_workers": 1}))
    uninterrupted = ForkedRun(given, tmp_path / "printed", faults={0: watched})
    assert uninterrupted.wait(1800) == [0], uninterrupted.printed

    for kill_at in (*range(KILLED_EVERY, STEPS, KILLED_EVERY), None):
        more = {"resume_from_checkpoint": "latest"} if list_checkpoints(out) else {}
        faults = [] if kill_at is None else [("step", kill_at, signal.SIGKILL)]
        run = ForkedRun(words(options(digits, out, **flags | more)), tmp_path / "printed", faults={0: faults})
        assert run.wait() == [0 if kill_at is None else -signal.SIGKILL], run.printed
    assert plain(out) == plain(whole)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())

    # To the sample: what was drawn is what was used and what was skipped, by the order of the data alone.
    pairs = load_pairs(str(tmp_path / "data"))
    rows = [draw.row for epoch in range(STEPS) for draw in list(pairs.draws(epoch))[: ROWS // BATCH * BATCH]]
    last = list_checkpoints(out)[-1]
    (counter,) = json.loads((last / "run.json").read_text())["bad_rows"]
    drawn = rows[: BATCH * int(last.name.removeprefix("step-"))]
    assert counter["drawn"] == len(drawn)
    assert counter["bad"] == sum(row in bad for row in drawn)
    assert counter["cut"] >= sum(row == min(odd) for row in drawn) > 0

    lines = [list(map(int, line.split())) for line in (tmp_path / "watched").read_text().splitlines()]
    _, memory, files = zip(*lines[4:], strict=True)  # after 500 steps
    assert max(memory) <= 1.05 * memory[0]
    assert len(set(files)) == 1
