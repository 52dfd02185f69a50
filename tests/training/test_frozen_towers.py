"""Locked towers that leave memory: a run trains to what it trains to without, whatever is locked."""

import copy
import gc
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.checkpoints.whole_folder import DiskFullError
from hf_clip.hub.upload import list_uploads
from hf_clip.training import feature_store, frozen_towers
from hf_clip.training.checksums import SUMS
from hf_clip.training.config import TrainingConfig
from hf_clip.training.data import feature_shards
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.bad_rows import BadRows
from hf_clip.training.data.collator import PairCollator, Plan
from hf_clip.training.data.feature_shards import FILE, FeatureShards
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import build_loader
from hf_clip.training.data.pairs import Pairs
from hf_clip.training.data.stored_collator import StoredCollator, StoredPairs, Stores
from hf_clip.training.feature_computing import Encoder
from hf_clip.training.feature_store import FOLDER, StaleFeaturesError
from hf_clip.training.frozen_towers import FrozenTowers, StoredTower, check_cacheable, store_towers_
from hf_clip.training.trainable import lock_

from ..finetuning import LABELLED_CAPTION, largest_difference, options, records, train, weights, words
from ..two_processes import TwoProcesses
from .sources import jpeg

SGD = {"optim": "SGD", "learning_rate": "0.05", "weight_decay": 0.0}
"""Whose steps are as large as the gradient. Adam's make steps of rounding where a gradient is near zero."""
LOCKED = SGD | {"max_steps": 3, "augmentation": "none", "logging_steps": 1, "per_device_train_batch_size": 32}
CROPS = "crop=0.5,flip=0.5"


def stored_run(digits: Path, folder: Path, tower: str = "vit", **fields: Any) -> Path:
    return train(digits, folder, tower, cache_frozen_features=True, **LOCKED | fields)


def assert_same_run(stored: Path, plain: Path) -> None:
    """Weights, losses and figures are those of another run, but for rounding."""
    assert largest_difference(weights(stored), weights(plain)) < 2e-6
    for key in ("loss", "recall@1"):
        for ours, theirs in zip(records(stored, key), records(plain, key), strict=True):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize(
    ("tower", "lock"),
    [
        *(("vit", lock) for lock in ("image", "text", "image,text")),
        ("resnet", "image,text"),
        *(pytest.param("resnet", lock, marks=pytest.mark.slow) for lock in ("image", "text")),
    ],
)
def test_training_is_that_of_towers_in_memory(digits: Path, tmp_path: Path, tower: str, lock: str):
    """Captions are made of labels, so that zero-shot accuracy is measured too."""
    chosen = {"dataset": [str(digits / "labelled")], "caption_column": LABELLED_CAPTION, "validation": "40"}
    chosen |= {"lock": lock, "mask_duplicates": "off"}
    plain = train(digits, tmp_path / "plain", tower, **LOCKED | chosen)
    stored = stored_run(digits, tmp_path / "stored", tower, **chosen)
    assert_same_run(stored, plain)
    start, found = weights(digits / tower), weights(stored)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], found[name])}
    locked = {"image": "vision_model", "text": "text_model"}
    assert moved
    assert not moved & {locked[name] for name in lock.split(",")}
    assert [record["zero_shot_top1"] for record in records(stored, "recall@1")] == [
        record["zero_shot_top1"] for record in records(plain, "recall@1")
    ]


# --- batches ---------------------------------------------------------------------------------------------------------

ALONE = SimpleNamespace(
    device=torch.device("cpu"), mixed_precision="no", process_index=0, num_processes=1, is_main_process=True
)


