"""Heads: what they compute, their files, and the models that they are of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from hf_clip import HfClipModel, encode_images, load_head
from hf_clip.zero_shot import embedding_head
from hf_clip.zero_shot.embedding_head import (
    EmbeddingHead,
    check_head_name,
    find_head,
    path_of_head,
    reference_image,
)

UNIT = torch.tensor([0.6, 0.8, 0.0])


def linear_head(**fields: Any) -> EmbeddingHead:
    layers = [(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0.0, 1.0]))]
    return EmbeddingHead(**({"kind": "labels", "labels": ["a", "b"], "layers": layers, "reference": UNIT} | fields))


def score_head(reference: torch.Tensor) -> EmbeddingHead:
    torch.manual_seed(1)
    layers = [(torch.randn(1, len(reference)), torch.tensor([5.0]))]
    return EmbeddingHead("scores", ["aesthetic"], layers, reference, model="mine", facts={"protocol": "by hand"})


def test_head_of_a_hand():
    features = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])  # of any length
    head = linear_head()
    assert head.outputs(features).tolist() == [[1, 1], [0, 3]]
    assert head.score(features)[0].tolist() == [0.5, 0.5]
    assert [entry["label"] for entry in head.rank(features)[1]] == ["b", "a"]
    assert head.rank(features, top_k=1)[0] == [{"label": "a", "score": 0.5}]
    hidden = linear_head(layers=[(-torch.eye(3), torch.zeros(3)), (torch.ones(2, 3), torch.tensor([0.0, 1.0]))])
    assert hidden.outputs(features).tolist() == [[0, 1], [0, 1]]  # nothing is left of negative numbers
    with pytest.raises(ValueError, match=r"have shape \(2, 2\), but this head was trained on \(images, 3\)"):
        head.score(features[:, :2])


def test_score_is_one_number():
    head = linear_head(kind="scores", labels=["beauty"], layers=[(torch.tensor([[1.0, 0, 0]]), torch.tensor([3.0]))])
    assert head.rank(UNIT[None]) == [[{"label": "beauty", "score": pytest.approx(3.6)}]]


def test_file_holds_the_whole_head(tmp_path: Path):
    path = path_of_head(tmp_path, "aesthetic")
    head = score_head(UNIT)
    head.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["aesthetic.safetensors"]
    read = EmbeddingHead.load(path)
    assert (read.kind, read.labels, read.model, read.facts) == ("scores", ["aesthetic"], "mine", head.facts)
    assert torch.equal(read.score(UNIT[None]), head.score(UNIT[None]))


def changed(path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    with safe_open(path, "pt") as file:
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(own | tensors, path, file.metadata() | metadata)
    return path


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    linear_head().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"head\.safetensors is no readable safetensors file"):
        EmbeddingHead.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its checksum is another. Train the head again, or copy it anew"):
        EmbeddingHead.load(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="its checksum is another"):
        EmbeddingHead.load(changed(path, {}, labels='["b", "a"]'))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"is no head of hf_clip's \(hf_clip.embedding_head.1\); `hf-clip evaluate"):
        EmbeddingHead.load(changed(path, {}, format="other"))
    with pytest.raises(FileNotFoundError, match="There is no head .*absent.safetensors"):
        EmbeddingHead.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"labels": ["a"]}, "it has 1 labels and 2 outputs"),
        ({"kind": "scores"}, "it has 2 names for one score"),
        ({"kind": "colours"}, "its kind is 'colours', none of scores, labels"),
        ({"reference": torch.zeros(4)}, r"a layer of shape \(2, 3\) follows on 4 inputs"),
        (
            {"layers": [(torch.full((2, 3), torch.nan), torch.zeros(2))]},
            "its tensors hold something other than finite float32 numbers",
        ),
        ({"labels": [], "layers": [(torch.zeros(0, 3), torch.zeros(0))]}, "it has no labels"),
        ({"facts": []}, "its facts are no JSON object"),
    ],
)
def test_file_that_contradicts_itself_is_damaged(fields: dict[str, Any], problem: str, tmp_path: Path):
    linear_head(**fields).save(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=f"is damaged: {problem}; train the head again"):
        EmbeddingHead.load(tmp_path / "head.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("name", ["reference", "layers.0.bias"])
def test_file_of_another_dtype_is_damaged(name: str, dtype: torch.dtype, tmp_path: Path):
    path = tmp_path / "head.safetensors"
    linear_head().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path, metadata | {"checksum": embedding_head._checksum(tensors, metadata)})
    with pytest.raises(ValueError, match="is damaged: its tensors hold something other than finite float32 numbers"):
        EmbeddingHead.load(path)


@pytest.mark.parametrize("name", ["labels", "facts"])
def test_file_of_deep_lists_is_damaged(name: str, tmp_path: Path):
    path = tmp_path / "head.safetensors"
    linear_head().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {name: "[" * 100_000}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"checksum": embedding_head._checksum(tensors, metadata)})
    with pytest.raises(ValueError, match=r"is damaged \(RecursionError: .*\); train the head again"):
        EmbeddingHead.load(path)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.safetensors", "~nobody-of-this-name/a"])
def test_path_of_an_unknown_user_is_no_head(name: str):
    with pytest.raises(FileNotFoundError, match="There is no head ~nobody-of-this-name/a"):
        find_head(name, "mine")


@pytest.mark.parametrize("name", ["a/b", "../a", "a\\b", "", ".a", "a.safetensors", "a b"])
def test_names_are_not_paths(name: str):
    with pytest.raises(ValueError, match="is no name of a head: letters, digits"):
        check_head_name(name)


@pytest.fixture
def place(repository: Path, tmp_path: Path) -> Path:
    """A copy of a model with a head."""
    for file in repository.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    model = HfClipModel.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    score_head(encode_images(model, processor, reference_image())[0]).save(path_of_head(tmp_path, "aesthetic"))
    return tmp_path


def test_head_is_found_beside_its_model(place: Path):
    processor = AutoProcessor.from_pretrained(place)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(place, dtype=dtype).eval()
        head = load_head("aesthetic", model, processor)
        scores = head.score(encode_images(model, processor, reference_image()))
        assert scores.shape == (1, 1)
        assert load_head(place / "heads" / "aesthetic.safetensors", model, processor, source="").labels == head.labels
    with pytest.raises(FileNotFoundError, match=r"has no head 'other': its heads are aesthetic\. Name one of them or"):
        load_head("other", model, processor)
    with pytest.raises(FileNotFoundError, match=r"ViT-B/32 is no folder beside whose model a head 'other' could lie"):
        load_head("other", model, processor, source="ViT-B/32")
    with pytest.raises(FileNotFoundError, match=r"The repository org/absent has no head 'other' that could be loaded"):
        load_head("other", model, processor, source="org/absent")


def test_head_of_another_model_is_refused(place: Path):
    model, processor = AutoModel.from_pretrained(place).eval(), AutoProcessor.from_pretrained(place)
    with torch.no_grad():
        model.visual_projection.weight += (
            0.1 * torch.randn_like(model.visual_projection.weight).sign() * (model.visual_projection.weight.std())
        )
    message = r"aesthetic.safetensors was trained on the embeddings of mine, and this model's are others: its feature "
    with pytest.raises(ValueError, match=message + r"of a test image lies 0\.\d+ away, where 0.02 is the most. Take"):
        load_head("aesthetic", model, processor)
    head = score_head(torch.tensor([0.6, 0.8]))
    with pytest.raises(ValueError, match="of mine, which have 2 dimensions, and this model's have 48. Take that model"):
        head.check_model(model, processor)
