"""The recipes: each is found, can be read, and does to a small model what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import forgetting
from hf_clip.commands import finetune
from hf_clip.training import recipes
from hf_clip.training.command_line import parse_config
from hf_clip.training.option_file import read_options
from hf_clip.training.options import OPTIONS
from hf_clip.training.recipes import PLACEHOLDERS, recipe_folder, recipe_names

from ..finetuning import LABELLED_CAPTION, ROOT, options, records, train, weights, words

NAMES = recipe_names()
PAGE = ROOT / "docs" / "guides" / "fine-tuning" / "recipes.md"
NEEDED = ["--model", "m", "--dataset", "d", "--output_dir", "o"]


# --- files and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_whole_with_model_data_and_folder(name: str):
    """By its path and by its name alike; its first lines say where it comes from and where its figures stand."""
    path = ROOT / "recipes" / f"{name}.yaml"
    values = read_options(path, OPTIONS)
    needed = [*NEEDED, *(word for option in values.keys() & PLACEHOLDERS for word in (f"--{option}", "old=0.5"))]
    found = parse_config([name, *needed])
    assert found == parse_config([str(path), *needed])
    bare = parse_config([*NEEDED, "--num_train_epochs", "10"]).to_dict()
    differing = {option for option, value in found.to_dict().items() if value != bare[option]}
    assert differing - {"learning_rate"} == values.keys() - {"num_train_epochs"}
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("https://" in line for line in comment)
    assert f"# Measured: {PAGE.relative_to(ROOT)}" in comment


def test_options_win_over_a_recipe():
    found = parse_config(["lora", *NEEDED, "--lora_rank", "4", "--max_steps", "7"])
    assert (found.lora_rank, found.num_train_epochs, found.max_steps) == (4, None, 7)
    assert parse_config(["full", *NEEDED, "--max_steps", "7"]).max_steps == 7  # nothing of the file remains


@pytest.mark.parametrize(
    ("word", "end"),
    [("lti", " Did you mean 'lit'?"), ("bs", " Did you mean '--per_device_train_batch_size'?"), ("x", "")],
)
def test_unknown_recipe_is_one_line(word: str, end: str, capsys: pytest.CaptureFixture):
    assert finetune.main([word, *NEEDED]) == 1
    assert capsys.readouterr().err == (
        f"error: There is no recipe {word!r}; there are {', '.join(NAMES)}. A file of your own ends in .yaml, .yml or "
        f".json.{end}\n"
    )


def test_recipes_of_an_installed_package_lie_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder `recipes` beside it is another package's."""
    installed = [tmp_path / "hf_clip" / "recipes", tmp_path / "recipes"]
    for folder in installed:
        folder.mkdir(parents=True)
    monkeypatch.setattr(recipes, "FOLDERS", tuple(installed))
    assert recipe_folder() == installed[0]


# --- what they do -----------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


def parts_that_differ(first: Weights, second: Weights) -> set[str]:
    """`vision_model`, `text_projection` and so on."""
    return {name.split(".")[0] for name in first if not first[name].equal(second[name])}


ALL = {"vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"}


def trains(*parts: str) -> Callable[[Path, Weights, Weights], None]:
    def check(result: Path, start: Weights, full: Weights) -> None:
        assert parts_that_differ(weights(result), start) == set(parts)

    return check


def contrasts_equal_prompts(result: Path, start: Weights, full: Weights) -> None:
    """The loss of 64 pairs of ten classes begins near log 64; with equal prompts left out it would near log 10."""
    assert records(result)[0]["loss"] > 3.5


def is_drawn_to_the_start(result: Path, start: Weights, full: Weights) -> None:
    assert parts_that_differ(weights(result), start) == {"visual_projection", "text_projection", "logit_scale"}
    assert records(result)[-1]["l2_to_pretrained"] > 0


