"""The layers of heads, on features whose scores and labels are known."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.evaluation import head_fits
from hf_clip.evaluation.correlation import pearson
from hf_clip.evaluation.head_fits import check_options, divide, fit_labels, fit_scores
from hf_clip.zero_shot.embedding_head import EmbeddingHead, Layer


@pytest.fixture(scope="module")
def features() -> Tensor:
    torch.manual_seed(0)
    return normalize(torch.randn(300, 8), dim=-1)


def outputs(layers: list[Layer], features: Tensor) -> Tensor:
    return EmbeddingHead("labels", ["?"] * len(layers[-1][1]), layers, features[0]).outputs(features)


def test_linear_score_is_found(features: Tensor):
    scores = 5.5 + 100 * features @ torch.arange(8).float()
    layers, described = fit_scores(features[:200], scores[:200])
    torch.testing.assert_close(outputs(layers, features)[:, 0], scores, rtol=1e-3, atol=0.2)
    assert described == "ridge regression, λ = 0.0001 by leave-one-out"


def test_hidden_layer_finds_what_is_not_linear(features: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(head_fits.TRAINING, "max_iter", 60)  # enough to tell the two apart
    scores = 7 + 40 * features[:, 0].abs()
    found = {}
    for hidden in (None, 64):
        layers, described = fit_scores(features[:240], scores[:240], hidden=hidden)
        found[hidden] = pearson(outputs(layers, features[240:])[:, 0], scores[240:])
    assert "64 hidden units" in described
    assert found[64] > 0.8 > 0.4 > abs(found[None])  # type: ignore[operator]


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_told_apart(features: Tensor, hidden: int | None, classes: int):
    labels = features[:, :classes].argmax(1)
    layers, _ = fit_labels(features[:240], labels[:240], classes, hidden=hidden)
    predicted = outputs(layers, features[240:]).argmax(1)
    assert (predicted == labels[240:]).float().mean() > 0.8


def test_class_without_images_has_no_probability(features: Tensor):
    labels = 1 + 2 * (features[:, 0] > 0).long()  # 1 and 3 of 0 to 4
    layers, _ = fit_labels(features, labels, 5)
    probabilities = outputs(layers, features).softmax(-1)
    assert probabilities[:, [0, 2, 4]].max() == 0
    assert (probabilities.argmax(1) == labels).float().mean() > 0.9


def test_what_nothing_can_be_learned_from(features: Tensor):
    with pytest.raises(ValueError, match="All 300 training images have the score 3, so there is nothing to learn"):
        fit_scores(features, torch.full((300,), 3.0))
    with pytest.raises(ValueError, match="All 300 training images are of one class, so there is nothing to tell"):
        fit_labels(features, torch.ones(300, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="There are 9 training images, but a head needs at least 10: take another"):
        fit_scores(features[:9], features[:9, 0])
    with pytest.raises(ValueError, match="30 training images, but a head with a hidden layer needs at least 40"):
        fit_scores(features[:30], features[:30, 0], hidden=8)
    with pytest.raises(ValueError, match="The class 1 has one training image, but a head with a hidden layer needs"):
        fit_labels(features, (torch.arange(300) == 7).long(), 2, hidden=8)
    with pytest.raises(ValueError, match="There are 1 training images, but a head needs at least 10: take another"):
        fit_labels(features[:1], torch.zeros(1, dtype=torch.int64), 2)
    message = "There are 60 training images of 10 classes, but a head with a hidden layer needs 10 for each class"
    with pytest.raises(ValueError, match=message):
        fit_labels(features[:60], torch.arange(60) % 10, 10, hidden=8)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (1.7e9 + 100 * torch.arange(50).double(), r"from 1700000000 to 1700004900, too close .* such as 1.7e\+09"),
        ((2**62 + torch.arange(50)).double(), r"to 4.611686018e\+18, too close to each other"),
        (
            1e-40 * torch.arange(50).double(),
            r"from 0 to 4.9e-39, but a head computes in float32.*: multiply all scores",
        ),
    ],
)
@pytest.mark.parametrize("hidden", [None, 8])
def test_scores_that_float32_cannot_hold(features: Tensor, scores: Tensor, message: str, hidden: int | None):
    with pytest.raises(ValueError, match=message):
        fit_scores(features[:50], scores, hidden=hidden)


@pytest.mark.parametrize(("offset", "spread"), [(2000.0, 1.0), (1.7e9, 1e8), (0.0, 1e-20), (0.0, 1e20)])
def test_scores_of_any_usual_size_are_found(features: Tensor, offset: float, spread: float):
    scores = offset + spread * features[:, 0].double()
    layers, _ = fit_scores(features[:200], scores[:200])
    assert pearson(outputs(layers, features[200:])[:, 0], scores[200:]) > 0.99


@pytest.mark.parametrize("seed", range(8))
def test_only_image_of_a_class_is_learned_from(features: Tensor, seed: int):
    labels = (torch.arange(21) == 20).long()
    kept, held_out = divide(labels, is_labels=True, seed=seed)
    assert 20 in kept
    assert sorted([*kept, *held_out]) == list(range(21))
    if seed < 2:
        layers, _ = fit_labels(features[:21], labels, 2, seed=seed)
        assert len(layers[0][1]) == 2


def test_classes_of_two_images_are_no_matter_of_warnings(features: Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers, _ = fit_labels(features[:12], torch.arange(12) % 6, 6)
    assert len(layers[0][1]) == 6


@pytest.mark.parametrize(
    ("hidden", "seed", "message"),
    [
        (0, 0, "The hidden layer has width 0, but at least 1 is needed; leave it out for none"),
        (10**12, 0, "The hidden layer has width 1000000000000, but 65536 is the most; take a smaller one, or none"),
        (None, -1, "The seed is -1, but a whole number from 0 to 4294967295 is needed"),
        (8, 2**32, "The seed is 4294967296, but"),
    ],
)
def test_options_that_no_head_is_trained_with(hidden: int | None, seed: int, message: str):
    with pytest.raises(ValueError, match=message):
        check_options(hidden, seed)
