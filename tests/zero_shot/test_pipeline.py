"""`pipeline("zero-shot-image-classification")` on a converted folder, beside the stock class on the same model."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline
from transformers.pipelines import ZeroShotImageClassificationPipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_clip import HfClipModel, UnreadableImageError, ZeroShotClassifier
from hf_clip.zero_shot.pipeline import HfClipZeroShotPipeline

from ..waiting import LONGEST_WAIT

LABELS = ["a cat", "an astronaut", "a cup of coffee", "a rocket"]
TEMPLATE = "a photo of {}"


@pytest.fixture
def expected(repository: Path, photographs: dict[str, Image.Image]) -> list[dict[str, float]]:
    """Label probabilities computed without a pipeline."""
    model, processor = AutoModel.from_pretrained(repository).eval(), AutoProcessor.from_pretrained(repository)
    texts = [TEMPLATE.format(label) for label in LABELS]
    inputs = processor(text=texts, images=list(photographs.values()), return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits_per_image.softmax(-1)
    return [dict(zip(LABELS, row.tolist(), strict=True)) for row in probabilities]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("source", ["list", "generator", "column", "paths"])
def test_zero_shot_pipeline(
    repository: Path,
    photographs: dict[str, Image.Image],
    expected: list[dict[str, float]],
    source: str,
    batch_size: int,
    tmp_path: Path,
):
    def generate() -> Iterator[Image.Image]:
        yield from photographs.values()

    def column() -> KeyDataset:
        rows = {"image": list(photographs.values())}
        return KeyDataset(Dataset.from_dict(rows, features=Features({"image": ImageFeature()})), "image")

    def paths() -> list[str]:
        for name, image in photographs.items():
            image.save(tmp_path / f"{name}.png")
        return [str(tmp_path / f"{name}.png") for name in photographs]

    sources = {"list": lambda: list(photographs.values()), "generator": generate, "column": column, "paths": paths}
    classify = pipeline("zero-shot-image-classification", model=str(repository))
    results = classify(sources[source](), candidate_labels=LABELS, hypothesis_template=TEMPLATE, batch_size=batch_size)
    for found, scores in zip(results, expected, strict=True):
        assert [entry["label"] for entry in found] == sorted(scores, key=scores.__getitem__, reverse=True)
        for entry in found:
            assert entry["score"] == pytest.approx(scores[entry["label"]], rel=1e-3, abs=1e-5)


TASK = "zero-shot-image-classification"
STOCK_TEMPLATE = "This is a photo of {}."


def make_pipelines(model: HfClipModel, repository: Path) -> tuple:
    """Ours and the stock one, on the same model."""
    processor = AutoProcessor.from_pretrained(repository)
    parts = {"model": model, "tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    return pipeline(TASK, **parts), ZeroShotImageClassificationPipeline(**parts)


@pytest.fixture
def classify(model: HfClipModel, repository: Path) -> HfClipZeroShotPipeline:
    return make_pipelines(model, repository)[0]


@pytest.fixture
def small(repositories: dict[str, Path]) -> HfClipZeroShotPipeline:
    """For what has nothing to do with the kind of tower."""
    return make_pipelines(HfClipModel.from_pretrained(repositories["vit"]).eval(), repositories["vit"])[0]


def assert_same(found: list, expected: list, tolerance: float = 1e-5) -> None:
    for entries, others in zip(found, expected, strict=True):
        assert [entry["label"] for entry in entries] == [entry["label"] for entry in others]
        scores = [entry["score"] for entry in entries]
        assert scores == pytest.approx([entry["score"] for entry in others], abs=tolerance)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_scores_are_the_stock_pipelines(
    model: HfClipModel, repository: Path, photographs: dict, batch_size: int | None
):
    ours, stock = make_pipelines(model, repository)
    assert type(ours) is HfClipZeroShotPipeline
    images = list(photographs.values())
    settings = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE}
    expected = stock(images, **settings)
    assert_same(ours(images, batch_size=batch_size, **settings), expected)
    assert_same([ours(images[0], **settings)], expected[:1])
    assert_same([ours(images=images[0], **settings)], expected[:1])
    default = stock(images, candidate_labels=["cat", "cup"])
    assert_same(ours(images, candidate_labels=("cat", "cup")), default)


def test_other_models_keep_the_stock_pipeline(tokenizer, repository: Path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    stock = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes))
    processor = AutoProcessor.from_pretrained(repository)
    made = pipeline(TASK, model=stock, tokenizer=tokenizer, image_processor=processor.image_processor)
    assert type(made) is ZeroShotImageClassificationPipeline


def test_labels_are_encoded_once_a_call(
    classify: HfClipZeroShotPipeline, photographs: dict, monkeypatch: pytest.MonkeyPatch
):
    calls = {"texts": 0, "images": 0}
    towers = {"texts": classify.model.text_model, "images": classify.model.vision_model}
    for kind, tower in towers.items():
        tower.register_forward_hook(lambda *_, kind=kind: calls.update({kind: calls[kind] + 1}))
    images = list(photographs.values())
    expected = classify(images, candidate_labels=LABELS, batch_size=1)
    assert calls == {"texts": 1, "images": 6}
    assert_same(list(classify(iter(images), candidate_labels=LABELS)), expected)
    assert calls == {"texts": 2, "images": 12}
    known = ZeroShotClassifier(classify.model, classify.tokenizer, LABELS, STOCK_TEMPLATE, progress=False)
    assert calls["texts"] == 3
    for image, entries in zip(images, expected, strict=True):
        assert_same([classify(image, candidate_labels=known)], [entries])
    assert_same(classify(images, candidate_labels=known), expected)
    assert calls["texts"] == 3


def test_encoded_labels_are_taken_as_they_are(classify: HfClipZeroShotPipeline, photographs: dict, repository: Path):
    processor = AutoProcessor.from_pretrained(repository)
    known = ZeroShotClassifier(classify.model, processor, LABELS, background=["the sky"], progress=False)
    images = list(photographs.values())
    found = classify(images, candidate_labels=known)
    assert None in [entry["label"] for entry in found[0]]
    assert_same(found, known.classify(images))
    made = pipeline(TASK, model=str(repository), candidate_labels=known, top_k=2)
    assert_same(made(images), known.classify(images, top_k=2))
    with pytest.raises(ValueError, match="hypothesis_template cannot be changed where candidate_labels is a ZeroShotC"):
        classify(images, candidate_labels=known, hypothesis_template="a {}")


def lora(pipe: HfClipZeroShotPipeline) -> None:
    peft = pytest.importorskip("peft", reason="LoRA through PEFT needs the package peft")
    torch.manual_seed(0)
    targets = r"text_model.*(q_proj|v_proj)"
    pipe.model.add_adapter(
        peft.LoraConfig(r=8, lora_alpha=64, init_lora_weights=False, target_modules=targets), adapter_name="one"
    )


def weaken_lora(pipe: HfClipZeroShotPipeline) -> None:
    for module in pipe.model.modules():
        if hasattr(module, "scaling"):
            module.scaling["one"] /= 4


def write_data(pipe: HfClipZeroShotPipeline) -> None:
    pipe.model.text_projection.weight.data *= torch.linspace(-1, 1, 48)[:, None]


def write_weights(pipe: HfClipZeroShotPipeline) -> None:
    with torch.no_grad():
        pipe.model.text_projection.weight.mul_(torch.linspace(1, -1, 48)[:, None])


def hook(pipe: HfClipZeroShotPipeline) -> None:
    pipe.model.text_model.final_layer_norm.register_forward_hook(lambda module, args, output: output.flip(-1))


def replace_module(pipe: HfClipZeroShotPipeline) -> None:
    pipe.model.text_model.encoder.layers[0].mlp = torch.nn.Identity()


def replace_forward(pipe: HfClipZeroShotPipeline) -> None:
    layer = pipe.model.text_model.encoder.layers[1].mlp
    layer.forward = lambda hidden: 2 * type(layer).forward(layer, hidden)


def change_config(pipe: HfClipZeroShotPipeline) -> None:
    pipe.model.config.contrastive_loss = "sigmoid"


def add_tokens(pipe: HfClipZeroShotPipeline) -> None:
    pipe.tokenizer.add_tokens(["cat", "rocket"])
    torch.manual_seed(0)
    pipe.model.resize_token_embeddings(len(pipe.tokenizer))


def other_tokenizer(pipe: HfClipZeroShotPipeline) -> None:
    texts = ["a cat and an astronaut", "a cup of coffee beside a rocket"] * 3
    pipe.tokenizer = type(pipe.tokenizer).train_from_iterator(texts, 560, pipe.tokenizer.model_max_length)
    pipe.model.config.text_config.eos_token_id = pipe.tokenizer.eos_token_id


CHANGES: list[Callable[[HfClipZeroShotPipeline], None]] = [
    lora,
    weaken_lora,
    lambda pipe: pipe.model.disable_adapters(),
    lambda pipe: pipe.model.enable_adapters(),
    write_data,
    write_weights,
    hook,
    replace_module,
    replace_forward,
    change_config,
    add_tokens,
    other_tokenizer,
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the next one
def test_no_labels_outlive_what_made_them(small: HfClipZeroShotPipeline, photographs: dict):
    """One pipeline through all the changes, and after each one a pipeline that never saw another state."""
    image = photographs["chelsea"]
    before = small(image, candidate_labels=LABELS)
    for change in CHANGES:
        change(small)
        found = small(image, candidate_labels=LABELS)
        parts = {"tokenizer": small.tokenizer, "image_processor": small.image_processor}
        fresh = HfClipZeroShotPipeline(model=small.model, **parts)
        assert_same([found], [fresh(image, candidate_labels=LABELS)])
        scores, earlier = ({entry["label"]: entry["score"] for entry in entries} for entries in (found, before))
        assert any(abs(scores[label] - earlier[label]) > 1e-4 for label in LABELS), f"{change} changes nothing"
        before = found


CALLS = [
    {"candidate_labels": LABELS, "top_k": 2},
    {"candidate_labels": [f"a {word}" for word in ("cat", "dog", "cup", "moon")], "hypothesis_template": "{}"},
    {"candidate_labels": ["cat", "dog"], "hypothesis_template": ["a {}", "the {}", "art of {}"]},
    {"candidate_labels": [f"thing number {number}" for number in range(40)], "batch_size": 4},
]


def test_threads_share_one_pipeline(repository: Path, photographs: dict):
    images = list(photographs.values())
    alone = make_pipelines(HfClipModel.from_pretrained(repository).eval(), repository)[0]
    expected = [alone(images, **call) for call in CALLS]
    shared = make_pipelines(HfClipModel.from_pretrained(repository).eval(), repository)[
        0
    ]  # which has tokenized nothing
    known = ZeroShotClassifier(shared.model, AutoProcessor.from_pretrained(repository), LABELS, progress=False)
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        for turn in range(3):
            place = (number + turn) % len(CALLS)
            assert_same(shared(images, **CALLS[place]), expected[place])
            assert_same(known.classify(images), reference)

    reference = known.classify(images)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def ends_well(child: int, seconds: float) -> bool:
    """Whether a forked process ends with 0 in time; else it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # which Python says from 3.12 on, of all threads
