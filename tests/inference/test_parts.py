"""What `optimize_for_inference` chooses, from faked processors, caches and times; and large pages."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clip import HfClipViTConfig
from hf_clip.inference import huge_pages, measure, parts
from hf_clip.inference.batches import wants_all_layers
from hf_clip.inference.cpu import Cpu
from hf_clip.inference.measure import Comparison
from hf_clip.model import attention
from hf_clip.model.attention import product_attention

MIB = 2**20
EPYC = Cpu("AMD EPYC", 2, ("avx512f", "avx512_bf16"), {1: 32 << 10, 2: MIB, 3: 32 * MIB}, {1: 1, 2: 1, 3: 2})
XEON = Cpu("Xeon", 2, ("avx512_bf16", "amx_bf16"), {1: 48 << 10, 2: 2 * MIB, 3: 260 * MIB}, {1: 1, 2: 1, 3: 1})
SILENT = Cpu("unknown", 2, (), {}, {})


@pytest.mark.parametrize(
    ("cpu", "share", "positions", "images"),
    [
        (EPYC, 16 * MIB, [1092, 546, 2184, 68], [1, 2]),
        (XEON, 16 * MIB, [1092, 546, 2184, 136], [1, 2]),  # half of an L3 that it shares with machines unseen
        (SILENT, 4 * MIB, [273, 136, 546, 64], [1, 2]),
        (Cpu("small", 4, (), {2: MIB}, {2: 4}), MIB, [68, 64, 136], [1, 2]),
    ],
    ids=["AMD", "AMX", "says nothing", "no L3"],
)
def test_sizes_start_with_what_the_caches_hold(cpu: Cpu, share: int, positions: list[int], images: list[int]):
    assert parts.largest_share(cpu) == share
    assert parts.guess_positions(768, 4, cpu) == positions  # of ViT-B in float32: 15 KiB a position
    assert parts.guess_images(4 * 64 * 56 * 56 * 4, cpu) == images  # of RN50: 3 MiB an image


def test_half_precision_takes_twice_as_much():
    assert parts.guess_positions(768, 2, EPYC)[0] == 2184
    assert parts.guess_images(4 * 64 * 56 * 56 * 2, EPYC) == [2, 1, 4]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1000: 1.0, 500: 0.95, 2000: 1.2}, 1000),  # less than a tenth faster may be chance
        ({1000: 1.0, 500: 0.85, 2000: 1.2}, 500),
        ({1000: 1.0, 500: 0.85, 2000: 0.8}, 2000),
    ],
)
def test_another_size_than_the_guess_has_to_be_clearly_faster(seconds: dict[int, float], chosen: int):
    assert parts.choose_size([1000, 500, 2000], seconds) == chosen


class Clock:
    """Time that passes only by work, as many seconds as the work says."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(parts, "time", clock)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_found", {})
    return clock


@pytest.mark.parametrize(("of_large_parts", "chosen"), [(1e-3, 1092), (5e-5, 2184)], ids=["small", "large"])
def test_parts_of_a_tower_are_those_that_were_fastest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, of_large_parts: float, chosen: int
):
    class Layer(nn.Module):
        layer_norm2 = nn.Identity()

        def mlp(self, states: torch.Tensor) -> None:
            rows = states[..., 0].numel()
            clock.now += rows * (1e-4 if rows < 2000 else of_large_parts)

    class Tower(nn.Module):
        dtype = torch.float32
        config = type("Config", (), {"hidden_size": 768})
        encoder = type("Encoder", (), {"layers": [Layer()]})

    monkeypatch.setattr(parts, "read_cpu", lambda: EPYC)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = parts.measure_positions(Tower(), 1)
    assert found.per_thread == chosen
    assert f"ms with {chosen:,}, " in found.reason
    assert found.reason.endswith("; L2 1 MiB, L3 32 MiB for 2 cores")
    monkeypatch.setattr(parts, "read_cpu", lambda: SILENT)
    assert parts.measure_positions(Tower(), 1) is found  # a process measures once


