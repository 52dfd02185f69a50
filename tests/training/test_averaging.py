"""The moving average, against arithmetic done by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_clip import HfClipModel
from hf_clip.training.averaging import (
    MovingAverage,
    copy_weights,
    spans_all_steps,
    weights_swapped_in,
)
from hf_clip.training.lora import add_lora_
from hf_clip.training.optim import create_optimizer
from hf_clip.training.trainable import lock_

from .steps import changed, take_steps, weights_of


def test_copied_weights_are_not_the_models_own(model: HfClipModel):
    copied = copy_weights(model)
    model.logit_scale.data += 1
    assert copied["logit_scale"] == model.logit_scale - 1


def test_swapped_weights_come_back_even_after_an_error(model: HfClipModel):
    own = weights_of(model)
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.startswith("text_")}
    with pytest.raises(RuntimeError, match="on purpose"), weights_swapped_in(model, other):
        assert not model.text_projection.weight.any()
        assert torch.equal(model.visual_projection.weight, own["visual_projection.weight"])
        raise RuntimeError("on purpose")
    assert not changed(own, model)


class Scalar(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_moving_average_is_that_of_a_hand():
    model = Scalar(1.0)
    average = MovingAverage(model, decay=0.5)
    expected = 1.0
    # (1 + n) / (10 + n) is 2/11, 3/12, ... 9/18 = 0.5 at n = 8, and the decay from there on
    for step, decay in enumerate([2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5], start=1):
        model.weight.data.fill_(step**2)
        average.update(model)
        expected = decay * expected + (1 - decay) * step**2
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-12)
    assert average.updates == 10


def averaged(decay: float, steps: int, total_steps: int | None) -> float:
    model = Scalar(0.0)
    average = MovingAverage(model, decay, total_steps=total_steps)
    for step in range(1, steps + 1):
        model.weight.data.fill_(float(step))
        average.update(model)
    return average.weights["weight"].item()


def test_decays_differ_in_short_runs_and_are_the_usual_ones_in_long_runs():
    """The usual warm-up gives 60 steps one average for all decays from 0.88."""
    usual = {averaged(decay, 60, None) for decay in (0.9, 0.95, 0.9999)}
    assert len(usual) == 1
    found = [averaged(decay, 60, 60) for decay in (0.5, 0.8, 0.9, 0.95, 0.98)]
    assert all(later > earlier + 1 for earlier, later in zip(found[1:], found[:-1], strict=True))
    # Where the usual warm-up ends within the run, at (10 · decay - 1) / (1 - decay), nothing is changed.
    for decay, total in ((0.5, 60), (0.8, 60), (0.95, 200), (0.99, 1000)):
        assert averaged(decay, 60, total) == averaged(decay, 60, None)


def test_warm_up_of_a_short_run_ends_with_it_and_is_timms():
    """timm's ModelEmaV3.get_decay with warmup_power 1: 1 - (1 + step / gamma) ** -1, at most the decay."""
    average = MovingAverage(Scalar(0.0), 0.95, total_steps=100)
    assert average.warmup == pytest.approx(5)
    decays = [min(0.95, 1 - (1 + (n + 1) / average.warmup) ** -1) for n in range(1, 101)]
    assert decays.index(0.95) + 1 == pytest.approx(95, abs=2)
    expected = 0.0
    for step, decay in enumerate(decays, start=1):
        expected = decay * expected + (1 - decay) * step
    assert averaged(0.95, 100, 100) == pytest.approx(expected, rel=1e-9)


def test_decay_beyond_the_run_is_the_mean_of_all_steps():
    """The start counts as one step more, twice at first: its weight is 2 / (steps + 2)."""
    assert averaged(0.9999, 30, 30) == pytest.approx(sum(range(1, 31)) / 32)
    assert spans_all_steps(0.9999, 60)
    assert not spans_all_steps(0.98, 60)


def test_moving_average_follows_a_run(model: HfClipModel, tower: str):
    lock_(model, "text")
    average = MovingAverage(model, decay=0.9)
    expected = {name: tensor.double() for name, tensor in weights_of(model).items()}
    optimizer = create_optimizer(model, rates=1e-3)
    for step in (1, 2, 3):
        take_steps(model, tower, optimizer, steps=1)
        average.update(model)
        decay = (1 + step) / (10 + step)
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert average.weights.keys() == trained | statistics
    own = weights_of(model)
    with average.swapped_in(model):
        for name in average.weights:
            torch.testing.assert_close(model.state_dict()[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        assert "visual_projection.weight" in changed(own, model)
        assert not any(name.startswith("text_") for name in changed(own, model))
    assert not changed(own, model)


def test_moving_average_of_a_bfloat16_model_keeps_small_steps():
    model = Scalar(1.0).bfloat16()
    average = MovingAverage(model, decay=0.999)
    average.updates = 10_000_000
    model.weight.data.fill_(2.0)
    average.update(model)
    assert average.weights["weight"].dtype == torch.float32
    assert average.weights["weight"].item() == pytest.approx(1.001)
    with average.swapped_in(model):
        assert model.weight.dtype == torch.bfloat16


def test_moving_average_goes_on_from_its_saved_state(tmp_path: Path):
    first = Scalar(1.0)
    average = MovingAverage(first, decay=0.9)
    first.weight.data.fill_(3.0)
    average.update(first)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    resumed = MovingAverage(first, decay=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "average.pt"))
    for state in (average, resumed):
        first.weight.data.fill_(5.0)
        state.update(first)
    assert torch.equal(average.weights["weight"], resumed.weights["weight"])
    assert (resumed.decay, resumed.updates) == (0.9, 2)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_impossible_decay_is_refused(decay: float):
    with pytest.raises(ValueError, match=f"decay is {decay}, but must be between 0 and 1"):
        MovingAverage(Scalar(1.0), decay)


def test_moving_average_of_another_model_is_refused(model: HfClipModel):
    average = MovingAverage(model)
    state = average.state_dict()
    with pytest.raises(ValueError, match="saved moving average doesn't fit this run: logit_scale differs"):
        MovingAverage(Scalar(1.0)).load_state_dict(state)
    add_lora_(model, 2)
    with pytest.raises(ValueError, match="was made of other parameters: there is no .* now. Make it after all"):
        average.update(model)
    assert average.updates == 0
