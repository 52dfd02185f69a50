"""`hf-clip caption`: the nearest captions of a bank, and phrases composed of a vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_clip.commands.program import main
from hf_clip.search.caption_bank import PhraseComposer, captions_of_index, nearest_captions
from hf_clip.zero_shot.features import encode_images, encode_texts

from .conftest import make_image

COLOURS = ("red", "green", "blue", "yellow", "black")
DIGITS = ("one", "two", "three", "four")
BANK = [f"a photo of a {colour} {digit}" for colour in COLOURS for digit in DIGITS]


@pytest.fixture
def features(small_model: Any) -> torch.Tensor:
    model, processor, _ = small_model
    return encode_images(model, processor, [make_image(seed) for seed in range(3)])


def write_lines(path: Path, lines: Any) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_nearest_captions_are_those_of_all_similarities(features: torch.Tensor, small_model: Any):
    model, processor, _ = small_model
    seen: list[int] = []
    found = nearest_captions(model, processor, features, BANK, top_k=3, batch_size=4, advance=seen.append)
    scores = features @ encode_texts(model, processor, BANK).T
    right = scores.topk(3)
    assert [[caption.text for caption in row] for row in found] == [[BANK[i] for i in row] for row in right.indices]
    assert torch.tensor([[c.score for c in row] for row in found]) == pytest.approx(right.values, abs=1e-5)
    assert seen == [4] * 5
    few = nearest_captions(model, processor, features, BANK[:2], top_k=3)
    assert [len(row) for row in few] == [2, 2, 2]


def test_composition_takes_the_best_step_until_none_helps(features: torch.Tensor, small_model: Any):
    model, processor, _ = small_model
    words, margin = [*COLOURS, *DIGITS], 1e-3
    composer = PhraseComposer(model, processor, words, "a photo of a {}.", margin=margin, most=3)

    def score(*phrases: list[str]) -> torch.Tensor:
        texts = [f"a photo of a {' '.join(words)}." if words else "a photo of a." for words in phrases]
        return encode_texts(model, processor, texts) @ feature

    lengths = set()
    for feature in features:
        chosen: list[str] = []
        best = float(score([]))
        while len(chosen) < 3:
            tried = [
                [*chosen[:place], word, *chosen[place:]]
                for word in words
                if word not in chosen
                for place in range(len(chosen) + 1)
            ]
            scores = score(*tried)
            if float(scores.max()) < best + margin:
                break
            chosen, best = tried[int(scores.argmax())], float(scores.max())
        found = composer.compose(feature)
        assert found.score == pytest.approx(best, abs=1e-5)
        assert found.text == (f"a photo of a {' '.join(chosen)}." if chosen else "a photo of a.")
        lengths.add(len(chosen))
    assert max(lengths) > 0
    never = PhraseComposer(model, processor, words, "a photo of a {}.", margin=3.0)
    assert never.compose(features[0]).text == "a photo of a."


def test_command_prints_captions_and_goes_on_after_a_broken_image(
    photos: Path, small_model: Any, tmp_path: Path, capsys: Any
):
    model, processor, folder = small_model
    bank, words = write_lines(tmp_path / "bank.txt", ["", *BANK, BANK[0]]), write_lines(tmp_path / "words.txt", DIGITS)
    images = [str(photos / name) for name in ("a.png", "broken.png", "b.jpg")]
    how = ["--bank", bank, "--compose", words, "--model", folder, "--top-k", "2"]
    assert main(["caption", *images, *how, "--json"]) == 2
    shown = capsys.readouterr()
    assert "1 of 3 images could not be opened" in shown.err
    rows = json.loads(shown.out)["images"]
    assert [row["path"] for row in rows] == images
    assert "cannot be opened" in rows[1]["error"]
    assert (rows[1]["captions"], rows[1]["composed"]) == ([], None)
    for row in (rows[0], rows[2]):
        feature = encode_images(model, processor, row["path"])
        best = (feature @ encode_texts(model, processor, BANK).T)[0].topk(2)
        assert [caption["text"] for caption in row["captions"]] == [BANK[place] for place in best.indices]
        assert [caption["score"] for caption in row["captions"]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert row["composed"]["text"].startswith("a photo of a")
    assert main(["caption", *images, *how]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == images[0]
    assert lines[1] == f"  {rows[0]['captions'][0]['score']:.4f}  {rows[0]['captions'][0]['text']}"
    assert lines[3] == f"  {rows[0]['composed']['score']:.4f}  + {rows[0]['composed']['text']}"
    assert lines[4].startswith(f"{images[1]}  error: cannot be opened")


def test_captions_of_an_index_are_a_bank(photos: Path, small_model: Any, new_index: Any, tmp_path: Path, capsys: Any):
    captions = ["a red one", "a blue two", "a red one"]
    rows = Dataset.from_dict({"image": [{"bytes": (photos / "a.png").read_bytes()}] * 3, "caption": captions})
    rows.to_parquet(tmp_path / "rows.parquet")
    index = new_index()
    index.add_data_set(str(tmp_path / "rows.parquet"))
    assert captions_of_index(index) == captions[:2]
    words = ["caption", str(photos / "a.png"), "--index", str(tmp_path / "index"), "--model", small_model[2]]
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert {caption["text"] for caption in found["captions"]} == set(captions)
    new_index("bare").add(photos)
    words[words.index(str(tmp_path / "index"))] = str(tmp_path / "bare")
    assert main(words) == 1
    assert "bare has no captions: they come from data sets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "m"], "There are no captions to choose from: give --bank, --index, or --compose"),
        (["--model", "m", "--bank", "a", "--index", "b"], "leave out --bank or --index"),
        (["--bank", "a"], "A model is needed to encode images"),
        (["--model", "m", "--bank", "none.txt"], "There is no file none.txt of captions; check the path"),
        (["--model", "m", "--compose", "none.txt"], "There is no file none.txt of words; check the path"),
        (["--model", "m", "--bank", "{empty}"], "empty.txt has no captions: write one on each line"),
        (["--model", "m", "--bank", "{image}"], "cannot be read ('utf-8' codec can't decode"),
        (["--model", "m", "--compose", "{image}", "--template", "a photo"], "has no placeholder {}"),
        (["--index", "{image}-none"], "There is no index"),
    ],
)
def test_refusals_come_before_the_model_is_loaded(
    words: list[str], line: str, photos: Path, tmp_path: Path, capsys: Any
):
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"empty": tmp_path / "empty.txt", "image": photos / "a.png"}
    given = [word if word == "a photo" else word.format(**places) for word in words]
    assert main(["caption", str(photos / "a.png"), *given]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert line in shown
