"""How linear probes are fitted: the search, and equality with scikit-learn and AdamW called by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from hf_clip.evaluation.linear_probe import probe_features
from hf_clip.evaluation.probe_protocols import (
    AdamWSettings,
    find_protocol,
    fit_adamw,
    fit_logistic_regression,
    parametric_search,
)
from hf_clip.evaluation.split_features import ProbeFeatures, SplitFeatures


def clouds(count: int, seed: int, classes: int = 6) -> SplitFeatures:
    """Points around a centre for each class, which overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    projected = centres[labels] + 0.9 * torch.randn(count, 8, generator=generator)
    pooled = torch.cat([projected, torch.randn(count, 4, generator=generator)], dim=1)
    return SplitFeatures(projected, labels, pooled, "drawn")


@pytest.fixture(scope="module")
def features() -> ProbeFeatures:
    """Three splits. Tests must not change them."""
    return ProbeFeatures([*"abcdef"], clouds(60, 0), clouds(120, 1), clouds(36, 2))


def test_search_halves_the_interval_at_the_peak():
    place, scores = parametric_search(lambda place: -abs(place - 37), 97)
    assert place == 37
    assert list(scores) == [0, 16, 32, 48, 64, 80, 96, 24, 40, 36, 44, 34, 38, 35, 37]
    assert parametric_search(lambda place: place, 97)[0] == 96
    assert parametric_search(lambda place: 1.0, 97)[0] == 0


def test_papers_search_tries_its_seven_strengths_first_and_ends_at_eight_steps_a_decade():
    strengths = find_protocol("paper").strengths
    tried = [strengths[place] for place in parametric_search(lambda place: -abs(math.log10(strengths[place])), 97)[1]]
    assert tried[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])
    assert tried[7:] == pytest.approx([10**exponent for exponent in (1, -1, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125)])
    decays = find_protocol("clip_benchmark").strengths
    assert decays == pytest.approx(np.logspace(-6, 2, 97))


def test_logistic_regression_is_scikit_learns(features: ProbeFeatures):
    train, test = features.train, features.test
    head = fit_logistic_regression(train.projected, train.labels, 6, 0.316)
    by_hand = LogisticRegression(C=0.316, max_iter=1000).fit(train.projected.numpy(), train.labels.numpy())
    expected = torch.from_numpy(by_hand.decision_function(test.projected.numpy())).float()
    torch.testing.assert_close(head.logits(test.projected), expected, rtol=1e-4, atol=1e-4)


def test_class_without_images_is_never_chosen(features: ProbeFeatures):
    train = features.train.take(features.train.labels % 3 != 1)  # 0, 2, 3, 5
    train = train.take(train.labels < 3)
    logits = fit_logistic_regression(train.projected, train.labels, 6, 1.0).logits(features.test.projected)
    by_hand = LogisticRegression(max_iter=1000).fit(train.projected.numpy(), train.labels.numpy())
    assert logits.argmax(1).tolist() == by_hand.predict(features.test.projected.numpy()).tolist()
    assert set(logits.argmax(1).tolist()) == {0, 2}
    chances = torch.from_numpy(by_hand.predict_proba(features.test.projected.numpy())).float()
    torch.testing.assert_close(logits.softmax(1)[:, [0, 2]], chances, rtol=1e-4, atol=1e-5)


def test_paper_fits_what_comes_before_the_projection_to_train_and_validation(features: ProbeFeatures):
    found = probe_features(features, protocol="paper")
    train, held, test = features.train, features.validation, features.test
    assert held is not None
    assert train.pooled is not None
    assert held.pooled is not None
    assert test.pooled is not None

    def fit(x: Tensor, y: Tensor, strength: float) -> LogisticRegression:
        return LogisticRegression(C=1 / strength, max_iter=1000).fit(x.numpy(), y.numpy())

    for strength, score in found.tried:
        assert fit(train.pooled, train.labels, strength).score(held.pooled.numpy(), held.labels.numpy()) == score
    assert max(score for _, score in found.tried) == dict(found.tried)[found.strength]
    both = fit(torch.cat([train.pooled, held.pooled]), torch.cat([train.labels, held.labels]), found.strength)
    assert found.metrics["acc1"] == pytest.approx(both.score(test.pooled.numpy(), test.labels.numpy()))
    assert found.protocol == (
        f"linear probe, paper: features before the projection, L-BFGS, at most 1000 iterations, λ = "
        f"{found.strength:.3g} by search on drawn, then fitted to train and validation"
    )