def test_shortest_times_are_compared(clock: Clock):
    times = iter([1, 1, 9, 1, 2, 3, 4, 1, *[9] * 100])
    found = measure.compare(lambda: setattr(clock, "now", clock.now + next(times)), lambda: None)
    assert found.before == 1
    assert Comparison(2.0, 1.0).pays
    assert not Comparison(1.04, 1.0).pays
    assert str(Comparison(0.003, 0.002)) == "1.50 times as fast (2 ms instead of 3)"
    mean = Comparison.mean([Comparison(1, 2), Comparison(8, 2)])
    assert mean.gain == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("account", "expected"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx512f", False),
        ("vendor_id : AuthenticAMD\nflags : avx512_bf16 amx_bf16", False),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16", False),
    ],
)
def test_attention_as_loaded_follows_the_processor(monkeypatch: pytest.MonkeyPatch, account: str, expected: bool):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: account)
    assert attention.attends_faster_by_products.__wrapped__() is expected


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"])
def test_attention_by_products(monkeypatch: pytest.MonkeyPatch, images: int, dtype: torch.dtype, most: float):
    """Also in blocks of two images."""
    torch.manual_seed(0)
    packed = torch.randn(images, 40, 3, 2, 64, dtype=dtype)
    query, key, value = packed.transpose(1, 3).unbind(2)  # (B, H, L, E), not contiguous
    expected = functional.scaled_dot_product_attention(*(part.float() for part in (query, key, value)))
    for score_bytes in (2**23, 2 * 2 * 40 * 40 * dtype.itemsize):
        monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
        found, _ = product_attention(nn.Identity(), query, key, value, None, 0.125)
        assert found.shape == (images, 40, 2, 64)
        assert (found.transpose(1, 2).float() - expected).norm() <= most * expected.norm()


def test_products_are_used_without_gradients_and_masks_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "attends_faster_by_products", lambda: True)
    long, short = (torch.zeros(1, length, 8, dtype=torch.bfloat16) for length in (40, 10))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    assert not attention._prefers_products(long, None)  # gradients are wanted
    with torch.no_grad():
        assert attention._prefers_products(long, None)
        for query, attention_mask in ((long.float(), None), (short, None), (long, mask)):
            assert not attention._prefers_products(query, attention_mask)


def test_dropout_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "attends_faster_by_products", lambda: True)
    config = HfClipViTConfig(hidden_size=64, num_attention_heads=1, attention_dropout=0.5, attn_implementation="sdpa")
    layer = attention.HfClipAttention(config, is_causal=False).to(torch.bfloat16)
    states = torch.randn(1, 40, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert not torch.equal(layer.train()(states)[0], layer(states)[0])
        assert torch.equal(layer.eval()(states)[0], layer(states)[0])


def test_large_pages_are_those_that_hold_the_weights():
    huge = huge_pages.HUGE
    assert huge_pages.pages_of([(5, 7), (huge - 1, huge + 1), (4 * huge, 5 * huge)]) == [0, huge, 4 * huge]
    assert huge_pages.pages_of([]) == []


def test_large_pages_are_asked_for_where_the_system_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    setting = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    assert not huge_pages.are_allowed()
    for text, allowed in (("always [madvise] never\n", True), ("always madvise [never]\n", False)):
        setting.write_text(text)
        assert huge_pages.are_allowed() is allowed
    assert huge_pages.use_huge_pages(nn.Linear(2, 2)) == []  # asked for, but nothing was reordered


def test_outputs_of_all_layers_are_wanted_by_an_argument_or_else_by_the_configuration():
    tower = nn.Identity()
    for default in (False, True):
        tower.config = HfClipViTConfig(output_hidden_states=default)  # type: ignore[assignment]
        assert wants_all_layers(tower, {}) is default
        assert wants_all_layers(tower, {"output_hidden_states": None}) is default
        assert not wants_all_layers(tower, {"output_hidden_states": False})
        assert wants_all_layers(tower, {"output_attentions": True})