class Setting:
    """A locked model, its processor, pairs with several captions and two bad rows, and a place for features."""

    def __init__(self, digits: Path, folder: Path, **fields: Any):
        chosen = {"dataset": [str(digits / "several")], "lock": "image,text", "augmentation": CROPS, "cached_views": 2}
        self.config = TrainingConfig(**options(digits, folder, cache_frozen_features=True, **chosen | fields))
        self.model = HfClipModel.from_pretrained(digits / "vit").eval()
        lock_(self.model, self.config.lock)
        self.processor = HfClipProcessor.from_pretrained(digits / "vit")
        self.pairs = load_pairs(str(digits / "several"))

    def store(self, model: HfClipModel | None = None) -> FrozenTowers:
        """Of a copy, so that this model keeps its towers."""
        model = copy.deepcopy(self.model) if model is None else model
        given = {"train": self.pairs, "validation": [], "num_workers": 0}
        return store_towers_(model, self.processor, self.config, ALONE, **given)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir, FOLDER)

    def shards(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*/[0-9]*"))


@pytest.fixture
def setting(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Three shards of 80 rows."""
    for module in (feature_store, feature_shards):
        monkeypatch.setattr(module, "ROWS", 32)
    found = Setting(digits, tmp_path / "run")
    found.pairs.sources[0].rows = np.arange(80)
    found.pairs = Pairs(found.pairs.sources)
    return found


@torch.no_grad()
def test_batches_have_the_same_pairs_and_their_features(setting: Setting):
    """Rows that cannot be used are left out, the same ones step in, and epoch e has view e mod 2 of each image."""
    frozen = setting.store()
    images, texts = frozen.train.images, frozen.train.texts
    augmentation, size = Augmentation.parse(CROPS), 16
    tower, text = setting.model.vision_model, setting.model.text_model
    for stores in (Stores(images, texts), Stores(images=images), Stores(texts=texts)):
        plain_rows, rows = BadRows(0.5), BadRows(0.5)
        plain = build_loader(setting.pairs, PairCollator(setting.processor, augmentation), size, bad_rows=plain_rows)
        collator = StoredCollator(stores, setting.processor, augmentation)
        stored = build_loader(StoredPairs(setting.pairs, stores), collator, size, bad_rows=rows)
        first: dict[int, torch.Tensor] = {}
        for epoch in range(3):
            for expected, found in zip(plain.epoch(epoch), stored.epoch(epoch), strict=True):
                for name in ("image_ids", "text_ids"):
                    assert torch.equal(expected[name], found[name])
                if stores.texts is None:
                    assert torch.equal(expected["input_ids"], found["input_ids"])
                else:
                    pooled = text(expected["input_ids"], attention_mask=expected["attention_mask"]).pooler_output
                    torch.testing.assert_close(found["input_ids"], pooled, rtol=1e-4, atol=1e-5)
                if stores.images is None:
                    assert torch.equal(expected["pixel_values"], found["pixel_values"])
                elif epoch < 2:
                    pooled = tower(expected["pixel_values"]).pooler_output
                    torch.testing.assert_close(found["pixel_values"], pooled, rtol=1e-4, atol=1e-5)
                for image_id, values in zip(found["image_ids"].tolist(), found["pixel_values"], strict=True):
                    seen = first.setdefault(image_id, values)
                    assert stores.images is None or torch.equal(seen, values) == (epoch != 1)
        assert plain_rows.state_dict() == rows.state_dict()
        assert rows.state_dict()["bad"] == 6


def test_row_whose_captions_are_all_empty_is_left_out_however_many_it_has(digits: Path, tmp_path: Path):
    rows = [{"image": {"bytes": jpeg(place), "path": None}, "captions": ["one", "two"]} for place in range(6)]
    rows[2]["captions"] = ["", "", ""]
    features = Features({"image": Image(), "captions": List(Value("string"))})
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    setting = Setting(digits, tmp_path / "run", captions="all", augmentation="none", cached_views=1)
    setting.pairs = load_pairs(str(tmp_path / "rows"), captions="all")
    stores, skipped = setting.store().train, []
    for pairs, collator in (
        (setting.pairs, PairCollator(setting.processor, Augmentation(crop=1.0))),
        (StoredPairs(setting.pairs, stores), StoredCollator(stores, setting.processor)),
    ):
        draws = list(pairs.draws(0, shuffle=False))
        skipped.append(collator(Plan(draws, []), pairs.read).skipped)
    assert len(skipped[0]) == 3
    assert skipped[0] == skipped[1]


def test_features_are_columns_that_datasets_reads(setting: Setting):
    setting.store()
    images, texts = (Dataset.from_file(str(setting.shards(kind)[0] / FILE)) for kind in ("image", "text"))
    assert images.column_names == ["source", "row", "place", "id", "is_cut", "reason", "view_0", "view_1"]
    assert len(images) == 32
    assert [row for row in range(32) if images[row]["reason"] is not None] == [30]
    assert "its image" in images[30]["reason"]
    assert len(texts) == 160
    assert texts[7]["place"] == 2
    assert len(texts[7]["view_0"]) == setting.model.text_model.config.hidden_size
    assert not [path for path in list_uploads(setting.folder.parent) if FOLDER in path.name]


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images or texts were encoded at once, one after the other."""
    counts: list[int] = []
    encode = Encoder.__call__

    def counted(self: Encoder, device: torch.device, **inputs: Any) -> np.ndarray:
        found = encode(self, device, **inputs)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Encoder, "__call__", counted)
    return counts


def contents(setting: Setting) -> dict[str, bytes]:
    files = [path for path in setting.folder.rglob("*") if path.is_file()]
    return {path.relative_to(setting.folder).as_posix(): path.read_bytes() for path in files}


def test_computation_that_was_killed_goes_on_behind_the_last_whole_shard(
    setting: Setting, encoded: list[int], monkeypatch: pytest.MonkeyPatch
):
    setting.store()
    expected, whole = contents(setting), sum(encoded)
    shutil.rmtree(setting.folder)
    write = FeatureShards.write

    def killed(self: FeatureShards, number: int, entries: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, entries)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureShards, "write", killed)
        setting.store()
    (setting.shards("image")[0].parent / ".00002.unfinished").mkdir()
    assert feature_store.holds_only_features(setting.config.output_dir)
    encoded.clear()
    setting.store()
    assert contents(setting) == expected
    assert not list(setting.folder.rglob("*unfinished"))
    assert 0 < sum(encoded) < whole