def has_an_adapter(result: Path, start: Weights, full: Weights) -> None:
    adapter = json.loads((result / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == parse_config(["lora", *NEEDED]).lora_rank
    assert parts_that_differ(weights(result), start) == ALL


def is_chosen_of_averages(result: Path, start: Weights, full: Weights) -> None:
    assert [record["alpha"] for record in records(result, "alpha")] == [n / 10 for n in range(11)]


def is_another_result(result: Path, start: Weights, full: Weights) -> None:
    assert parts_that_differ(weights(result), full) == ALL


def has_a_teacher(result: Path, start: Weights, full: Weights) -> None:
    assert records(result)[-1]["distillation"] > 0
    assert parts_that_differ(weights(result), full) == ALL


EFFECTS: dict[str, Callable[[Path, Weights, Weights], None]] = {
    "distillation": has_a_teacher,
    "ema": is_another_result,
    "flyp": contrasts_equal_prompts,
    "full": trains(*ALL),
    "lit": trains("text_model", "text_projection", "logit_scale"),
    "lora": has_an_adapter,
    "projections": is_drawn_to_the_start,
    "replay": is_another_result,
    "wise-ft": is_chosen_of_averages,
}


def run_recipe(name: str, digits: Path, output: Path) -> Path:
    """Two steps of a recipe with the small model, as its command line asks for them."""
    given: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "augmentation": "none"}
    if name == "wise-ft":
        given["validation"] = "16"
    if name != "flyp":
        given["caption_column"] = LABELLED_CAPTION
    if name == "distillation":
        given["teacher"] = str(digits / "vit")
    if name == "replay":
        given["replay"] = f"{digits / 'pairs'}=0.5"
    chosen = options(digits, output, dataset=[str(digits / "labelled")], **given)
    return train(digits, output, **parse_config([name, *words(chosen)]).to_dict())


@pytest.fixture(scope="module")
def full_weights(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights(run_recipe("full", digits, tmp_path_factory.mktemp("full") / "result"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_its_effect(name: str, digits: Path, full_weights: Weights, tmp_path: Path):
    result = run_recipe(name, digits, tmp_path / "result")
    EFFECTS[name](result, weights(digits / "vit"), full_weights)


@pytest.mark.parametrize(
    ("recipe", "example"), [("replay", "--replay old/pairs=0.5"), ("distillation", "--teacher clip-vit-b32/")]
)
def test_recipe_asks_for_what_only_the_user_knows(
    recipe: str, example: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert finetune.main([recipe, *words(options(digits, tmp_path / "result"))]) == 1
    option = example.split()[0]
    said = f"error: The recipe {recipe} leaves {option} to you: name it, as in {example}.\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "result").exists()


# --- their figures ----------------------------------------------------------------------------------------------------


def test_every_recipe_is_measured_and_shown_once():
    assert {row.recipe for row in forgetting.ROWS} == set(NAMES)
    titles = [row.title for row in forgetting.ROWS]
    assert sorted(title for title in titles if title in NAMES) == NAMES
    page = PAGE.read_text()
    table = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    for title in titles:
        assert table.count(title if title not in NAMES else f"[{title}](#{title})") == 1, title
    for name in NAMES:
        assert page.count(f"recipes/{name}.yaml\n") == 1, name


def test_measured_recipes_become_a_table_and_a_picture(tmp_path: Path):
    def runs(new: float, old: float) -> list[dict[str, float]]:
        return [{"new": new - 0.05, "old": old}, {"new": new + 0.05, "old": old}]

    curve = [{"alpha": n / 2, "new": n / 4, "old": 1 - n / 4} for n in range(3)]
    found = {"before": runs(0.05, 0.9), "rows": {"full": runs(0.85, 0.1)}, "curve": [curve, curve]}
    assert forgetting.format_table(found).splitlines()[2:] == [
        "| before | 5.0 (0–10) | 90.0 (90–90) | 47.5 (45–50) |",
        "| full | 85.0 (80–90) | 10.0 (10–10) | 47.5 (45–50) |",
    ]
    facts = {"machine": {"processor": "any"}, "date": "2026-01-01"}
    forgetting.draw(tmp_path / "points.svg", facts, found)
    assert (tmp_path / "points.svg").read_text().startswith("<?xml")