def test_process_that_is_forked_while_another_thread_classifies_classifies_too(
    small: HfClipZeroShotPipeline, photographs: dict
):
    image = photographs["chelsea"].resize((64, 64))
    expected = small(image, candidate_labels=LABELS)
    stop = threading.Event()

    def go_on() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            small([image, image], candidate_labels=[f"a cat {number}", f"two cats {number}"])

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        children = []
        for _ in range(12):
            time.sleep(0.02)
            if (child := os.fork()) == 0:
                try:
                    torch.set_num_threads(1)  # as in DataLoader's workers: OpenMP's threads stayed behind
                    assert_same([small(image, candidate_labels=LABELS)], [expected])
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [ends_well(child, seconds=LONGEST_WAIT) for child in children] == [True] * len(children)
    finally:
        stop.set()
        thread.join()


def test_templates_are_averaged(classify: HfClipZeroShotPipeline, photographs: dict, repository: Path):
    images, templates = list(photographs.values()), ["a {}", "the {}", "art of {}"]
    processor = AutoProcessor.from_pretrained(repository)
    expected = ZeroShotClassifier(classify.model, processor, LABELS, templates, progress=False)
    found = classify(images, candidate_labels=LABELS, hypothesis_template=templates)
    assert_same(found, expected.classify(images), tolerance=1e-6)