def test_what_is_found_is_not_computed_again_but_for_some_rows(setting: Setting, encoded: list[int]):
    setting.store()
    whole = sum(encoded)
    encoded.clear()
    model = copy.deepcopy(setting.model)
    towers = [weakref.ref(tower) for tower in (model.vision_model, model.text_model)]
    setting.store(model)
    assert 0 < sum(encoded) < whole / 5
    gc.collect()
    assert [tower() for tower in towers] == [None, None]


def test_shard_with_another_bit_is_computed_again(setting: Setting, caplog: pytest.LogCaptureFixture):
    setting.store()
    expected, file = contents(setting), setting.shards("text")[1] / FILE
    stored = bytearray(file.read_bytes())
    stored[-200] ^= 1
    file.write_bytes(stored)
    setting.store()
    assert contents(setting) == expected
    assert f"The stored features {file.parent} are damaged" in caplog.text


def stale(setting: Setting, kind: str, **changes: Any) -> str:
    """The error for a shard that holds other values, with a checksum that fits."""
    setting.store()
    path = setting.shards(kind)[0]
    table = Dataset.from_file(str(path / FILE))
    entries = FeatureShards(setting.folder, "x", {}, 32, len(table[0]["view_0"]), 2 if kind == "image" else 1)
    entries.folder = path.parent
    found = entries.read(0)
    for name, change in changes.items():
        value = getattr(found, name)
        setattr(found, name, change(value))
    shutil.rmtree(path)
    entries.write(0, found)
    with pytest.raises(StaleFeaturesError) as raised:
        setting.store()
    assert raised.value.folder == path.parent
    return str(raised.value)


def test_features_of_another_tower_are_refused(setting: Setting):
    message = stale(setting, "image", views=lambda views: [view + 1 for view in views])
    assert re.search(r"row 0 of .*several was computed again, and its features differ by \d", message)
    assert "of their length, where 0.01 may be rounding. Delete that folder: the features are computed anew" in message


def test_features_of_other_captions_are_refused(setting: Setting):
    message = stale(setting, "text", ids=lambda ids: ids + 1)
    assert "row 0" in message
    assert "its caption is another one" in message


def test_other_settings_weights_and_rows_have_other_features(setting: Setting, digits: Path):
    def kinds_that_are_new() -> list[str]:
        before = {path.name for path in setting.folder.glob("*")}
        setting.store()
        return sorted(path.name.rpartition("-")[0] for path in setting.folder.iterdir() if path.name not in before)

    assert kinds_that_are_new() == ["image", "image-tower", "text", "text-tower"]
    for fields in ({"seed": 1}, {"augmentation": "crop=0.6"}, {"cached_views": 3}):
        setting.config = Setting(digits, Path(setting.config.output_dir), **fields).config
        assert kinds_that_are_new() == ["image"]
    with torch.no_grad():
        setting.model.text_model.final_layer_norm.bias += 0.1
    assert kinds_that_are_new() == ["text", "text-tower"]
    setting.pairs.sources[0].rows = setting.pairs.sources[0].rows[:-1]
    assert kinds_that_are_new() == ["image", "text"]


