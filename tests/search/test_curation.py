"""Curation: scores equal those of the model, what is kept is what the condition says, and results are whole."""

import io
import json
import signal
import sqlite3
import tarfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_clip import encode_images, encode_texts
from hf_clip.checkpoints.whole_folder import FolderInUseError, held_folder
from hf_clip.commands.program import main
from hf_clip.search.curation import Curation, curate
from hf_clip.search.scored_rows import ScoredRows, check_column
from hf_clip.zero_shot.embedding_head import EmbeddingHead, reference_image
from hf_clip.zero_shot.laion_head import read_laion_head

from ..waiting import LONGEST_WAIT
from .conftest import make_image

Small = tuple[Any, Any, str]
CAPTIONS = [f"a photo of a {colour} {digit}" for colour in ("red", "blue", "green") for digit in ("one", "two")]


def content_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two tars of six images with captions, of which the first tar's third is broken."""
    samples = [{"png": content_of(make_image(seed)), "txt": caption.encode()} for seed, caption in enumerate(CAPTIONS)]
    samples[2]["png"] = samples[2]["png"][:100]
    write_tar(tmp_path / "a-0.tar", samples[:4])
    write_tar(tmp_path / "a-1.tar", samples[4:])
    return str(tmp_path / "a-{0..1}.tar")


@pytest.fixture
def run(small_model: Small) -> Callable[..., Curation]:
    model, processor, _ = small_model
    return lambda source, out, **settings: curate(source, out, model=model, processor=processor, **settings)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def head_of(model: Any, processor: Any, label: str = "aesthetic", outputs: int = 1) -> EmbeddingHead:
    generator = torch.Generator().manual_seed(5)
    layer = (torch.randn(outputs, model.config.projection_dim, generator=generator), torch.ones(outputs))
    reference = encode_images(model, processor, reference_image())[0]
    kind, labels = ("scores", [label]) if outputs == 1 else ("labels", list("abcdef"[:outputs]))
    return EmbeddingHead(kind, labels, [layer], reference, model="small")


def test_scores_equal_the_models_and_the_rows_are_those_of_the_source(
    run: Callable[..., Curation], shards: str, small_model: Small, tmp_path: Path
):
    model, processor, _ = small_model
    head = head_of(model, processor)
    done = run(shards, tmp_path / "scores.parquet", heads=[head], batch_size=2)
    assert (done.images, done.kept, done.unreadable, done.duplicates) == (5, 5, 1, None)
    assert [path for path, _ in done.problems] == [f"{shards}#2"]
    rows = rows_of(tmp_path / "scores.parquet")
    assert [row["id"] for row in rows] == [0, 1, 3, 4, 5]
    assert [row["caption"] for row in rows] == [CAPTIONS[number] for number in (0, 1, 3, 4, 5)]
    assert {(row["width"], row["height"]) for row in rows} == {(60, 40)}
    images = encode_images(model, processor, [make_image(row["id"]) for row in rows])
    texts = encode_texts(model, processor, [row["caption"] for row in rows])
    assert [row["clip_score"] for row in rows] == pytest.approx((images * texts).sum(1).tolist(), abs=1e-6)
    assert [row["aesthetic"] for row in rows] == pytest.approx(head.score(images)[:, 0].tolist(), abs=1e-5)
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert summary == done.summary
    found = summary["scores"]["clip_score"]["all"]
    values = np.array([row["clip_score"] for row in rows])
    assert (found["count"], found["50%"]) == (5, pytest.approx(np.median(values), abs=1e-5))


def test_condition_and_fraction_choose_the_rows(run: Callable[..., Curation], shards: str, tmp_path: Path):
    run(shards, tmp_path / "all.parquet")
    scores = {row["id"]: row["clip_score"] for row in rows_of(tmp_path / "all.parquet")}
    middle = sorted(scores.values())[2]
    kept = run(shards, tmp_path / "kept.parquet", keep=f"clip_score >= {middle - 1e-6} AND caption NOT LIKE '%blue%'")
    ids = [row["id"] for row in rows_of(tmp_path / "kept.parquet")]
    assert ids == [id for id, score in scores.items() if score >= middle and "blue" not in CAPTIONS[id]]
    assert kept.summary["scores"]["clip_score"]["kept"]["count"] == len(ids)
    run(shards, tmp_path / "best.parquet", top_fraction=("clip_score", 0.4), keep="id > 0")
    of_the_rest = sorted((id for id in scores if id > 0), key=lambda id: -scores[id])
    assert [row["id"] for row in rows_of(tmp_path / "best.parquet")] == sorted(of_the_rest[:2])
    assert run(shards, tmp_path / "none.parquet", keep="clip_score > 2").kept == 0
    assert rows_of(tmp_path / "none.parquet") == []


