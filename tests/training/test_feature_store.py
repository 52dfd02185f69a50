"""Stored features where something goes wrong: numbers that are none, full disks, processes and workers that end."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hf_clip import HfClipProcessor
from hf_clip.checkpoints.whole_folder import DiskFullError
from hf_clip.data.columns import UnusableRowError
from hf_clip.training import checksums, feature_computing, feature_store, frozen_towers
from hf_clip.training.agreement import done_together
from hf_clip.training.checkpoint import remove_unfinished
from hf_clip.training.checksums import check_checksums, checked_folder
from hf_clip.training.config import TrainingConfig
from hf_clip.training.data import feature_shards, rows_digest
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import WorkerKilledError
from hf_clip.training.data.pairs import Pairs
from hf_clip.training.data.rows_digest import digest_of_rows
from hf_clip.training.feature_computing import Encoder, Wanted, _OpenedRows, compute, compute_again
from hf_clip.training.feature_store import FOLDER
from hf_clip.training.frozen_towers import FrozenTowers
from hf_clip.training.learner import Learner
from hf_clip.training.run_state import check_frozen
from hf_clip.training.teacher import make_teacher

from ..finetuning import options

ALONE = SimpleNamespace(
    device=torch.device("cpu"), mixed_precision="no", process_index=0, num_processes=1, is_main_process=True
)


@pytest.mark.parametrize(
    ("precision", "advice"), [("no", "Check the weights of"), ("fp16", "too large for float16: launch with --mixed_p")]
)
def test_features_that_are_no_numbers_are_refused(precision: str, advice: str):
    def overflowing(pixel_values: Tensor) -> Tensor:
        return torch.tensor([[1.0, float("inf")]])

    encoder = Encoder(nn.Identity(), overflowing, 2, {}, precision, "The locked image tower")
    message = rf"The locked image tower gives features that are no finite numbers \(precision {precision}\).*{advice}"
    with pytest.raises(ValueError, match=message):
        encoder(torch.device("cpu"), pixel_values=torch.zeros(1, 1))


def test_checksums_that_are_no_text_are_refused_like_any_other_damage(tmp_path: Path):
    (tmp_path / checksums.SUMS).write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"The weights of a locked tower in .* missing or damaged \(.*can't decode"):
        FrozenTowers({"vision_model": tmp_path}).weights()
    with pytest.raises(OSError, match=r"missing or damaged .* Go on with --resume_from_checkpoint latest"):
        FrozenTowers({"vision_model": tmp_path / "missing"}).weights()


def test_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(checksums, "sync_folder", synced.append)
    frozen_towers._write_weights(tmp_path / "tower", nn.Linear(2, 2))
    check_checksums(tmp_path / "tower")
    assert synced == [tmp_path]
    with pytest.raises(DiskFullError, match=r"full\. Nothing was"), checked_folder(tmp_path / "full", 5) as unfinished:
        (unfinished / "part").write_bytes(b"1")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_what_is_left_of_other_features_goes(tmp_path: Path):
    for name in ("image-0/.00002.unfinished", "image-0/00001", ".text-tower-1.unfinished"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        (tmp_path / FOLDER / name / "features.arrow").touch()
    remove_unfinished(tmp_path)
    found = [path.relative_to(tmp_path / FOLDER).as_posix() for path in (tmp_path / FOLDER).rglob("*")]
    assert sorted(found) == ["image-0", "image-0/00001", "image-0/00001/features.arrow"]


def test_process_that_cannot_read_features_says_so_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreadable(shards: Any) -> None:
        raise OSError("the disk is gone")

    told: list[Exception | None] = []
    monkeypatch.setattr("hf_clip.training.agreement.raise_together", told.append)
    monkeypatch.setattr(feature_store, "StoredFeatures", unreadable)
    wanted: Any = SimpleNamespace(
        kind="image", views=1, encoder=SimpleNamespace(width=2), rows=lambda: torch.zeros(2, 0).numpy(), describe=dict
    )
    alone = SimpleNamespace(device=None, process_index=0, num_processes=1, is_main_process=True)
    with pytest.raises(IndexError):
        feature_store.store(wanted, tmp_path, alone, 0)
    assert str(told[-1]) == "the disk is gone"


def test_what_was_made_together_is_given_back():
    assert done_together(lambda: 3) == 3


# --- another model or other data -------------------------------------------------------------------------------------


def test_resumed_run_refuses_another_teacher(digits: Path, tmp_path: Path):
    """Its checkpoint says which it was; older checkpoints do not, and go on."""
    config = TrainingConfig(**options(digits, tmp_path, teacher=str(digits / "vit")))
    pairs = load_pairs(str(digits / "several"))
    pairs.sources[0].rows = np.arange(2)
    pairs = Pairs(pairs.sources)
    teacher = make_teacher(config, ALONE, pairs, 0)
    assert teacher is not None
    learner: Any = SimpleNamespace(teacher=teacher, frozen=FrozenTowers(digests={"locked text tower": "00"}))
    assert Learner.frozen_digests(learner) == {"teacher": teacher.digest, "locked text tower": "00"}
    shutil.rmtree(tmp_path / FOLDER)
    message = (
        f"The teacher is another one than the run began with: --teacher .*vit gives .* {teacher.digest}, .* says 12."
    )
    with pytest.raises(ValueError, match=message):
        make_teacher(config, ALONE, pairs, 0, {"teacher": "12"})
    assert not (tmp_path / FOLDER).exists()


def test_resumed_run_refuses_another_locked_tower():
    check_frozen({"locked image tower": "12"}, "locked text tower", "34", "--model m")
    with pytest.raises(
        ValueError, match="The locked image tower is another one .*: --model m gives one .* 34, and the"
    ):
        check_frozen({"locked image tower": "12"}, "locked image tower", "34", "--model m")


def digest(folder: Path) -> str:
    return digest_of_rows(load_pairs(str(folder / "pairs.jsonl")))[0]["digest"]


@pytest.mark.parametrize("kind", ["path", "record"])
def test_images_that_are_files_count_with_their_content(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """One that is not among those that are read counts with its size and time."""
    monkeypatch.setattr(rows_digest, "READ", 2)  # the first and the last
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"abc")
        os.utime(tmp_path / f"{number}.jpg", ns=(0, 0))
    stored = [f"{number}.jpg" if kind == "path" else {"bytes": None, "path": f"{number}.jpg"} for number in range(3)]
    rows = [{"image": image, "caption": "a digit"} for image in stored]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first = digest(tmp_path)
    assert digest(tmp_path) == first
    os.utime(tmp_path / "1.jpg", ns=(0, 1))
    second = digest(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"abd")
    os.utime(tmp_path / "2.jpg", ns=(0, 0))
    assert len({first, second, digest(tmp_path)}) == 3


# --- workers and rows that fail --------------------------------------------------------------------------------------


def wanted_images(digits: Path, **fields: Any) -> Wanted:
    """Of 80 rows, two of which are bad. An image's feature is the mean of its grey levels."""

    def mean(pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(1).mean(dim=1, keepdim=True)

    pairs = load_pairs(str(digits / "several"), **fields)
    pairs.sources[0].rows = np.arange(80)
    pairs = Pairs(pairs.sources, **fields)
    collator = PairCollator(HfClipProcessor.from_pretrained(digits / "vit"), Augmentation.parse("crop=0.5"))
    return Wanted("image", "Images", Encoder(nn.Identity(), mean, 1, {}), pairs, collator, of_texts=False)


def images_of(wanted: Wanted, num_workers: int = 1) -> list[np.ndarray]:
    found = compute(wanted, {0: wanted.rows()}, torch.device("cpu"), num_workers)
    return [entries.views[0] for *_, entries in found]


def test_worker_that_is_killed_is_started_anew_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(feature_computing, "AT_ONCE", 20)
    wanted, opened = wanted_images(digits), _OpenedRows.open
    expected = images_of(wanted, 0)
    kills = tmp_path / "kills"

    def killed(self: _OpenedRows, rows: Any) -> Any:
        if rows[0][1] == 40 and (left := len(kills.read_text())):
            kills.write_text("." * (left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, rows)

    monkeypatch.setattr(_OpenedRows, "open", killed)
    handler = signal.getsignal(signal.SIGCHLD)
    kills.write_text(".")
    found = images_of(wanted)
    assert signal.getsignal(signal.SIGCHLD) is handler  # torch's own would raise anywhere
    assert len(found) == 4
    assert all(np.array_equal(*each) for each in zip(found, expected, strict=True))
    assert "is started anew, once" in caplog.text
    kills.write_text("..")
    with pytest.raises(WorkerKilledError, match="was killed, and again after it was started anew"):
        images_of(wanted)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_error_of_a_worker_is_one_line(digits: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]):
    def failing(self: _OpenedRows, rows: Any) -> Any:
        raise kind("the table is gone")

    monkeypatch.setattr(_OpenedRows, "open", failing)
    with pytest.raises(kind, match=r"^the table is gone$"):
        images_of(wanted_images(digits))


def test_rows_that_could_not_be_used_are_counted_at_the_next_start(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """After the folder was deleted that is named, they are tried again."""
    for module in (feature_store, feature_shards):
        monkeypatch.setattr(module, "ROWS", 64)
    wanted, read = wanted_images(digits), PairCollator.prepare_images

    def timed_out(*given: Any) -> Any:
        raise UnusableRowError("its image could not be fetched (timed out)")

    with monkeypatch.context() as patch:
        patch.setattr(PairCollator, "prepare_images", timed_out)
        feature_store.store(wanted, tmp_path, ALONE, 0)
    assert not caplog.text
    assert PairCollator.prepare_images is read
    feature_store.store(wanted, tmp_path, ALONE, 0)
    assert re.search(r"80 rows of .*several have no stored features.*timed out", caplog.text)
    (folder,) = tmp_path.glob("image-*")
    assert f"delete 2 of the folders in {folder}, which are computed anew then: 00000, 00001" in caplog.text
    for name in ("00000", "00001"):
        shutil.rmtree(folder / name)
    caplog.clear()
    feature_store.store(wanted, tmp_path, ALONE, 0)
    feature_store.store(wanted, tmp_path, ALONE, 0)
    assert re.search(r"2 rows of .*several have no stored features", caplog.text)


@pytest.mark.parametrize(("captions", "is_same"), [("one", True), ("all", False)])
def test_view_is_that_of_training_unless_all_captions_are_drawn(digits: Path, captions: str, is_same: bool):
    """As the guide says."""
    wanted = wanted_images(digits, captions=captions)
    draw = next(draw for draw in wanted.pairs.draws(0, shuffle=False) if draw.row == 5)
    prepared = wanted.collator.prepare(draw, wanted.pairs.read(draw))
    trained = wanted.encoder(torch.device("cpu"), pixel_values=wanted.collator.images.batch([prepared.image]))
    stored = compute_again(wanted, np.array([[0], [5]]), torch.device("cpu"))
    assert np.array_equal(stored.views[0], trained) == is_same
