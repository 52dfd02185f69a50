"""What the demo's picture says of each image."""

from pathlib import Path

from demo.digits import make_dataset
from demo.report import CAPTIONS, MEANING, RIGHT, WRONG, draw_picture, title_of


def test_wrong_caption_stands_above_the_true_one():
    best = {"label": "a photo of a red six on white paper", "score": 0.104}
    assert title_of(best, best["label"]) == ("a red six\non white paper: 0.10", RIGHT)
    title, colour = title_of(best, "a photo of a red four on blue paper")
    assert title == "a red six\non white paper: 0.10\ntrue: a red four\non blue paper"
    assert colour == WRONG
    assert f"of {len(CAPTIONS)} captions" in MEANING


def test_picture_explains_itself(digits: Path, tmp_path: Path):
    pairs = make_dataset(16, 12)
    splits = {name: pairs[name].select(range(12)) for name in ("held_out_images", "unseen_combinations")}
    results = {name: [[{"label": CAPTIONS[0], "score": 0.5}]] * 12 for name in splits}
    draw_picture(tmp_path / "demo.svg", digits / "vit", splits, results, dict.fromkeys(splits, 0.0))
    drawn = (tmp_path / "demo.svg").read_text()
    assert f"<!-- {MEANING} -->" in drawn
    assert "<!-- held out images: top-1 0.0% of 12 images (chance 0.2%) -->" in drawn
    assert drawn.count("<!-- true: ") == 24 - sum(row["target"] == 0 for split in splits.values() for row in split)