def test_top_k_and_arguments_given_when_made(model: HfClipModel, repository: Path, photographs: dict):
    image = photographs["chelsea"]
    made = pipeline(TASK, model=str(repository), candidate_labels=LABELS, hypothesis_template="{}", top_k=2)
    plain = pipeline(TASK, model=str(repository))
    expected = plain(image, candidate_labels=LABELS, hypothesis_template="{}")
    assert made(image) == expected[:2]
    assert made(image, top_k=1) == expected[:1]
    assert made([image]) == [expected[:2]]
    assert [e["label"] for e in made(image, candidate_labels=["cat"])] == ["cat"]


def test_generator_yields_each_result_when_its_image_is_read(classify: HfClipZeroShotPipeline, photographs: dict):
    read = []

    def generate() -> Iterator[Image.Image]:
        for name, image in photographs.items():
            read.append(name)
            yield image

    results = classify(generate(), candidate_labels=LABELS)
    next(iter(results))
    assert len(read) <= 3


def test_image_on_its_side_is_turned_whichever_way_it_comes(
    classify: HfClipZeroShotPipeline, photographs: dict, tmp_path: Path
):
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    photographs["chelsea"].save(file, "JPEG", exif=exif)
    (tmp_path / "image.jpg").write_bytes(file.getvalue())
    with Image.open(tmp_path / "image.jpg") as opened:
        upright = Image.fromarray(np.rot90(np.asarray(opened), -1))
    column = Dataset.from_dict(
        {"image": [{"bytes": file.getvalue(), "path": None}]}, features=Features({"image": ImageFeature()})
    )
    ways = [str(tmp_path / "image.jpg"), file.getvalue(), Image.open(tmp_path / "image.jpg"), column[0]["image"]]
    expected = classify(upright, candidate_labels=LABELS)
    for way in ways:
        for timeout in (None, 5.0):
            found = classify(way, candidate_labels=LABELS, timeout=timeout)
            assert_same([found], [expected], tolerance=1e-6)


