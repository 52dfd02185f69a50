"""The cards: their snippets run, their metadata is the Hub's, their figures are the sources'."""

import json
import re
import shutil
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from hf_clip import VARIANTS, HfClipConfig, convert
from hf_clip.checkpoints.remote_code import MODEL_FOLDER, TRAVELLING, add_remote_code
from hf_clip.hub.model_card import USAGE, card_metadata, card_text, markdown_table
from hf_clip.hub.published_figures import DATA_SETS
from hf_clip.hub.stage import staged
from model_cards import CHART, render_card, render_custom_card
from model_cards import __main__ as command
from model_cards.chart import draw, drawn_points

from .test_contracts import PACKAGE, ROOT, imports_of, modules_of
from .warm_python import run_warm
from .without_hf_clip import BLOCK_HF_CLIP

CARDS = ROOT / "model_cards"
DATA = PACKAGE / "hub" / "card_data"
SHARED = ROOT.parent / "shared" / "data"
STAND_INS = {"vit": "ViT-L/14@336px", "resnet": "RN50x4"}
"""The variant whose card is tried out on a reduced model of the same kind."""


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def table_rows(card: str, width: int) -> dict[str, list[str]]:
    """The rows of every table with so many columns, by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if len(row) == width}


def committed(variant: str) -> str:
    return (CARDS / f"{VARIANTS[variant].slug}.md").read_text(encoding="utf-8")


def run_without_hf_clip(blocks: list[str], folder: Path) -> None:
    code = BLOCK_HF_CLIP + "\n".join(blocks)
    environment = {"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    done = run_warm(code, cwd=folder, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("tower", ["vit", pytest.param("resnet", marks=pytest.mark.slow)], indirect=True)
def test_every_snippet_runs(
    tower: str,
    repository: Path,
    photographs: dict[str, Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    published = tmp_path / "published"
    shutil.copytree(repository, published)
    add_remote_code(published)
    photographs["chelsea"].save(tmp_path / "cat.jpg")
    variant = VARIANTS[STAND_INS[tower]]
    if tower == "vit":
        convert(repository, tmp_path / f"stock-{variant.slug}", layout="transformers")
    monkeypatch.chdir(tmp_path)

    blocks = python_blocks(render_card(variant.name, str(published)))
    ours = [block for block in blocks if re.search(r"^(import|from) hf_clip", block, re.MULTILINE)]
    others = [block for block in blocks if block not in ours]
    assert len(ours) == 3
    assert ["trust_remote_code" in block for block in others] == ([True, False] if tower == "vit" else [True])

    results: dict = {}
    for block in ours:
        exec(compile(block, "card", "exec"), results)
    width = results["model"].config.projection_dim
    assert results["image_features"].shape == (1, width)
    assert results["text_features"].shape == (2, width)
    assert results["outputs"].logits_per_image.shape == (1, 2)
    assert type(results["classify"]).__module__ == "hf_clip.zero_shot.pipeline"
    assert results["classifier"].matrix.labels == ["cat", "dog"]
    run_without_hf_clip(others, tmp_path)


@pytest.mark.slow
def test_card_of_a_stock_repository_loads_it_with_stock_classes(
    repositories: dict[str, Path], photographs: dict[str, Image.Image], tmp_path: Path
):
    folder = tmp_path / "published"
    convert(repositories["vit"], folder, layout="transformers")
    photographs["chelsea"].save(tmp_path / "cat.jpg")
    config, blocks = HfClipConfig.from_pretrained(folder), []
    for card in (
        render_custom_card(config, str(folder), stock=True),
        render_card("ViT-B/32", str(folder), stock=True),
    ):
        blocks.append(python_blocks(card)[0])
        assert "trust_remote_code" not in blocks[-1]
    run_without_hf_clip(blocks, tmp_path)
    with staged(repositories["vit"], "org/stock", "transformers", None) as out:
        assert render_custom_card(config, "org/stock", stock=True) == (out / "README.md").read_text(encoding="utf-8")


def test_custom_card_has_the_same_snippets_and_no_figures(tower: str, repository: Path):
    config = AutoModel.from_pretrained(repository).config
    card = render_custom_card(json.loads((repository / "config.json").read_text()), "me/mine")
    assert card == render_custom_card(config, "me/mine")
    assert '"me/mine"' in card
    assert "# mine\n" in card
    towers = {"vit": "3 layers of width 128, 2 heads, patches of 16", "resnet": "1-2-1-1 blocks, stem of 8 channels"}
    assert towers[tower] in card
    widths = re.findall(r"# \(\d, (\d+)\)", card)
    assert widths == [str(config.projection_dim)] * 2
    assert len(python_blocks(card)) == 4
    assert not any(data_set.name in card for data_set in DATA_SETS if data_set.column != "ImageNet")
    data = ModelCard(card).data
    assert (data.license, data.eval_results, data.language) == (None, None, None)
    assert data.library_name == "transformers"


def test_snippet_of_a_sigmoid_model_reads_its_scores_as_such():
    card = render_custom_card(HfClipConfig(contrastive_loss="sigmoid"), "me/mine")
    assert "logits_per_image.sigmoid()" in card
    assert "softmax" not in card
    assert "logits_per_image.softmax(dim=-1)" in render_custom_card(HfClipConfig(), "me/mine")


@pytest.mark.parametrize("variant", VARIANTS)
def test_snippets_follow_the_repository_and_the_architecture(variant: str):
    card = render_card(variant, "somebody/their-clip")
    assert "org/" not in card.replace("arxiv.org/", "")
    assert f"# their-clip: CLIP {variant}\n" in card
    assert "- name: their-clip\n" in card
    assert card.count('"somebody/their-clip"') == 8
    assert re.findall(r"# \(\d, (\d+)\)", card) == [str(VARIANTS[variant].embed_dim)] * 2
    assert (f"convert {variant} stock-" in card) == variant.startswith("ViT")
    assert f"]({CHART.name})" in card


def test_requirements_without_the_package_are_those_of_the_code_that_travels():
    imported = set()
    for name in TRAVELLING:
        for node in imports_of(MODEL_FOLDER / f"{name}.py"):
            if not getattr(node, "level", 0):
                imported |= {module.split(".")[0].lower() for module in modules_of(node)}
    imported -= {"hf_processors_rs"}  # used where it is there, and tried in a way that the Hub's loader passes over
    needed = {"pillow" if name == "pil" else name for name in imported - sys.stdlib_module_names}
    always = [line for line in requires("transformers") or [] if "extra ==" not in line]
    brought = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in always}
    line = re.search(r"pip install (\"transformers.*?)`", USAGE.template)
    assert line is not None
    named = set(re.findall(r"[a-z]+", line[1]))
    assert needed - brought == named


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata_is_what_the_hub_reads(variant: str):
    data = ModelCard(committed(variant)).data
    content = data.to_dict()
    assert content["license"] == "mit"
    assert content["library_name"] == "transformers"
    assert content["pipeline_tag"] in PIPELINE_REGISTRY.get_supported_tasks()
    assert {"clip", "hf_clip", "resnet" if variant.startswith("RN") else "vit"} <= set(content["tags"])
    assert ModelCardData(**content).to_dict() == content

    name, results = model_index_to_eval_results(content["model-index"])
    assert name == VARIANTS[variant].slug
    assert len(results) == 27 + 27 + 7
    assert len({(r.unique_identifier, r.metric_name) for r in results}) == len(results)
    sources = [result.source_name for result in results]
    counts = {source: sources.count(source) for source in sources}
    assert counts == {"Radford et al. 2021, table 11": 27, "Radford et al. 2021, table 10": 27, "open_clip": 7}
    assert all(result.source_url.startswith("https://") for result in results)
    imagenet = {(r.task_type, r.source_name): r.metric_value for r in results if r.dataset_type == "imagenet-1k"}
    assert imagenet["zero-shot-image-classification", "Radford et al. 2021, table 11"] == (
        VARIANTS[variant].imagenet_zero_shot_top1
    )
    assert len(imagenet) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_show_the_figures_of_the_files(variant: str):
    card = committed(variant)
    rows = table_rows(card, width=4)
    files = {}
    for name in ("paper_zero_shot", "paper_linear_probe"):
        header, *lines = (DATA / "figures" / f"{name}.csv").read_text().splitlines()
        cells = next(line.split(",") for line in lines if line.startswith(f"{variant},"))
        files[name] = dict(zip(header.split(","), cells, strict=True))
    columns = files["paper_zero_shot"].keys() - {"variant"}
    assert len(columns) == 27
    assert {data_set.column for data_set in DATA_SETS} == columns
    for data_set in DATA_SETS:
        assert rows[data_set.name] == [data_set.metric, *(files[name][data_set.column] for name in files)]

    line = next(
        line
        for line in (DATA / "figures" / "openclip_measured.csv").read_text().splitlines()
        if line.startswith(f"{variant},")
    )
    shown = re.findall(r"^\| [^|]+ \| (?:top-1|average|[^|]*recall at 1) \| ([\d.]+) \|$", card, flags=re.MULTILINE)
    assert shown == line.split(",")[1:]


@pytest.mark.parametrize(
    ("variant", "figures"),
    [
        (
            "RN50",
            ["20.3 % on CLEVR", "42.2 % on the distance", "66.6 % on the handwritten", "| ImageNet | top-1 | 59.82 |"],
        ),
        ("ViT-B/32", ["| ImageNet | accuracy | 63.2 | 76.1 |", "ε 1e-6", "5e-4, 2,000 steps", "8.8 GFLOPs"]),
        ("RN50x64", ["592 V100 for 18 days", "β₂ 0.999, ε 1e-8", "623.3 million: 420.4 for images, 202.9 for texts"]),
        (
            "ViT-L/14@336px",
            ["88.3 % on the handwritten", "37.2 % on aircraft", "32, then 1 at 336 pixels", "the 88 % of this model"],
        ),
    ],
)
def test_figures_written_down_by_hand(variant: str, figures: list[str]):
    for figure in figures:
        assert figure in committed(variant), figure


def test_parity_equals_that_of_the_docs():
    page = (ROOT / "docs" / "benchmarks" / "exactness.md").read_text(encoding="utf-8")
    shown = table_rows(page, width=6)
    for variant in VARIANTS:
        assert f"| {' | '.join(shown[variant])} |" in committed(variant)
    measured = re.search(r"^Measured on (\S+) at .*: float32, torch (\S+), transformers (\S+),", page, re.M)
    assert measured is not None
    date, torch_version, transformers_version = measured.groups()
    assert f"Measured on {date} in float32, torch {torch_version}, transformers {transformers_version}," in (
        committed("RN50")
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the separately kept figures are not part of the repository")
def test_figures_equal_those_kept_separately():
    for name in ("paper_zero_shot.csv", "paper_linear_probe.csv", "openclip_measured.csv"):
        assert (DATA / "figures" / name).read_bytes() == (SHARED / name).read_bytes()


def test_every_file_of_figures_has_its_source():
    text = (DATA / "figures" / "README.md").read_text(encoding="utf-8")
    for path in (DATA / "figures").glob("*.csv"):
        assert f"| `{path.name}` |" in text
        assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["variant", *VARIANTS]


def test_committed_cards_are_those_that_the_command_writes(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_check_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    packaged = tmp_path / "package" / CHART.name
    tmp_path = tmp_path / "cards"
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "CHART", packaged)
    assert command.main([]) == 0
    assert packaged.read_bytes() == (tmp_path / CHART.name).read_bytes()
    assert f"9 cards and {CHART.name} are in {tmp_path}" in capsys.readouterr().out
    assert command.main(["--check"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{row.slug}.md" for row in VARIANTS.values()} | {CHART.name}
    for path in tmp_path.glob("*.md"):
        assert path.read_bytes() == (CARDS / path.name).read_bytes()

    (tmp_path / "clip-rn50.md").unlink()
    lines = (tmp_path / "clip-vit-b32.md").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "clip-vit-b32.md").write_text("".join([*lines[:2], "edited\n", *lines[3:]]), encoding="utf-8")
    with open(tmp_path / "clip-vit-b16.md", "a", encoding="utf-8") as file:
        file.write("more\n")
    Image.new("RGB", (8, 8)).save(tmp_path / CHART.name)
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "clip-rn50.md is missing",
        "clip-vit-b32.md differs from line 3 on",
        f"clip-vit-b16.md differs from line {len((CARDS / 'clip-vit-b16.md').read_text().splitlines()) + 1} on",
        f"{CHART.name} shows other figures",
        "Write them anew with: python -m model_cards",
    ]
    for path in (tmp_path / CHART.name, packaged):
        path.unlink()
    assert command.differences(tmp_path)[-2:] == [f"{CHART.name} is missing", f"the package's {CHART.name} is missing"]


def test_picture_has_the_nine_points(tmp_path: Path):
    draw(tmp_path / "chart.png")
    for path in (CHART, tmp_path / "chart.png"):
        expected = {name: (row.image_gflops, row.imagenet_zero_shot_top1) for name, row in VARIANTS.items()}
        assert drawn_points(path) == expected
        with Image.open(path) as image:
            assert image.width > image.height > 600


def test_without_matplotlib_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.main([]) == 1
    assert "error: The picture is drawn with matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_card_of_an_unknown_variant_names_the_nine():
    with pytest.raises(ValueError, match="Unknown CLIP variant 'RN51'"):
        render_card("RN51", "org/clip")


def fine_tune_result(**others: str | float) -> EvalResult:
    fields = {"task_type": "image-to-text-retrieval", "dataset_type": "me/pairs", "dataset_name": "pairs"}
    return EvalResult(**fields | {"metric_type": "recall_at_1", "metric_value": 41.5} | others)


def test_parts_make_the_card_of_a_fine_tune():
    results = [fine_tune_result(), fine_tune_result(metric_type="recall_at_5", metric_value=70.25)]
    metadata = card_metadata("me/tuned", base_model="org/clip-rn50", datasets=["me/pairs"], results=results)
    body = "# tuned\n\n" + markdown_table(["metric", "%"], [("recall at 1", 41.5), ("recall at 10", None)])
    card = ModelCard(card_text(metadata, body))
    assert card.data.base_model == "org/clip-rn50"
    assert card.data.datasets == ["me/pairs"]
    assert "license" not in card.data.to_dict()
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "tuned"
    assert found == results
    assert card.text.strip().endswith("| metric | % |\n| --- | ---: |\n| recall at 1 | 41.5 |\n| recall at 10 |  |")


def test_results_that_would_lose_their_source_are_refused():
    paper = {"source_name": "a paper", "source_url": "https://example.org/paper"}
    with pytest.raises(
        ValueError, match=r"differ in source_name \(None, 'a paper'\).* different values of dataset_config"
    ):
        card_metadata("me/tuned", results=[fine_tune_result(), fine_tune_result(**paper)])
    card_metadata("me/tuned", results=[fine_tune_result(), fine_tune_result(**paper, dataset_config="paper")])
