"""What a run leaves behind: a folder that loads anywhere, its card, its curve, and its publication."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hf_clip.checkpoints.remote_code import TRAVELLING
from hf_clip.commands import finetune
from hf_clip.training.command_line import parse_config

from ..finetuning import options, records, train, weights, words
from ..hub_server import TOKEN, HubServer
from ..warm_python import run_warm
from ..without_hf_clip import BLOCK_HF_CLIP

LABELS = ["a red seven", "a blue nine"]
WITHOUT_HF_CLIP = (
    BLOCK_HF_CLIP
    + """
import json
from transformers import CLIPModel, pipeline
folder, image = sys.argv[1:]
assert type(CLIPModel.from_pretrained(folder)) is CLIPModel
classify = pipeline("zero-shot-image-classification", model=folder)
print("RESULT" + json.dumps(classify(image, candidate_labels=["a red seven", "a blue nine"])))
"""
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_folder_is_complete_and_its_card_can_be_read_by_the_hub(digits: Path, tmp_path: Path, image: Path):
    chosen = {"max_steps": 4, "validation": "100", "save_steps": 2, "logging_steps": 2, "lock": "image:1"}
    out = train(digits, tmp_path / "my-digits", **chosen)
    names = {path.name for path in out.iterdir()}
    code = {f"{name}.py" for name in TRAVELLING}
    assert names == code | {"README.md", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors"} | {
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("training-curve.png", "training_config.json"),
    }
    with Image.open(out / "training-curve.png") as curve:
        assert curve.size[0] > 900  # loss and recall beside each other
    stored = json.loads((out / "training_config.json").read_text())
    assert (stored["lock"], stored["validation"], stored["launch"]["processes"]) == ("image:1", "100", 1)
    assert parse_config([str(out / "training_config.json")]).to_dict() == {
        k: stored[k] for k in stored if k != "launch"
    }

    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "generated_from_trainer" in card.data.tags
    figures = records(out, "recall@1")[-1]
    (task,) = {result.task_type for result in card.data.eval_results}
    assert task == "zero-shot-image-classification"
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["recall@1"] == pytest.approx(figures["recall@1"], abs=1e-4)
    assert card.data.model_name == "my-digits"
    assert "# my-digits" in card.text
    assert "unfinished" not in card.content
    assert str(tmp_path) not in card.content  # no paths of this machine
    start = records(out, "recall@1")[0]
    assert f"| recall@1 | {100 * start['recall@1']:.1f} | {100 * figures['recall@1']:.1f} |" in card.text
    assert "](training-curve.png)" in card.text
    classify = pipeline("zero-shot-image-classification", model=str(out))
    assert len(classify(str(image), candidate_labels=LABELS)) == 2


def test_stock_layout_needs_no_code_of_ours(digits: Path, tmp_path: Path, image: Path):
    chosen = {"max_steps": 2, "per_device_train_batch_size": 16}
    stock = train(digits, tmp_path / "stock", output_format="transformers", **chosen)
    ours = train(digits, tmp_path / "ours", **chosen)
    done = run_warm(WITHOUT_HF_CLIP, stock, image, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    expected = pipeline("zero-shot-image-classification", model=str(ours))(str(image), candidate_labels=LABELS)
    # By label, not by place: after two steps the model may find both as likely as each other.
    scores = [{entry["label"]: entry["score"] for entry in entries} for entries in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    card = (stock / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "CLIPModel.from_pretrained" in card
    assert "trust_remote_code=True" in (ours / "README.md").read_text()
    train(digits, ours, output_format="transformers", overwrite_output_dir=True, **chosen)
    assert not (ours / "processor_config.json").exists()  # it would go on to name our processor
    assert type(AutoProcessor.from_pretrained(ours)).__name__ == "CLIPProcessor"


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_gets_every_record(digits: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = {"max_steps": 4, "logging_steps": 2, "validation": "60", "save_steps": 2}
    out = train(digits, tmp_path / "out", report_to=["tensorboard"], **chosen)
    (file,) = (path for path in out.rglob("events.out.tfevents.*") if "hf_clip" in path.parts[-2])
    events = EventAccumulator(str(file.parent)).Reload()
    for name, key in (("loss", "loss"), ("recall@1", "recall@1")):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(record["step"], record[name]) for record in records(out, key)]
        assert [step for step, _ in found] == [step for step, _ in expected] == [2, 4]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])


# --- publication -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """What this process takes for the Hub, with a token for it."""
    with HubServer() as running:
        settings = {"ENDPOINT": running.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in (settings | {"HF_HUB_DISABLE_TELEMETRY": True}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # huggingface_hub's own call
def test_run_is_published_at_checkpoints_and_at_its_end(
    digits: Path, tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture
):
    """In the account that the token is of, under the folder's name."""
    chosen = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2}
    out = train(digits, tmp_path / "out", max_steps=4, per_device_train_batch_size=16, **chosen)
    repository = server.hub.repositories["org/out"]
    assert repository.messages == ["initial commit", "Step 2", "4 steps of training"]
    files = server.hub.uploaded("org/out")
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert files.keys() >= {"README.md", "metrics.jsonl", "training-curve.png", "modeling_hf_clip.py", "config.json"}
    assert not any("checkpoints" in name for name in files)
    assert 'from_pretrained("org/out")' in files["README.md"].decode()
    printed = capsys.readouterr()
    assert f"{server.url}/org/out/commit/" in printed.out
    assert TOKEN not in printed.out + printed.err


def test_refused_push_is_one_line_and_keeps_the_result(
    digits: Path, tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture
):
    chosen = {"max_steps": 4, "per_device_train_batch_size": 16, "push_to_hub": True, "hub_model_id": "others/digits"}
    assert finetune.main(words(options(digits, tmp_path / "out", **chosen))) == 1
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: others/digits was not published: your token may not write to others (")
    assert line.endswith("The model itself is in the output folder.")
    assert weights(tmp_path / "out").keys() == weights(digits / "vit").keys()
    assert "Traceback" not in printed
    assert TOKEN not in printed


def test_padding_image_processor_is_refused_before_training(digits: Path, tmp_path: Path):
    processor = AutoProcessor.from_pretrained(digits / "vit")
    AutoModel.from_pretrained(digits / "vit").save_pretrained(tmp_path / "padding")
    processor.image_processor.fit = "pad"
    processor.save_pretrained(tmp_path / "padding")
    with pytest.raises(ValueError, match='fit="pad" cannot be said to transformers'):
        train(digits, tmp_path / "out", model=str(tmp_path / "padding"), output_format="transformers")
    assert not (tmp_path / "out").exists()