def test_half_precision_and_compiled_models(repository: Path, photographs: dict, classify: HfClipZeroShotPipeline):
    images = list(photographs.values())
    expected = classify(images, candidate_labels=LABELS)
    half = pipeline(TASK, model=str(repository), dtype=torch.bfloat16)
    for entries, others in zip(half(images, candidate_labels=LABELS), expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in entries}
        assert all(abs(scores[entry["label"]] - entry["score"]) < 0.05 for entry in others)
    compiled = torch.compile(HfClipModel.from_pretrained(repository).eval(), backend="eager")
    parts = {"tokenizer": classify.tokenizer, "image_processor": classify.image_processor}
    found = pipeline(TASK, model=compiled, **parts)
    assert type(found) is HfClipZeroShotPipeline
    assert_same(found(images, candidate_labels=LABELS), expected)


def test_sigmoid_model_gives_sigmoid_scores(repository: Path, photographs: dict):
    model = HfClipModel.from_pretrained(repository, contrastive_loss="sigmoid").eval()
    classify, _ = make_pipelines(model, repository)
    scores = [entry["score"] for entry in classify(photographs["chelsea"], candidate_labels=LABELS)]
    assert sum(scores) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (None, {"candidate_labels": LABELS}, "needs images: pass them first"),
        (7, {"candidate_labels": LABELS}, "images is of type int, but images are needed"),
        ("image", {}, "needs candidate_labels, e.g."),
        ("image", {"candidate_labels": "cat"}, "labels is 'cat', but a list of labels"),
        ("image", {"candidate_labels": ["cat", "cat"]}, "The label 'cat' appears twice"),
        ("image", {"candidate_labels": LABELS, "hypothesis_template": "a photo"}, "has no placeholder"),
        ("image", {"candidate_labels": LABELS, "top_k": 0}, "top_k is 0"),
        ("image", {"candidate_labels": LABELS, "top_k": 2.0}, "top_k is 2.0, but a whole number"),
        ("image", {"candidate_labels": []}, "There are no labels; pass at least one"),
        ([], {"candidate_labels": []}, "There are no labels; pass at least one"),
        ("nowhere.jpg", {"candidate_labels": LABELS}, "there is no file 'nowhere.jpg'"),
    ],
)
def test_bad_calls_are_refused(classify, photographs: dict, images: object, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        classify(photographs["chelsea"] if images == "image" else images, **settings)


def columns_of(images: list[bytes]) -> Dataset:
    """A data set whose images are decoded when they are read."""
    rows = {"image": [{"bytes": image, "path": None} for image in images]}
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))