def test_full_disk_is_said_before_anything_is_computed(
    setting: Setting, encoded: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_shards, "free_bytes", lambda place: 1000)
    with pytest.raises(DiskFullError, match=r"image-\w+: it needs [\d,]+ bytes, and 1,000 are free\. Nothing"):
        setting.store()
    assert not encoded


def test_lost_weights_of_a_tower_are_named(setting: Setting):
    frozen = setting.store()
    assert frozen.weights().keys() == {
        name for name in setting.model.state_dict() if name.startswith(("vision_model.", "text_model."))
    }
    (frozen.files["text_model"] / frozen_towers.WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="The weights of a locked tower in .* missing or damaged .*its checksum diff"):
        frozen.weights()


def test_tower_with_dropout_is_refused(setting: Setting):
    setting.model.text_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="of the locked text tower once, but it has attention_dropout 0.1, with whic"):
        check_cacheable(setting.model, setting.config)


def test_stored_tower_gives_back_what_it_is_called_with():
    pooled = torch.rand(2, 3)
    assert StoredTower(None)(pooled, attention_mask=None, return_dict=True).pooler_output is pooled


# --- runs ------------------------------------------------------------------------------------------------------------


def test_run_goes_on_from_a_checkpoint_bit_for_bit(digits: Path, tmp_path: Path):
    """The second of two epochs takes the second views; the features are found."""
    chosen = {"lock": "image,text", "augmentation": CROPS, "cached_views": 2, "dataset": [str(digits / "several")]}
    chosen |= {"max_steps": 6, "save_steps": 4, "max_bad_fraction": 0.5, "validation": "20", "ema_decay": 0.9}
    chosen |= {"metric_for_best_model": "recall@10"}
    out = stored_run(digits, tmp_path / "run", **chosen)
    expected, lines = weights(out), records(out, "recall@1")
    checkpoint = weights(out / "checkpoints" / "step-00000004")
    assert checkpoint.keys() == {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    stored_run(digits, out, **chosen, resume_from_checkpoint="latest")
    assert largest_difference(weights(out), expected) == 0
    assert records(out, "recall@1") == lines
    assert not list(out.rglob("*unfinished"))


@pytest.mark.parametrize(
    "fields",
    [
        {"lock": "image", "lora_rank": 2, "ema_decay": 0.5, "average_with_pretrained": "0.5", "validation": "20"},
        {"lock": "image,text", "l2_to_pretrained": 0.5, "micro_batch_size": 8, "average_with_pretrained": "0.5"},
    ],
    ids=["adapters", "projections"],
)
@pytest.mark.slow
def test_other_options_do_what_they_do_without(digits: Path, tmp_path: Path, fields: dict):
    chosen = fields | {"replay": f"{digits / 'several'}=0.3", "max_bad_fraction": 0.5}
    plain = train(digits, tmp_path / "plain", **LOCKED | chosen)
    assert_same_run(stored_run(digits, tmp_path / "stored", **chosen), plain)


@pytest.mark.slow
def test_processes_share_the_work_and_store_what_one_would(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    """1,280 rows are two shards. The two processes split the heads by FSDP2."""
    chosen = {"dataset": [str(digits / "pairs")] * 2, "lock": "image,text"}
    outs = [tmp_path / "one", tmp_path / "two"]
    stored_run(digits, outs[0], **chosen)
    flags = LOCKED | chosen | {"cache_frozen_features": True, "per_device_train_batch_size": 16}
    two_processes.run(words(options(digits, outs[1], **flags)), {"plugin": {}, "gradients": str(tmp_path / "g.pt")})
    found = [{str(path.relative_to(out)): path.read_bytes() for path in out.rglob(SUMS)} for out in outs]
    assert len(found[0]) == 6
    assert found[0] == found[1]
    assert largest_difference(*map(weights, outs)) < 2e-6
