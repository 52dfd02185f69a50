"""The benchmarks as programs: who takes part, what is refused, what is written. No test asserts a time."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    encoders,
    image_processor,
    load,
    loader,
    loss,
    measuring,
    pages,
    peers,
    ratio_chart,
    reporting,
    text_encoder,
    train_step,
)
from benchmarks.__main__ import SUBCOMMANDS, main
from benchmarks.ceiling import as_convolution, measure_ceiling, text_flops
from benchmarks.measuring import Contender, LeftOutError, Row, Table, agrees_with, compare, run_alone
from benchmarks.settings import Settings
from hf_clip import VARIANTS, HfClipImageProcessor, HfClipProcessor, HfClipTokenizer, Variant
from hf_clip.model.variants import get_variant

TINY = {"embed_dim": 32, "text_width": 64, "text_heads": 1, "image_gflops": 0.01, "image_size": 64}
TOWERS = {
    "vit": TINY | {"vision_layers": 2, "vision_width": 64, "vision_heads": 1, "patch_size": 32},
    "resnet": TINY | {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_heads": 4, "patch_size": None},
}


@pytest.fixture
def variant(tower: str, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """A tenth model, which is tiny."""
    row = replace(get_variant("ViT-B/32"), name=f"tiny {tower}", **TOWERS[tower])
    monkeypatch.setitem(VARIANTS, row.name, row)
    return row


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> Variant:
    row = replace(get_variant("ViT-B/32"), name="tiny vit", **TOWERS["vit"])
    monkeypatch.setitem(VARIANTS, row.name, row)
    return row


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WARM_UP_CALLS", 1)
    monkeypatch.setattr(measuring, "TURN_SECONDS", 0.0)


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def tiny_settings(*variants: Variant, **changes) -> Settings:
    names = tuple(variant.name for variant in variants) or None
    settings = Settings(quick=True, threads=torch.get_num_threads(), rounds=1, variants=names, batches=(2,), prompts=6)
    return replace(settings, is_memory_measured=False, measure_ceiling=lambda device, precision: 1e11, **changes)


def names_of(table: Table) -> list[str]:
    return [row.name for row in table.rows]


def features(value: float = 1.0) -> torch.Tensor:
    return torch.full((2, 3), value)


# The measuring core


def test_contender_with_a_wrong_row_is_left_out_with_its_error():
    wrong = features()
    wrong[1] *= 1.01  # one row of two, by one per cent
    check = agrees_with(features(), "float32")
    contenders = [
        Contender("hf_clip", features, 2, "float32", check),
        Contender("peer", lambda: wrong, 2, "float32", check),
        Contender("nan", lambda: features(torch.nan), 2, "float32", check),
        Contender("shape", lambda: features()[:1], 2, "float32", check),
    ]
    table = compare(Table("title", "rows"), contenders, rounds=2)
    assert names_of(table) == ["hf_clip"]
    assert table.left_out == [
        "peer is left out: its output is 1.0e-02 off, where float32 allows 1e-04",
        "nan is left out: its output is inf off, where float32 allows 1e-04",
        "shape is left out: its output is inf off, where float32 allows 1e-04",
    ]


def test_rounding_that_a_precision_allows_is_no_error():
    for precision, allowed, refused in (("bf16", 1.01, 1.1), ("fp16", 1.005, 1.02)):
        check = agrees_with(features(), precision)
        assert check(features(allowed)) is None
        assert check(features(refused)) is not None


def test_who_fails_is_left_out_and_what_is_ours_makes_the_table_a_failure():
    def fail() -> None:
        raise RuntimeError("no such instruction\nand much more")

    ours, peer = Contender("hf_clip", lambda: None, 1), Contender("peer", fail, 1)
    table = compare(Table("title", "calls"), [ours, peer], rounds=1)
    assert table.left_out == ["peer is left out: RuntimeError: no such instruction"]
    assert not table.lacks_ours
    table = compare(Table("title", "calls"), [ours, Contender("hf_clip, compiled", fail, 1)], rounds=1)
    assert table.left_out == ["hf_clip, compiled is left out: RuntimeError: no such instruction"]
    assert names_of(table) == ["hf_clip"]
    assert table.lacks_ours
    assert compare(Table("title", "calls"), [peer], rounds=1).lacks_ours


def test_everyone_has_a_turn_in_every_round():
    calls: list[str] = []
    contenders = [Contender(name, lambda name=name: calls.append(name), 1) for name in "abc"]  # type: ignore[misc]
    table = compare(Table("title", "calls"), contenders, rounds=4)
    assert calls[:6] == [*"aabbcc"]  # a first call and a warm-up each, then the rounds, in orders of their own
    rounds = [tuple(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert [sorted(turns) for turns in rounds] == [[*"abc"]] * 4
    assert len(set(rounds)) > 1
    assert [len(row.seconds) for row in table.rows] == [4, 4, 4]


def test_time_that_is_used_up_ends_the_rounds_after_the_third():
    table = compare(Table("title", "calls"), [Contender("peer", lambda: None, 1)], rounds=9, seconds=0.0)
    assert len(table.rows[0].seconds) == 3


def example_table() -> Table:
    rows = [
        Row("hf_clip", "float32", 16, [0.5, 0.4, 0.5], flops=16e9, ceiling=64e9, peak_memory=1_500_000_000),
        Row("hf_clip, optimized", "float32", 16, [0.25]),
        Row("openai-clip", "float32", 16, [1.0, 1.0, 9.0], flops=16e9, ceiling=64e9),
    ]
    return Table("ViT-B/32", "images", rows, ours=("hf_clip", "hf_clip, optimized"), left_out=["peer is left out: …"])


def test_ratios_and_fraction_come_from_medians():
    table = example_table()
    first, second, peer = table.rows
    assert peer.per_second == 16
    assert table.ratios(peer) == {"hf_clip": 2.0, "hf_clip, optimized": 4.0}
    assert table.ratios(second) == {"hf_clip": 0.5}
    assert first.fraction_of_ceiling == 0.5
    assert second.fraction_of_ceiling is None
    assert reporting.bars_of(table) == [("openai-clip", {"hf_clip": 2.0, "hf_clip, optimized": 4.0})]


def test_chart_has_a_row_for_each_table_with_peers_and_names_every_peer(tmp_path: Path):
    alone = Table("alone", "images", [Row("hf_clip", "float32", 1, [1.0])])
    tables = [example_table(), alone]
    assert ratio_chart.ratios_of(tables) == [("ViT-B/32", {"openai-clip": (2.0, 4.0)})]
    rows = [(f"batch {size}", {"openai-clip": (2.0, 4.0), "open_clip": (2.0, 4.0)}) for size in (1, 2, 3)]
    rows.append(("captions", {"a rare peer": (0.8, 0.8)}))
    ratio_chart.draw_ratios(tmp_path / "ratios.svg", rows, "a machine")
    drawn = (tmp_path / "ratios.svg").read_text()
    words = [
        "batch 3",
        "captions",
        "than openai-clip",
        "than open_clip",
        "a rare peer",
        "hollow: hf_clip as it is loaded",
    ]
    assert [word for word in words if f"<!-- {word} -->" not in drawn] == []


def test_table_shows_the_columns_that_have_values():
    assert reporting.format_table(example_table()).splitlines() == [
        "",
        "ViT-B/32: images",
        "                    precision  per second  hf_clip is  optimized is  of ceiling  peak memory",
        "hf_clip               float32        32.0                2.00 times        0.50      1.50 GB",
        "hf_clip, optimized    float32        64.0  0.50 times",
        "openai-clip           float32        16.0  2.00 times    4.00 times        0.25",
        "peer is left out: …",
    ]
    plain = Table("captions", "captions", [Row("hf_clip", "", 1, [0.5])])
    assert reporting.format_table(plain).splitlines()[2].split() == ["per", "second"]


@pytest.mark.slow
def test_process_of_its_own_returns_its_result_or_its_last_words():
    assert run_alone(text_flops_of, name="ViT-B/32", lengths=[77]) == text_flops(get_variant("ViT-B/32"), [77])
    with pytest.raises(LeftOutError, match="Unknown CLIP variant 'ViT-B/33'"):
        run_alone(text_flops_of, name="ViT-B/33", lengths=[77])


def text_flops_of(name: str, lengths: list[int]) -> float:
    return text_flops(get_variant(name), lengths)


@pytest.mark.parametrize(("name", "gflops"), [("ViT-B/32", 5.96), ("RN50x4", 9.27), ("ViT-L/14", 13.30)])
def test_text_flops_are_those_of_full_texts_as_measured_elsewhere(name: str, gflops: float):
    assert text_flops(get_variant(name), [77]) / 1e9 == pytest.approx(gflops, abs=0.01)
    assert text_flops(get_variant(name), [7, 9]) < text_flops(get_variant(name), [77]) / 4


def test_ceiling_multiplies_in_both_ways(monkeypatch: pytest.MonkeyPatch):
    rows, weight = torch.randn(32, 5), torch.randn(3, 5)
    product = as_convolution(rows, weight).permute(0, 2, 3, 1).reshape(32, 3)
    assert torch.allclose(product, rows @ weight.T, atol=1e-6)
    monkeypatch.setitem(import_module("benchmarks.ceiling").SHAPES, "cpu", [(64, 32, 16)])
    assert measure_ceiling("cpu", "bf16") > 0


# Each subcommand, with settings of seconds


def test_image_encoders_agree_and_absent_engines_are_named(variant: Variant, no_engines: None):
    (table,) = import_module("benchmarks.image_encoder").run(tiny_settings(variant, precisions=("float32",)))
    expected = ["hf_clip", "hf_clip, optimized", "openai-clip", "transformers", "open_clip"]
    assert names_of(table) == [name for name in expected if name != "transformers" or variant.patch_size]
    assert table.title == f"{variant.name}, float32, batch 2"
    assert "OpenVINO is left out: it is not installed (pip install openvino)" in table.left_out
    install = "ONNX Runtime is left out: onnx is not installed (pip install onnx onnxscript onnxruntime)"
    assert install in table.left_out
    assert ("transformers is left out: it has no ResNets" in table.left_out) == (variant.patch_size is None)
    assert all(row.fraction_of_ceiling for row in table.rows)


def test_image_encoders_in_bf16_stand_beside_the_float32_reference(vit: Variant, no_engines: None):
    (table,) = import_module("benchmarks.image_encoder").run(tiny_settings(vit, precisions=("bf16",)))
    assert {"hf_clip", "hf_clip, optimized", "openai-clip", "openai-clip, float32"} <= set(names_of(table))
    assert [row.precision for row in table.rows if row.name == "openai-clip, float32"] == ["float32"]


@pytest.mark.slow  # exports and compiles, a minute each
def test_engines_agree_where_they_are_installed(variant: Variant):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tables = [
        table
        for name in ("image_encoder", "text_encoder")
        for table in import_module(f"benchmarks.{name}").run(tiny_settings(variant, precisions=("float32",)))
        if variant.patch_size or name == "image_encoder"
    ]
    for table in tables:
        assert {"OpenVINO", "ONNX Runtime"} <= set(names_of(table)), table.left_out


def test_text_encoders_take_prompts_as_each_project_pads_them(vit: Variant, no_engines: None, tokenizer):
    many, alone = text_encoder.run(tiny_settings(vit, precisions=("float32",)))
    assert many.title == "tiny vit, float32, 6 prompts of 5 to 20 tokens"
    ours = {"hf_clip", "hf_clip, optimized", "hf_clip, ZeroShotClassifier"}
    assert ours | {"openai-clip", "transformers"} <= set(names_of(many))
    assert [row.amount for row in alone.rows] == [1] * len(alone.rows)
    prompts = text_encoder.make_prompts(40, tokenizer)
    lengths = [len(ids) for ids in tokenizer(prompts, padding=False)["input_ids"]]
    assert len(set(prompts)) == 40
    assert min(lengths) >= 5
    assert max(lengths) <= 20
    assert lengths != sorted(lengths)


@pytest.mark.slow
def test_encoder_with_a_wrong_output_is_no_row(vit: Variant, no_engines: None, monkeypatch: pytest.MonkeyPatch, capsys):
    right = peers.BUILDERS["transformers"]
    broken: Callable = lambda case: lambda batch: right(case)(batch) * 1.01  # noqa: E731
    monkeypatch.setitem(peers.BUILDERS, "transformers", broken)
    options = ["--quick", "--batch", "2", "--rounds", "1", "--precision", "float32", "--variants", "tiny vit"]
    monkeypatch.setattr(import_module("benchmarks.__main__"), "Settings", fixed_ceiling)
    assert main(["image_encoder", *options]) == 0
    printed = capsys.readouterr().out
    assert "transformers is left out: its output is 1.0e-02 off, where float32 allows 1e-04" in printed
    assert not any(line.startswith("transformers ") and "float32  " in line for line in printed.splitlines())
    monkeypatch.setitem(peers.BUILDERS, "hf_clip", broken)
    assert main(["image_encoder", *options]) == 1, "a table without ours is a failure"


def fixed_ceiling(**settings) -> Settings:
    return Settings(**settings, measure_ceiling=lambda device, precision: 1e11)


def test_rows_of_a_gpu_run_the_same_code_on_a_cpu(
    vit: Variant, no_engines: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoders, "ON_CPU", [name for name in peers.ON_GPU if "compiled" not in name])
    (table,) = import_module("benchmarks.image_encoder").run(tiny_settings(vit, precisions=("bf16",)))
    assert {"hf_clip, without flash", "transformers, without flash"} <= set(names_of(table))
    image = image_processor.photograph((64, 48))
    ours = HfClipImageProcessor.for_image_size(32)
    table = image_processor.on_device(ours, image, "cpu", tiny_settings(), rounds=1)
    assert names_of(table) == ["hf_clip, on the device", "hf_clip, copied there", "Pillow, on the CPU"]


@pytest.mark.slow
def test_loaders_are_measured_by_workers_and_wrong_pixels_are_no_row(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"SIZE": (64, 48), "QUICK_ROWS": 12, "QUICK_BATCHES": 1, "ON_A_GPU": 4}.items():
        monkeypatch.setattr(loader, name, value)
    settings = tiny_settings(threads=1)
    plain, augmented = loader.run(settings)
    assert names_of(plain) == names_of(augmented) == [loader.OURS, loader.ON_DEVICE, loader.PEER]
    assert all(len(row.seconds) == 1 and row.amount == 2 for row in [*plain.rows, *augmented.rows])
    monkeypatch.setattr(loader, "find_difference", lambda *given: "hf_clip is left out: its pixels are 1 off")
    monkeypatch.setattr(loader, "seconds_of_a_batch", lambda *given: 1.0)
    plain, augmented = loader.run(settings)
    assert plain.lacks_ours
    assert not augmented.lacks_ours
    processor = HfClipProcessor(HfClipImageProcessor(), HfClipTokenizer.from_vocabulary_file(vocabulary))
    table = loader.on_gpu(loader.write_pairs(tmp_path, 4), processor, "cpu", settings)
    assert names_of(table) == [loader.ON_DEVICE, loader.OURS]


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(vit: Variant):
    if measuring.memory_of_this_process("VmHWM") is None:
        pytest.skip("this system has no such account")
    batch = {"pixel_values": torch.randn(2, 3, 64, 64)}
    with peers.weights_folder(vit) as folder:
        found = encoders.peak_memories(["hf_clip"], peers.Case(vit, folder, "image"), batch)
    assert found["hf_clip"] > 50e6


@pytest.mark.slow
def test_loading_is_measured_in_fresh_processes(vit: Variant):
    with load.twin_folders(vit) as folders:
        load.halve_matrices(folders)
        assert (folders["hf_clip"] / load.WEIGHTS).stat().st_nlink == 2
        found = {name: load.load_alone(name, str(folder), 1) for name, folder in folders.items()}
        assert found["hf_clip"]["checksum"] == pytest.approx(found["transformers"]["checksum"])
        table = load.loading({"hf_clip": folders["hf_clip"]}, "title", rounds=1, threads=1)
    assert names_of(table) == ["hf_clip"]
    assert "hf_clip: anonymous memory added" in table.notes[0]


@pytest.mark.slow
def test_first_image_gets_the_same_scores_from_both_repositories(vit: Variant, tmp_path: Path):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(image)
    with load.twin_folders(vit) as folders:
        load.write_processors(folders, vit.image_size)
        scores = {name: load.classify_in_fresh_process(name, folder, image, 1) for name, folder in folders.items()}
        load.export_towers(folders["hf_clip"])
        for options in load.COMMANDS.values():
            found = load.classify_by_command(options, folders["hf_clip"], image, 1)
            assert load.same_scores(scores["transformers"], 0.05)(found) is None
    assert load.same_scores(scores["transformers"])(scores["hf_clip"]) is None
    assert load.same_scores([0.4, 0.6])([0.5, 0.5]) == "its scores are [0.5, 0.5], not [0.4, 0.6]"


def test_training_steps_have_the_same_loss(vit: Variant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_step, "VARIANT", vit.name)
    (table,) = train_step.run(tiny_settings(precisions=("float32",)))
    assert names_of(table) == ["hf_clip", "transformers", "open_clip"]
    expected: list[float] = []
    assert train_step.same_losses(lambda: 1.5, expected, "float32")(2.0) is None
    check = train_step.same_losses(lambda: 1.6, expected, "float32")
    assert check(2.1) == "after 0 updates its loss is 2.1000, where hf_clip has 2.0000"
    assert check(2.0) == "after 1 updates its loss is 1.6000, where hf_clip has 1.5000"


def test_steps_by_micro_batches_have_the_same_loss_and_memory_is_compared(
    vit: Variant, monkeypatch: pytest.MonkeyPatch
):
    module = import_module("benchmarks.gradient_caching")
    for where in (module, train_step):
        monkeypatch.setattr(where, "VARIANT", vit.name)
    settings = replace(tiny_settings(precisions=("float32",)), batches=(8,), is_memory_measured=True)
    taken = iter([[2.0, 300_000_000], [9.0, 310_000_000], [2.0, 3_000_000_000], [9.0, 3_020_000_000]])
    monkeypatch.setattr(module, "run_alone", lambda function, **arguments: next(taken))
    timed, memory, of_full_size = module.run(settings)
    assert names_of(timed) == ["hf_clip, 8 pairs by 2", "8 pairs at once", "2 pairs at once"]
    assert not timed.lacks_ours
    assert names_of(memory) == ["hf_clip, 256 pairs by 64", "hf_clip, 1,024 pairs by 64"]
    assert memory.notes == ["1,024 pairs take 10 MB more than 256, of which 3 MB are their embeddings"]
    assert names_of(of_full_size) == ["hf_clip, 256 pairs by 32", "hf_clip, 1,024 pairs by 32"]
    assert of_full_size.notes == ["1,024 pairs take 20 MB more than 256, of which 3 MB are their embeddings"]
    pairs = module.RandomPairs(module.config_of(module.SMALL_MODEL), 70, 64)
    assert [len(part["input_ids"]) for part in pairs] == [64, 6]
    assert all(
        torch.equal(*parts)
        for first, second in zip(pairs, pairs, strict=True)
        for parts in [(first["pixel_values"], second["pixel_values"])]
    )
    seconds, used = module.step_alone(module.SMALL_MODEL, 4, 2, "float32", torch.get_num_threads(), "cpu")
    assert seconds > 0
    assert used is None or used > -(1 << 20)  # Linux counts pages in batches, so that the most may be some less later


def test_steps_from_stored_features_have_the_same_loss():
    module = import_module("benchmarks.locked_towers")
    (table,) = module.run(replace(tiny_settings(), batches=(64,)))
    assert names_of(table) == ["hf_clip, stored features", "towers in memory"]
    assert not table.lacks_ours
    check = module.same_losses()
    assert check(2.0) is None
    assert check(2.1) == "its loss is 2.1000, where the other has 2.0000"


def test_losses_agree_and_their_curves_are_drawn(tmp_path: Path):
    tables = list(loss.run(replace(tiny_settings(), batches=(40, 50))))
    assert [table.title for table in tables] == [
        *(f"contrastive loss, {kind}, {pairs} pairs" for kind in ("softmax", "sigmoid") for pairs in (40, 50)),
    ]
    for table in tables:
        assert names_of(table) == ["hf_clip", "plain"]
        assert [line.split(" is left out")[0] for line in table.left_out] == ["memeff", "inf_cl"]
    assert loss.memory_alone("hf_clip", "softmax", 64, torch.get_num_threads()) is not None
    check = loss.same_values([])
    assert check([1.0, 2.0]) is None
    assert check([1.0, float("nan")]) == "its gradient of the scale is nan, where hf_clip has 2"
    assert loss.same_values([1.0, 2.0], "memeff")([1.001, float("nan")]) is None  # which has no such gradient
    facts = {"machine": {"processor": "any"}, "threads": 1, "date": "2026-01-01"}
    loss.draw(tmp_path / "curves.svg", facts, tables)
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(LeftOutError, match="its logits take .* GB and more, of"):
        loss.check_fit("plain", "softmax", 2**20, "cpu")


def test_zero_shot_answers_agree(vit: Variant, monkeypatch: pytest.MonkeyPatch):
    module = import_module("benchmarks.zero_shot")
    for name, value in (("QUICK_IMAGES", 2), ("LABELS", 3), ("QUICK_CLASSES", 4), ("CLASSES_BY_RECIPE", 2)):
        monkeypatch.setattr(module, name, value)
    pipeline, classifier = module.run(tiny_settings(vit))
    assert names_of(pipeline) == ["hf_clip, first call", "hf_clip, labels known", "stock, batch 1", "stock, batch 8"]
    assert names_of(classifier) == ["hf_clip", "OpenAI's recipe"]


def test_tables_of_zero_shot_figures_agree(vit: Variant, monkeypatch: pytest.MonkeyPatch):
    module = import_module("benchmarks.evaluate")
    for name, value in (("QUICK_IMAGES", 12), ("ONE_BY_ONE", 2), ("SIZE", (64, 48))):
        monkeypatch.setattr(module, name, value)
    (table,) = module.run(tiny_settings(vit))
    peers_of_ours = ["transformers, batches of 32", "transformers, one by one"]
    assert names_of(table) == ["hf_clip", "hf_clip, optimized", *peers_of_ours], table.left_out
    assert [row.amount for row in table.rows] == [12, 12, 12, 2]


def test_ranks_of_retrieval_agree(monkeypatch: pytest.MonkeyPatch):
    module = import_module("benchmarks.retrieval")
    for name, value in (("QUICK_IMAGES", 40), ("QUICK_TEXTS", 120), ("WIDTH", 16)):
        monkeypatch.setattr(module, name, value)
    (table,) = module.run(tiny_settings())
    assert names_of(table) == ["hf_clip", "whole matrix"], table.left_out
    broken = module.rank_by_whole_matrix(**module.embeddings(40, 120))
    broken[1][:2] += 1
    assert (
        module.same_ranks(module.rank_both_ways(**module.embeddings(40, 120)))(broken)
        == "1.25% of its ranks are others"
    )


@contextmanager
def served_here(folder: Path, threads: int) -> Iterator[tuple[str, int]]:
    """The server in a thread of this process, which takes no time to start."""
    uvicorn = pytest.importorskip("uvicorn")
    from hf_clip.serve.served_model import load_served
    from hf_clip.serve.web_app import build_app
    from hf_clip.taken_port import take_port

    bound = take_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(load_served(str(folder), ["model"])), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield bound.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@contextmanager
def direct_here(folder: Path, threads: int) -> Iterator[Any]:
    """Direct calls in this process."""
    yield import_module("benchmarks.serve.direct_call").DirectHere(str(folder))


def test_servers_are_checked_and_loaded(digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    program = import_module("benchmarks.serve.__main__")
    monkeypatch.setattr(program, "hf_clip_server", served_here)
    monkeypatch.setattr(program, "direct_process", direct_here)
    monkeypatch.setattr(program, "LEAST_PASSES", 1)
    for name in ("TEXTS", "IMAGES"):
        monkeypatch.setattr(import_module("benchmarks.serve.sent_items"), name, 4)
    given = ["--model", str(digits / "vit"), "--clients", "2", "--seconds", "0.2"]
    threads = torch.get_num_threads()
    assert program.main([*given, "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in rows if row[0] == "hf_clip"] == [["hf_clip", "1"], ["hf_clip", "2"]] * 2
    assert all(float(cell) > 0 for row in rows if row[0] == "hf_clip" for cell in (row[2], row[4], row[5]))
    assert all(float(cell) > 0 for row in rows if row[:2] == ["hf_clip", "1"] for cell in row[6:])
    assert "infinity is left out: name the Python that has it with --infinity" in printed

    with served_here(digits / "vit", 1) as (host, port):
        message = r"RuntimeError: the server answered 404: .*The model 'other' is not served here"
        with pytest.raises(LeftOutError, match=message):
            program.load_with(host, port, [b'{"model": "other", "input": "x"}'], 1, threads, seconds=0.1)
        answered = program.load_with(host, port, program.make_bodies("text"), 3, threads, answers=7)
        assert len(answered["latencies"]) == 7
        assert answered["seconds"] == pytest.approx(sum(answered["latencies"]) / 3)
        found = program.ask_once(host, port, program.make_bodies("text")[0])
    program.check_features("hf_clip", "text", found, found.tolist())
    with pytest.raises(LeftOutError, match="its embedding of the text has a cosine similarity of 0.0000 with a direct"):
        program.check_features("infinity", "text", found, [0.0] * len(found))


def test_memory_of_a_server_is_read_while_it_answers_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    program = import_module("benchmarks.serve.memory")

    @contextmanager
    def process_here(folder: Path, threads: int) -> Iterator[tuple[int, str, int]]:
        with served_here(folder, threads) as (host, port):
            yield os.getpid(), host, port

    monkeypatch.setattr(program, "hf_clip_process", process_here)
    given = ["--requests", "160", "--every", "40"]
    assert program.main(given) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["0", "40", "80", "120", "160"]
    assert all(float(own) <= float(whole) for _, _, whole, own in rows[2:])
    assert all(name in printed for name in ("new labels", "bad bodies", "bad images", "forms", "whose client left"))

    monkeypatch.setattr(program.MixedRequests, "texts", lambda self: program.Sent("texts", "/v1/embeddings", b"{}"))
    assert program.main(given) == 1
    assert re.match(r"error: LeftOutError: after \d+ requests, texts: 400, not 200: ", capsys.readouterr().err)


def test_slope_is_that_of_the_second_half():
    program = import_module("benchmarks.serve.memory")
    owns = [0, 5000, 9000, 9000, 9200, 9400, 9600]
    readings = [program.Reading(100 * place, 0.0, own, own) for place, own in enumerate(owns)]
    assert program.slope(readings) == pytest.approx(2.0)


def test_what_is_sent_varies_and_is_the_same_in_every_run():
    sent = import_module("benchmarks.serve.sent_items")
    texts, images = sent.make_texts(), sent.make_images()
    assert texts == sent.make_texts()
    lengths = sorted(len(text.split()) for text in texts)
    assert (lengths[0], lengths[len(lengths) // 2] in range(5, 12), lengths[-1]) == (2, True, 15)
    assert len({*images}) == sent.IMAGES
    assert {Image.open(BytesIO(image)).size for image in images} == {*sent.SIZES}


def test_image_processors_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_processor, "LIST_LENGTH", 2)
    tables = list(image_processor.run(tiny_settings()))
    *several, draft = tables
    with_threads = ["lists", "lists"] if torch.get_num_threads() > 1 else []
    kinds = ["landscape", "portrait", "a JPEG", "lists", "lists", *with_threads]
    assert [table.title.split(" of ")[0] for table in several] == kinds
    for table in several:
        names = names_of(table)
        if "JPEG" not in table.title:
            assert {"hf_clip, backend='torch'", image_processor.PEER} <= {*names}
        assert names[0] == "hf_clip"
        rust = {image_processor.RUST, image_processor.ALONE}
        assert rust <= {*names} or [line for line in table.left_out if line.startswith(image_processor.RUST)]
    assert names_of(draft) == ["hf_clip, draft", "hf_clip, exact"]


def test_summary_has_a_row_for_each_table_and_a_column_for_who_is_in_several():
    captions = Table("captions", "captions", [Row("hf_clip", "", 1, [0.5]), Row("stock, batch 1", "", 1, [1.25])])
    alone = Table("alone", "images", [Row("hf_clip", "", 1, [0.5])])
    without = Table("failed", "images", [Row("openai-clip", "", 1, [0.5])])
    tables = [example_table(), captions, example_table(), alone, example_table(), without]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reporting.format_summary(tables).splitlines()]
    vit = ["ViT-B/32", "64.0 images", "2.00 (4.00)", ""]
    assert lines[0] == ["measured", "per second, fastest", "openai-clip", "others"]
    assert lines[2:] == [
        vit,
        ["captions", "2.0 captions", "", "stock, batch 1 2.50"],
        vit,
        ["alone", "2.0 images", "", ""],
        vit,
    ]


# The command line, with the subcommand that takes the least


def test_report_holds_machine_versions_and_raw_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--json", str(tmp_path / "figures.json"), "--picture", str(tmp_path / "ratios.png")]
    threads = torch.get_num_threads()
    assert main(["tokenizer", "--captions", "40", "--rounds", "2", "--threads", str(threads), *files]) == 0
    printed = capsys.readouterr().out
    assert f", {threads} threads" in printed
    assert "\n| measured " in printed
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report.keys() == {"date", "commit", "machine", "versions", "threads", "ceilings_gflops", "tables"}
    assert {"processor", "cores", "instructions", "caches", "memory_gb", "gpu"} <= report["machine"].keys()
    assert report["versions"]["torch"] == torch.__version__
    table = report["tables"][0]
    assert (table["subcommand"], table["unit"]) == ("tokenizer", "captions")
    row = next(row for row in table["rows"] if row["implementation"] == "openai-clip")
    assert row.keys() >= {"precision", "per_second", "fraction_of_ceiling", "peak_memory_bytes", "amount", "seconds"}
    assert len(row["seconds"]) == 2
    assert row["ours_is_times"]["hf_clip"] > 0
    with Image.open(tmp_path / "ratios.png") as image:
        assert image.format == "PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "ratios.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], f"error: there is no benchmark 'encode'; there are {', '.join(SUBCOMMANDS)}"),
        (["image_encoder", "--variants", "ViT-B/33"], "error: Unknown CLIP variant 'ViT-B/33'; the nine are"),
        (["tokenizer", "load", "--variants", "RN50"], "error: --variants has no meaning for tokenizer, load"),
        (["tokenizer", "load", "--device", "cuda"], "error: --device cuda has no meaning for tokenizer, load"),
        (["image_encoder", "--captions", "9"], "error: --captions has no meaning for image_encoder"),
        (
            ["tokenizer", "--json", "no/such/folder.json"],
            "error: no/such/folder.json cannot be written: name a file in",
        ),
        (["tokenizer", "--picture", "ratios"], "error: ratios is no picture's name; it must end in .png, .svg or .pdf"),
        (["image_encoder", "--device", "cpu", "--precision", "fp16"], "error: --precision fp16 is not measured here"),
    ],
)
def test_request_that_cannot_be_met_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]):
    assert main(["image_processor", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "error: --device cuda, but torch sees no GPU here\n"


# The page of a machine


def report_of(*tables: Table, **facts: Any) -> dict[str, Any]:
    machine = {"described": "Some CPU, 2 cores, avx2, L3 32 MiB", "gpu": None}
    head: dict[str, Any] = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "machine": machine}
    head |= {"versions": {"torch": "2.13.0"}, "threads": 2}
    ceilings = {("cpu", "float32"): 417e9}
    return reporting.as_json(head | facts, ceilings, {"image_encoder": list(tables)})


def test_page_has_the_tables_that_were_printed_and_keeps_its_own_words(tmp_path: Path):
    page, file = tmp_path / "machine.md", tmp_path / "figures.json"
    file.write_text(json.dumps(report_of(example_table())))
    page.write_text(f"# Mine\n\n{pages.BEGIN}\nold\n{pages.END}\n\n## What limits it\n\nWords.\n")
    assert pages.main([str(file), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(
        f"# Mine\n\n{pages.BEGIN}\n\nMeasured on 2026-01-02 at commit `abc1234`: Some CPU, 2 cores, "
    )
    assert "2 threads. The fastest matrix products, which are the ceilings, reached 417 GFLOP/s in float32. " in text
    assert text.endswith(f"{pages.END}\n\n## What limits it\n\nWords.\n")
    assert reporting.format_table(example_table()).strip() in text
    assert reporting.format_summary([example_table()]) in text
    assert "old" not in text
    assert pages.main([str(file), "--into", str(page)]) == 0
    assert page.read_text() == text


def test_later_run_of_the_same_machine_replaces_its_tables():
    newer = Table("ViT-B/32", "images", [Row("hf_clip", "float32", 1, [0.5]), Row("peer", "float32", 1, [1.5])])
    alone = Table("RN50", "images", [Row("hf_clip", "float32", 1, [0.25])])
    text = pages.write_figures([report_of(example_table(), alone), report_of(newer, date="2026-01-09")])
    assert "3.00 times" in text
    assert "openai-clip" not in text
    assert "RN50: images" in text
    assert "Measured on 2026-01-09" in text


def test_page_of_two_machines_and_of_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, second, other = (tmp_path / f"{name}.json" for name in ("first", "second", "other"))
    first.write_text(json.dumps(report_of(example_table())))
    second.write_text(json.dumps(report_of(example_table(), machine={"described": "Another CPU", "gpu": None})))
    other.write_text('{"date": 1}')
    page = tmp_path / "page.md"
    for files, message in (
        ([first, second], "the files are of 2 machines: Some CPU, 2 cores, avx2, L3 32 MiB; Another CPU"),
        ([tmp_path / "none.json"], "none.json cannot be read: No such file"),
        ([other], "other.json has no ceilings_gflops, machine, tables, threads, versions: give it a file that python"),
    ):
        assert pages.main([*map(str, files), "--into", str(page)]) == 1
        assert message in capsys.readouterr().err
    page.write_text("# Words alone\n")
    assert pages.main([str(first), "--into", str(page)]) == 1
    assert "between which the figures go" in capsys.readouterr().err
    assert page.read_text() == "# Words alone\n"
    assert {path.name for path in tmp_path.iterdir()} == {"first.json", "second.json", "other.json", "page.md"}