EMPTY = {
    "list": list,
    "tuple": tuple,
    "column": lambda: columns_of([])["image"],
    "key data set": lambda: KeyDataset(columns_of([]), "image"),
    "iterator": lambda: iter([]),
    "generator": lambda: (image for image in []),
}


@pytest.mark.parametrize("source", EMPTY)
def test_no_images_no_results(small: HfClipZeroShotPipeline, source: str):
    assert list(small(EMPTY[source](), candidate_labels=LABELS)) == []
    assert small([], candidate_labels=LABELS) == []


def as_bytes(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


MANY = {
    "tuple": (tuple, list),
    "column": (lambda images: columns_of([*map(as_bytes, images)])["image"], list),
    "dictionary's values": (lambda images: dict(enumerate(images)).values(), list),
    "map": (lambda images: map(Image.Image.copy, images), Iterator),
    "iterator": (iter, Iterator),
    "key data set": (lambda images: KeyDataset(columns_of([*map(as_bytes, images)]), "image"), Iterator),
}


@pytest.mark.parametrize("source", MANY)
def test_images_come_in_many_ways(small: HfClipZeroShotPipeline, photographs: dict, source: str):
    images = list(photographs.values())
    make, kind = MANY[source]
    results = small(make(images), candidate_labels=LABELS)
    assert isinstance(results, list) == (kind is list)
    assert_same(list(results), small(images, candidate_labels=LABELS))


def test_rows_of_a_data_set_are_refused_by_name(small: HfClipZeroShotPipeline, photographs: dict):
    rows = columns_of([as_bytes(photographs["chelsea"])])
    with pytest.raises(ValueError, match=r"is a Dataset of rows with \['image'\].* pass one column, e.g. dataset"):
        small(rows, candidate_labels=LABELS)


BAD = {
    "no file": "nowhere.jpg",
    "no image": b"text",
    "several": ["nowhere.jpg"],
    "not finite": np.full((9, 9, 3), np.nan),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("source", ["list", "generator", "key data set", "column"])
@pytest.mark.parametrize("bad", BAD)
def test_unreadable_image_is_told_by_its_place(
    small: HfClipZeroShotPipeline, photographs: dict, source: str, bad: str, batch_size: int
):
    images = [photographs["chelsea"].resize((48, 48))] * 6
    given: object = [*images[:5], BAD[bad], *images]
    if source in ("key data set", "column"):  # whose own images are files' contents
        rows = columns_of([*map(as_bytes, images[:5]), b"text", *map(as_bytes, images)])
        given = rows["image"] if source == "column" else KeyDataset(rows, "image")
    elif source == "generator":
        given = (image for image in given)
    with pytest.raises(UnreadableImageError, match=r"^images\[5\]") as caught:
        list(small(given, candidate_labels=LABELS, batch_size=batch_size))
    assert caught.value.index == 5
    assert "\n" not in str(caught.value)


def test_single_unreadable_image_has_no_place(small: HfClipZeroShotPipeline):
    with pytest.raises(UnreadableImageError, match="^the image: there is no file 'nowhere.jpg'") as caught:
        small("nowhere.jpg", candidate_labels=LABELS)
    assert caught.value.index is None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_workers_tell_the_place_too(small: HfClipZeroShotPipeline, photographs: dict, batch_size: int):
    images = [photographs["chelsea"].resize((48, 48))] * 6
    settings = {"candidate_labels": LABELS, "num_workers": 1, "batch_size": batch_size}
    assert_same(small(images, **settings), small(images, candidate_labels=LABELS))
    with pytest.raises(UnreadableImageError, match=r"^images\[5\]: there is no file 'nowhere.jpg'; .*path.$") as caught:
        small([*images[:5], "nowhere.jpg", *images], **settings)
    assert caught.value.index == 5


def test_labels_of_numpy_come_back_as_plain_ones(small: HfClipZeroShotPipeline, photographs: dict):
    image = photographs["chelsea"]
    expected = small(image, candidate_labels=LABELS, hypothesis_template=TEMPLATE)
    texts = Dataset.from_dict({"label": LABELS})["label"]
    for labels in (np.array(LABELS), list(map(np.str_, LABELS)), np.array(LABELS, dtype=object), texts, iter(LABELS)):
        found = small(image, candidate_labels=labels, hypothesis_template=np.str_(TEMPLATE), top_k=np.int64(4))
        assert_same([found], [expected])
        assert {(type(entry["label"]), type(entry["score"])) for entry in found} == {(str, float)}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without an accelerator")
@pytest.mark.parametrize("device", [0, 1, "cuda", "cuda:0", torch.device("cuda")], ids=str)
def test_accelerator_that_is_not_there_is_refused(small: HfClipZeroShotPipeline, device: object):
    model, parts = small.model, {"tokenizer": small.tokenizer, "image_processor": small.image_processor}
    with pytest.raises(ValueError, match=r"device=.* asks for an accelerator, but torch .* finds none here; pass dev"):
        pipeline(TASK, model=model, device=device, **parts)
    for present in (None, -1, "cpu", torch.device("cpu")):
        assert pipeline(TASK, model=model, device=present, **parts).device.type == "cpu"


def test_labels_with_names_are_told_from_lists_of_names(classify: HfClipZeroShotPipeline, photographs: dict):
    image, template = photographs["chelsea"], "{}"
    first = classify(image, candidate_labels={"cat": "man", "dog": "cup"}, hypothesis_template=template)
    second = classify(image, candidate_labels=[["cat", "man"], ["dog", "cup"]], hypothesis_template=template)
    assert first != second
    again = classify(image, candidate_labels=(x for x in ("cat", "dog")), hypothesis_template=iter(["a {}", "the {}"]))
    expected = classify(image, candidate_labels=["cat", "dog"], hypothesis_template=["a {}", "the {}"])
    assert again == expected
    with pytest.raises(ValueError, match="the image holds several images; pass one image or a flat list"):
        classify(np.zeros((2, 9, 9, 3), np.uint8), candidate_labels=["cat", "dog"])