def test_row_without_a_caption_has_no_score_and_is_not_kept(
    run: Callable[..., Curation], tmp_path: Path, small_model: Small
):
    lines = [{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(["a red one", None, "a blue two"])]
    for number in range(3):
        make_image(number).save(tmp_path / f"{number}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(str(tmp_path / "rows.jsonl"), tmp_path / "all.parquet")
    assert [row["clip_score"] is None for row in rows_of(tmp_path / "all.parquet")] == [False, True, False]
    run(str(tmp_path / "rows.jsonl"), tmp_path / "kept.parquet", keep="clip_score > -2")
    assert [row["id"] for row in rows_of(tmp_path / "kept.parquet")] == [0, 2]


def test_near_duplicates_point_to_the_largest_image(run: Callable[..., Curation], tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, seed, size in [("a", 0, (120, 80)), ("b", 1, (240, 160)), ("c", 0, (480, 320)), ("d", 2, (120, 80))]:
        make_image(seed, (480, 320)).resize(size).save(folder / f"{name}.png")
    done = run(folder, tmp_path / "kept.parquet", keep="NOT duplicate")
    assert (done.images, done.kept, done.duplicates) == (4, 3, 1)
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "kept.parquet")] == ["b.png", "c.png", "d.png"]
    run(folder, tmp_path / "all.parquet", duplicates=True)
    assert [row["duplicate_of"] for row in rows_of(tmp_path / "all.parquet")] == [2, None, None, None]


def test_images_are_written_as_they_are(run: Callable[..., Curation], shards: str, tmp_path: Path):
    run(shards, tmp_path / "kept.parquet", images=True, keep="id IN (1, 4)")
    expected = [content_of(make_image(seed)) for seed in (1, 4)]
    assert [row["image"]["bytes"] for row in rows_of(tmp_path / "kept.parquet")] == expected
    rows = load_dataset("parquet", data_files=str(tmp_path / "kept.parquet"), split="train", cache_dir=tmp_path / "hub")
    assert np.array_equal(np.asarray(rows[0]["image"]), np.asarray(make_image(1)))

    done = run(shards, tmp_path / "best", tar_rows=2, labels=["a red one", "a blue two"])
    assert done.summary["tars"] == 3
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        *(f"{number:05}.tar" for number in range(3)),
        "summary.json",
    ]
    with tarfile.open(tmp_path / "best" / "00001.tar") as tar:
        names = tar.getnames()
        assert names == [f"{id:09}.{ending}" for id in (3, 4) for ending in ("png", "json", "txt")]
        assert tar.extractfile("000000004.png").read() == expected[1]
        sample = json.loads(tar.extractfile("000000004.json").read())
    assert (sample["id"], sample["caption"]) == (4, CAPTIONS[4])
    assert set(sample["tags"]) <= {"a red one", "a blue two"}
    again = run(
        str(tmp_path / "best" / "{00000..00002}.tar"), tmp_path / "again.parquet"
    )  # they are read as any others
    assert (again.images, again.unreadable) == (5, 0)


