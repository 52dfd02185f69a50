"""Few-shot probes: the draws, what is held out, and LP++."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, normalize

from hf_clip.evaluation import lp_plus_plus
from hf_clip.evaluation.few_shot import LP_PLUS_PLUS, PROBE, draw_shots, hold_out
from hf_clip.evaluation.linear_probe import probe_features
from hf_clip.evaluation.lp_plus_plus import (
    first_alpha,
    fit_lp_plus_plus,
    step_size_of_alpha,
    step_size_of_weight,
)
from hf_clip.evaluation.split_features import ProbeFeatures

from .test_probe_protocols import clouds


@pytest.fixture(scope="module")
def features() -> ProbeFeatures:
    """With texts in the directions of the classes' centres. Tests must not change them."""
    centres = torch.randn(6, 8, generator=torch.Generator().manual_seed(99))
    made = ProbeFeatures([*"abcdef"], clouds(60, 0), clouds(120, 1), clouds(36, 2))
    return replace(made, texts=normalize(centres, dim=-1), prompts="1 template")


def test_draws_are_of_each_class_and_contain_one_another():
    labels = torch.arange(40) % 4
    few, more = draw_shots(labels, 2, 4, seed=7), draw_shots(labels, 5, 4, seed=7)
    assert labels[few].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(few.tolist()) < set(more.tolist())
    assert few.tolist() == draw_shots(labels, 2, 4, seed=7).tolist()
    assert few.tolist() != draw_shots(labels, 2, 4, seed=8).tolist()
    assert len(draw_shots(labels, 99, 4, seed=0)) == 40


def test_part_of_each_class_is_held_out():
    split = clouds(60, 0)
    train, held = hold_out(split, 0.2, seed=1)
    assert held.labels.bincount().tolist() == [2] * 6
    assert train.labels.bincount().tolist() == [8] * 6
    whole = torch.cat([train.projected, held.projected])
    assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, split.projected.tolist()))
    assert torch.equal(hold_out(split, 0.2, seed=1)[1].projected, held.projected)
    assert not torch.equal(hold_out(split, 0.2, seed=2)[1].projected, held.projected)
    single = split.take(torch.tensor([0, 1, 2, 3, 4, 5, 6]))  # two images of the first class alone
    assert hold_out(single, 0.2, seed=0)[1].labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"No class of train has two images, so none can be held out for validation"):
        hold_out(split.take(torch.arange(6)), 0.2, seed=0)
    with pytest.raises(ValueError, match=r"held out for validation is 1\.5, but must lie between 0 and 1"):
        hold_out(split, 1.5, seed=0)


def test_figures_are_those_of_probes_by_hand(features: ProbeFeatures):
    found = probe_features(features, protocol="openai", few_shot=[4, 1], draws=3, seed=10, lp_plus_plus=True)
    expected = []
    for seed in (10, 11, 12):
        rows = draw_shots(features.train.labels, 4, 6, seed)
        x, y = features.train.projected[rows].numpy(), features.train.labels[rows].numpy()
        by_hand = LogisticRegression(C=0.316, max_iter=1000).fit(x, y)
        expected.append(by_hand.score(features.test.projected.numpy(), features.test.labels.numpy()))
    assert [(row.shots, row.head) for row in found.few_shot] == [
        (1, PROBE), (1, LP_PLUS_PLUS), (4, PROBE), (4, LP_PLUS_PLUS)
    ]  # fmt: skip
    four = found.few_shot[2]
    assert four.values == pytest.approx(expected)
    assert four.mean == pytest.approx(np.mean(expected))
    assert four.spread == pytest.approx(np.std(expected, ddof=1))
    # Texts that point to the classes help where images are few.
    assert found.few_shot[1].mean > found.few_shot[0].mean + 0.1
    assert found.protocol.endswith(
        "C = 0.316; few-shot: mean and standard deviation of 3 draws, seeds 10 to 12; LP++ with 1 template, step "
        "chosen on as many images of each class of drawn"
    )
    assert probe_features(features, protocol="openai").metrics == found.metrics
    # Texts and features of any length are made as long as one.
    assert features.texts is not None
    longer = replace(features, texts=features.texts * 1e25)
    again = probe_features(longer, protocol="openai", few_shot=[4], draws=3, seed=10, lp_plus_plus=True)
    assert again.few_shot[1].values == pytest.approx(found.few_shot[3].values)