def test_openai_fits_projected_features_to_train(features: ProbeFeatures):
    found = probe_features(features, protocol="openai")
    by_hand = LogisticRegression(C=0.316, max_iter=1000).fit(
        features.train.projected.numpy(), features.train.labels.numpy()
    )
    expected = by_hand.score(features.test.projected.numpy(), features.test.labels.numpy())
    assert found.metrics["acc1"] == pytest.approx(expected)
    assert 0.5 < expected < 1
    assert (found.strength, found.tried) == (0.316, [])


def test_adamw_is_torchs_with_its_cosine(features: ProbeFeatures):
    x, y = normalize(features.train.projected, dim=-1), features.train.labels
    head = fit_adamw(x, y, 6, 1e-3, AdamWSettings(epochs=3, batch_size=16, seed=5))
    torch.manual_seed(5)
    layer = torch.nn.Linear(8, 6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * 4)
    order = torch.Generator().manual_seed(5)
    for _ in range(3):
        for rows in torch.randperm(60, generator=order).split(16):
            optimizer.zero_grad()
            cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(head.weight, layer.weight.detach())
    torch.testing.assert_close(head.bias, layer.bias.detach())


def test_clip_benchmark_searches_its_weight_decay_where_there_is_a_validation_split(features: ProbeFeatures):
    found = probe_features(features, protocol="clip_benchmark")
    assert [decay for decay, _ in found.tried][:7] == pytest.approx(np.logspace(-6, 2, 7))
    train, test = features.train.join(features.validation), features.test  # type: ignore[arg-type]
    head = fit_adamw(normalize(train.projected, dim=-1), train.labels, 6, found.strength, AdamWSettings())
    right = head.logits(normalize(test.projected, dim=-1)).argmax(1) == test.labels
    assert found.metrics["acc1"] == pytest.approx(right.double().mean().item())
    alone = probe_features(ProbeFeatures([*"abcdef"], features.train, test), protocol="clip_benchmark")
    assert (alone.strength, alone.tried) == (0.0, [])
    assert "learning rate 0.1, 10 epochs of batches of 64, seed 0, weight decay = 0" in alone.protocol


def several(split: SplitFeatures) -> SplitFeatures:
    labels = torch.nn.functional.one_hot(split.labels, 6).bool()
    labels |= labels.roll(1, dims=1) & (split.projected[:, :1] > 0)
    return SplitFeatures(split.projected, labels, None, split.name)


def test_several_labels_have_a_classifier_for_each_class(features: ProbeFeatures):
    given = ProbeFeatures([*"abcdef"], several(features.train), several(features.test))
    found = probe_features(given, protocol="openai")
    logits = np.stack(
        [
            LogisticRegression(C=0.316, max_iter=1000)
            .fit(given.train.projected.numpy(), given.train.labels[:, place].numpy())
            .decision_function(given.test.projected.numpy())
            for place in range(6)
        ],
        axis=1,
    )
    assert found.metric == "mean_average_precision"
    assert found.value == pytest.approx(average_precision_score(given.test.labels.numpy(), logits), abs=1e-6)
    assert "a classifier for each class" in found.protocol
    searched = probe_features(given, protocol="paper", metric="mean_average_precision_11")
    assert "features as they are" in searched.protocol
    assert "by search on 20% of train, held out with seed 0" in searched.protocol
    with pytest.raises(ValueError, match=r"an image may have several classes, which the protocol clip_benchmark canno"):
        probe_features(given, protocol="clip_benchmark")
    with pytest.raises(ValueError, match=r"so k images of each class cannot be drawn; leave --few-shot out"):
        probe_features(given, protocol="openai", few_shot=[1])


def test_unknown_protocol_and_metric(features: ProbeFeatures):
    with pytest.raises(ValueError, match=r"protocol is 'svm', but one of paper, openai, clip_benchmark is needed\."):
        probe_features(features, protocol="svm")
    with pytest.raises(ValueError, match=r"The metric 'bleu' is one that this task does not have: there are"):
        probe_features(features, metric="bleu")
    with pytest.raises(ValueError, match=r"has a validation split, so nothing is to be held out of train: leave --val"):
        probe_features(features, validation_part=0.1)
    with pytest.raises(ValueError, match=r"The protocol openai has a fixed strength of regularisation, so nothing is"):
        probe_features(replace(features, validation=None), protocol="openai", validation_part=0.1)
    found = probe_features(features, protocol="openai", metric="lp_mean_per_class_recall")
    assert found.value == found.metrics["mean_per_class_recall"]