def layers_of(sizes: list[tuple[int, int]]) -> nn.Sequential:
    """The predictor of version 2 as it was published, with dropout between its layers."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(sizes):
        parts += [nn.Linear(inputs, outputs), *([nn.Dropout(0.2)] if place < 3 else [])]
    return nn.Sequential(*parts).eval()


def test_laions_predictors_are_read(tmp_path: Path):
    features = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    linear = nn.Linear(24, 1)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    layers = layers_of([(24, 32), (32, 16), (16, 12), (12, 8), (8, 1)])
    state = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    assert [name for name in state if "weight" in name] == [f"layers.{n}.weight" for n in (0, 2, 4, 6, 7)]
    torch.save(state, tmp_path / "improved.pth")
    for name, predictor in (("linear", linear), ("improved", layers)):
        with torch.no_grad():
            expected: Tensor = predictor(normalize(features, dim=-1))
        head = read_laion_head(tmp_path / f"{name}.pth")
        torch.testing.assert_close(head.score(features), expected, atol=1e-6, rtol=1e-5)
        assert (head.labels, head.width) == (["aesthetic"], 24)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(1, 4)}, "no LAION-Aesthetics predictor: it has the tensors fc.weight"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"its layers have the shapes \(2, 4\)"),
        ({"weight": torch.full((1, 4), torch.nan), "bias": torch.zeros(1)}, "its layers have the shapes"),
    ],
    ids=["other", "two scores", "nan"],
)
def test_other_weights_are_no_predictor(tmp_path: Path, state: dict[str, Tensor], message: str):
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        read_laion_head(tmp_path / "head.pth")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.pth"):
        read_laion_head(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "clip_scor > 1"}, r"The condition 'clip_scor > 1' cannot be evaluated \(no such column: clip_scor\)"),
        ({"keep": "clip_score >"}, "cannot be evaluated"),
        ({"keep": "1); DROP TABLE rows; --"}, "cannot be evaluated"),
        ({"keep": "clip_score > 1) ORDER BY (id"}, "cannot be evaluated"),
        ({"keep": "1) THEN 1 ELSE 0 END, id = (CASE WHEN (1"}, "cannot be evaluated"),
        ({"keep": ""}, "cannot be evaluated"),
        ({"top_fraction": ("aesthetic", 0.5)}, "There is no score 'aesthetic' to take the best of: the scores are"),
        ({"top_fraction": ("clip_score", 1.5)}, "The fraction of the best is 1.5"),
        ({"out": "photos"}, "photos holds files already; name a new or an empty folder"),
        ({"picture": "scores.jpg"}, "is written as PNG"),
        (
            {"source": "photos", "duplicates": True, "picture": "scores.png"},
            r"There is no score to draw into .*scores\.png: .*photos has no captions, and no head is given",
        ),
        ({"source": "photos"}, "There is nothing to score: .* has no captions"),
        ({"source": "photos", "keep": "clip_score > 0"}, "clip_score compares an image with its caption"),
        ({"source": "broken", "duplicates": True}, r"No image of .*broken can be opened: .*a\.png: "),
    ],
)
def test_what_is_refused_leaves_nothing(
    run: Callable[..., Curation],
    shards: str,
    photos: Path,
    settings: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    here = photos.parent
    (here / "broken").mkdir()
    (here / "broken" / "a.png").write_bytes(b"none")
    before = sorted(here.iterdir())
    settings = dict(settings)
    source = settings.pop("source", None)
    out = here / settings.pop("out", "out.parquet")
    if "picture" in settings:
        settings["picture"] = here / settings["picture"]
    if "keep" in settings:
        monkeypatch.setattr("hf_clip.search.curation._score", None)  # they are refused before anything is scored
    with pytest.raises((ValueError, OSError), match=message):
        run(shards if source is None else str(here / source), out, **settings)
    assert sorted(here.iterdir()) == before


def test_heads_that_do_not_fit_are_refused(
    run: Callable[..., Curation], shards: str, small_model: Small, tmp_path: Path
):
    model, processor, _ = small_model
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "l14.pth")
    score, label = head_of(model, processor), head_of(model, processor, outputs=2)
    for heads, message in (
        ([tmp_path / "l14.pth"], "is for embeddings of 7 numbers, and this model's have"),
        ([label], "gives labels, but a column needs a score"),
        ([score, head_of(model, processor, "Aesthetic")], "Two heads have a score 'Aesthetic'"),
        ([score, score], "Two heads have a score 'aesthetic'"),
        ([head_of(model, processor, "path")], "A score is called 'path', but columns have that name"),
        ([head_of(model, processor, "Perceptual hash")], "A score is called 'Perceptual hash', but columns have that"),
    ):
        with pytest.raises(ValueError, match=message):
            run(shards, tmp_path / "out.parquet", heads=heads)
    assert check_column("a-b c") == "a_b_c"


def test_command(shards: str, small_model: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, processor, folder = small_model
    head_of(model, processor).save(tmp_path / "taste.safetensors")
    out = tmp_path / "new" / "kept.parquet"
    words = ["curate", shards, str(out), "--model", folder, "--head", str(tmp_path / "taste.safetensors")]
    words += ["--top-fraction", "clip_score", "0.5", "--keep", "NOT duplicate", "--errors"]
    assert main([*words, "--picture", str(tmp_path / "scores.png")]) == 2
    printed, err = capsys.readouterr()
    assert printed.startswith(f"{shards}: 5 images, 2 kept in {out}\nclip_score: 5% ")
    assert "near duplicates: 0\n" in printed
    assert f"{shards}#2: " in err
    assert "1 image could not be opened\n" in err
    with Image.open(tmp_path / "scores.png") as picture:
        assert picture.size[1] > 500  # a histogram of each of two scores
    assert main([*words[:2], shards.replace("{0..1}", "0"), "--model", folder]) == 1
    assert "is a file, but tars go into a folder" in capsys.readouterr().err
    assert main(["curate", str(out), str(out), "--model", folder]) == 1
    assert "is the data set itself; name another file for the result" in capsys.readouterr().err


def test_source_that_changes_between_the_passes_is_noticed(
    run: Callable[..., Curation], photos: Path, monkeypatch: pytest.MonkeyPatch
):
    from hf_clip.search import scored_rows

    choose = scored_rows.ScoredRows.choose

    def change(self: Any, *arguments: Any) -> None:
        choose(self, *arguments)
        (photos / "a.png").unlink()

    monkeypatch.setattr(scored_rows.ScoredRows, "choose", change)
    with pytest.raises(OSError, match=r"photos changed while it was read: .*a\.png cannot be read any more \(No such "):
        run(photos, photos.parent / "out", duplicates=True)
    assert not (photos.parent / "out").exists()
    assert not list(photos.parent.glob(".*unfinished*"))


def test_result_goes_where_a_link_leads_and_what_a_killed_run_left_is_removed(
    run: Callable[..., Curation], shards: str, tmp_path: Path
):
    left = tmp_path / ".disk-unfinished-abcdefgh"
    for folder in (tmp_path / "disk", left):
        folder.mkdir()
    (left / "rows.sqlite").write_bytes(b"scores")
    (tmp_path / "out").symlink_to("disk")
    run(shards, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["00000.tar", "summary.json"]
    assert (tmp_path / "out").is_symlink()
    assert not left.exists()


def test_second_run_into_the_same_place_is_refused(run: Callable[..., Curation], shards: str, tmp_path: Path):
    with held_folder(tmp_path / "out.parquet"), pytest.raises(FolderInUseError, match="in use by another program"):
        run(shards, tmp_path / "out.parquet")


def test_condition_that_fails_on_some_row_is_one_line(run: Callable[..., Curation], shards: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"The condition .* cannot be evaluated \(integer overflow\)"):
        run(shards, tmp_path / "out.parquet", keep="abs(id - 9223372036854775807 - 1) > 0")
    assert not (tmp_path / "out.parquet").exists()


def test_ctrl_c_ends_a_condition_that_never_ends(tmp_path: Path):
    rows = ScoredRows(tmp_path, [], with_duplicates=False, with_tags=False)
    rows.add([dict.fromkeys(rows.columns, 0)], np.zeros((1, 4)), [0])
    begun = threading.Lock()
    begun.acquire()
    # Called for the first number. It is no Python code, in which the signal would be an error of the function.
    rows._connection.create_function("begun", 0, begun.release)
    following = "CASE x WHEN 1 THEN coalesce(begun(), 2) ELSE x + 1 END"
    endless = f"(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT {following} FROM n) SELECT count(*) FROM n) > 0"

    def interrupt() -> None:
        assert begun.acquire(timeout=LONGEST_WAIT)
        signal.raise_signal(signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    with closing(rows), pytest.raises(KeyboardInterrupt):
        rows.choose(endless, None)
    waiting.join()


def test_full_disk_is_one_line(run: Callable[..., Curation], shards: str, tmp_path: Path, monkeypatch: Any):
    def fail(*arguments: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ScoredRows, "add", fail)
    with pytest.raises(OSError, match=r"The scores cannot be kept in .* \(database or disk is full\): make room"):
        run(shards, tmp_path / "out.parquet")
    assert not list(tmp_path.glob(".out*"))


def test_folder_without_captions_is_scored_by_heads(run: Callable[..., Curation], photos: Path, small_model: Small):
    done = run(photos, photos.parent / "out.parquet", heads=[head_of(*small_model[:2])])
    assert (done.images, done.unreadable) == (6, 1)
    assert list(done.summary["scores"]) == ["aesthetic"]