def test_step_sizes_are_the_lipschitz_constants(features: ProbeFeatures):
    x = normalize(features.train.projected, dim=-1)
    assert features.texts is not None
    similarities = x @ features.texts.T
    largest = np.linalg.eigvalsh((x.T @ x).numpy()).max()
    assert step_size_of_weight(x) == pytest.approx(4 * 60 / largest, rel=1e-5)
    sums = [sum(value**2 for value in column) for column in similarities.T.tolist()]
    assert step_size_of_alpha(similarities) == pytest.approx(60 / (4 * max(sums)), rel=1e-5)
    # Two shots of class 0 and one of class 1: means (0.2, 0.4) and (0.6, 0), of which the mean is 0.3.
    assert first_alpha(torch.tensor([[0.1, 0.3], [0.3, 0.5], [0.6, 0.0]]), torch.tensor([0, 0, 1])) == pytest.approx(75)


def test_lp_plus_plus_is_gradient_descent_with_momentum(features: ProbeFeatures, monkeypatch: pytest.MonkeyPatch):
    """As torch computes it."""
    monkeypatch.setattr(lp_plus_plus, "STEPS", 25)
    assert features.texts is not None
    rows = draw_shots(features.train.labels, 3, 6, seed=0)
    x, y = normalize(features.train.projected[rows], dim=-1), features.train.labels[rows]
    similarities = x @ features.texts.T
    weight = torch.nn.functional.one_hot(y, 6).float().T @ x
    bias, alpha = torch.zeros(6), torch.full((6,), first_alpha(similarities, y))
    first = cross_entropy(x @ weight.T + alpha * similarities, y)
    for tensor in (weight, bias, alpha):
        tensor.requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=step_size_of_weight(x), momentum=0.9)
    for step in range(1, 26):
        optimizer.zero_grad()
        alpha.grad = None
        loss = cross_entropy(x @ weight.T + bias + alpha * similarities, y)
        loss.backward()
        optimizer.step()
        if step % 10 == 0 and alpha.grad is not None:
            alpha.data -= step_size_of_alpha(similarities) * alpha.grad
    head = fit_lp_plus_plus(x, y, features.texts)
    assert head.step == 25
    assert loss < first / 2
    for found, expected in ((head.weight, weight), (head.bias, bias), (head.alpha, alpha)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_lp_plus_plus_takes_the_best_step_on_validation(features: ProbeFeatures):
    assert features.texts is not None
    rows = draw_shots(features.train.labels, 3, 6, seed=0)
    x, y = normalize(features.train.projected[rows], dim=-1), features.train.labels[rows]
    seen = normalize(features.test.projected, dim=-1), features.test.labels
    best, last = fit_lp_plus_plus(x, y, features.texts, seen), fit_lp_plus_plus(x, y, features.texts)

    def right(head: lp_plus_plus.BlendedHead) -> int:
        return int((head.logits(seen[0]).argmax(1) == seen[1]).sum())

    assert right(best) > right(last)
    assert last.step == lp_plus_plus.STEPS


def test_what_cannot_be_drawn(features: ProbeFeatures):
    with pytest.raises(
        ValueError, match=r"has 10 images of class 'a' to fit to, but 16 shots of each class were asked for: --few-s"
    ):
        probe_features(features, protocol="openai", few_shot=[1, 4, 16])
    with pytest.raises(ValueError, match=r"LP\+\+ is a few-shot classifier: say how many images of each class"):
        probe_features(features, protocol="openai", lp_plus_plus=True)
    with pytest.raises(ValueError, match=r"There are 0 draws of 1 shots, but at least one of each is needed"):
        probe_features(features, protocol="openai", few_shot=[1], draws=0)
    with pytest.raises(ValueError, match=r"has no features of the classes' prompts, which LP\+\+ needs: write the fil"):
        probe_features(replace(features, texts=None), protocol="openai", few_shot=[1], lp_plus_plus=True)
    with pytest.raises(ValueError, match=r"but 99999999999999999999999 shots of each class were asked for: leave"):
        probe_features(features, protocol="openai", few_shot=[10**23 - 1])
    empty = replace(features.test, projected=features.test.projected * (torch.arange(120) != 7)[:, None])
    with pytest.raises(ValueError, match=r"row 7 of the features of 'test' is zero, so it has no direction"):
        probe_features(replace(features, test=empty), protocol="openai", few_shot=[1], lp_plus_plus=True)
    for seed in (-1, 2**70):
        with pytest.raises(ValueError, match=rf"The seed is {seed}, but a whole number from 0 to 4,294,967,295 is nee"):
            probe_features(features, seed=seed)


def test_texts_that_no_shot_is_similar_to_leave_the_images():
    """α has no gradient then."""
    x = torch.eye(4)[[0, 0, 1, 1]]
    head = fit_lp_plus_plus(x, torch.tensor([0, 0, 1, 1]), torch.eye(4)[[2, 3]])
    assert head.alpha.tolist() == [0, 0]
    assert head.logits(x).argmax(1).tolist() == [0, 0, 1, 1]
