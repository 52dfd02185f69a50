"""FSDP2 and DeepSpeed, by accelerate's own code in two processes on a CPU, against one process with the whole batch."""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModel

from hf_clip.training import sharding
from hf_clip.training.config import TrainingConfig

from ..finetuning import ROOT, largest_difference, launch, options, records, train, weights, words
from ..two_processes import TwoProcesses
from .fsdp2_on_cpu import keeping_gradients

CONFIGS = ROOT / "accelerate_configs"
ZERO = Path(__file__).with_name("zero_on_cpu.py")
STEPS: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "warmup_steps": 1, "learning_rate": "5e-4"}


def shard(
    digits: Path,
    out: Path,
    two_processes: TwoProcesses,
    tower: str = "vit",
    plugin: dict[str, Any] | None = None,
    precision: str = "no",
    **chosen: Any,
) -> Path:
    """A run of two processes under FSDP2; returns the file with the gradients of its first step."""
    flags = options(digits, out, tower, per_device_train_batch_size=24, **STEPS | chosen)
    gradients = out.with_suffix(".pt")
    two_processes.run(words(flags), {"plugin": plugin or {}, "gradients": str(gradients)}, precision)
    return gradients


def assert_same(sharded: Path, alone: Path) -> None:
    first, second = weights(sharded), weights(alone)
    for name in [name for name in first if name.endswith("k_proj.bias")]:  # of zero gradient but for rounding
        del first[name], second[name]
    assert largest_difference(first, second) < 1e-5
    losses = [[line["loss"] for line in records(folder)] for folder in (sharded, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert AutoModel.from_pretrained(sharded).logit_scale.shape == ()


@pytest.mark.parametrize(("loss", "micro_batch_size"), [("softmax", None), ("sigmoid", 10)])
def test_fsdp2_has_the_gradients_of_one_process(
    digits: Path, tmp_path: Path, tower: str, loss: str, micro_batch_size: int | None, two_processes: TwoProcesses
):
    """With the whole batch, however many pairs are embedded at once."""
    chosen = {"loss": loss, "max_grad_norm": 1.0}
    alone = {"micro_batch_size": micro_batch_size, "loss_ring": True}
    gradients = shard(digits, tmp_path / "two", two_processes, tower, **alone, **chosen)
    two = torch.load(gradients)
    with keeping_gradients(str(tmp_path / "one.pt")):
        train(digits, tmp_path / "one", tower, per_device_train_batch_size=48, **STEPS | chosen)
    one = torch.load(tmp_path / "one.pt")
    assert two.keys() == one.keys()
    for name, gradient in one.items():
        if not name.endswith("k_proj.bias"):
            assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow)])
def test_fsdp2_goes_on_where_it_stopped(digits: Path, tmp_path: Path, kind: str, two_processes: TwoProcesses):
    """With the moving average and the pretrained weights, whose parts are gathered or split as the model's."""
    chosen = {"ema_decay": 0.9, "validation": "100", "save_steps": 2, "guard_dataset": str(digits / "labelled")}
    chosen |= {"metric_for_best_model": "mean(recall@1, guard_acc1)", "l2_to_pretrained": 0.5}
    chosen |= {"plugin": {"state_dict_type": kind}}
    shard(digits, tmp_path / "out", two_processes, **chosen)
    resumed = chosen | {"resume_from_checkpoint": "latest"}
    del chosen["plugin"]
    alone = train(digits, tmp_path / "one", per_device_train_batch_size=48, **STEPS | chosen)
    assert_same(tmp_path / "out", alone)
    (tmp_path / "out" / "model.safetensors").unlink()
    shard(digits, tmp_path / "out", two_processes, **resumed)
    assert_same(tmp_path / "out", alone)


def test_fsdp2_begins_with_one_set_of_adapters(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    chosen = {"lora_rank": 2, "lock": "image", "gradient_checkpointing": True}
    shard(digits, tmp_path / "two", two_processes, micro_batch_size=10, **chosen)
    assert_same(tmp_path / "two", train(digits, tmp_path / "one", per_device_train_batch_size=48, **STEPS | chosen))


def zero(
    digits: Path, out: Path, stage: int, tower: str = "vit", precision: str = "no", kept_whole: int = 1, **chosen: Any
) -> None:
    """kept_whole: the largest parameters that ZeRO 3 doesn't split; the tests' models have small ones alone"""
    flags = options(digits, out, tower, per_device_train_batch_size=24, **STEPS | chosen)
    launcher = ["--use_deepspeed", "--zero_stage", str(stage), "--zero3_init_flag", "false"]
    launcher += ["--mixed_precision", precision]
    environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    environment |= {"KEPT_WHOLE": str(kept_whole)}
    done = launch(flags, *launcher, processes=2, program=ZERO, **environment)
    assert done.returncode == 0, done.stderr[-3000:]


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# Adam would hide the size of gradients.
ZERO_STEPS: dict[str, Any] = {"optim": "SGD", "learning_rate": "1e-2"}


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_and_goes_on_where_it_stopped(digits: Path, tmp_path: Path, stage: int):
    hot = tmp_path / "hot"
    shutil.copytree(digits / "vit", hot)
    model = AutoModel.from_pretrained(hot)
    model.logit_scale.data.fill_(6.0)  # above ln 100: it is clamped, in DeepSpeed's copy too
    model.save_pretrained(hot)
    chosen = ZERO_STEPS | {"model": str(hot), "validation": "100", "ema_decay": 0.9, "save_steps": 2}
    # biases and gains are kept whole, as with larger models
    zero(digits, tmp_path / "two", stage, kept_whole=5000, micro_batch_size=10, **chosen)
    alone = train(digits, tmp_path / "one", per_device_train_batch_size=48, **STEPS | chosen)
    assert_same(tmp_path / "two", alone)
    (tmp_path / "two" / "model.safetensors").unlink()
    zero(digits, tmp_path / "two", stage, kept_whole=5000, resume_from_checkpoint="latest", **chosen)
    assert_same(tmp_path / "two", alone)


@needs_deepspeed
@pytest.mark.parametrize(
    ("tower", "chosen"),
    [
        ("resnet", {"loss": "sigmoid", "max_grad_norm": 0.5, "mask_duplicates": True}),
        ("vit", {"lora_rank": 2, "lock": "image", "gradient_checkpointing": True, "micro_batch_size": 10}),
        ("vit", {"lock": "image:1,text", "average_with_pretrained": 0.5}),
    ],
    ids=["sigmoid", "adapters", "locked"],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_one_process_trains(digits: Path, tmp_path: Path, stage: int, tower: str, chosen: dict):
    chosen = ZERO_STEPS | chosen
    zero(digits, tmp_path / "two", stage, tower, **chosen)
    chosen = STEPS | chosen | {"micro_batch_size": None}
    assert_same(tmp_path / "two", train(digits, tmp_path / "one", tower, per_device_train_batch_size=48, **chosen))


def in_bf16_by_ddp(digits: Path, out: Path, tower: str, two_processes: TwoProcesses) -> Path:
    flags = options(digits, out, tower, per_device_train_batch_size=24, **STEPS | ZERO_STEPS)
    two_processes.run(words(flags), precision="bf16")
    return out


def assert_same_in_bf16(sharded: Path, plain: Path, rel: float = 1e-5) -> None:
    """Float32 differs by a hundred times as much."""
    losses = [[line["loss"] for line in records(folder)] for folder in (sharded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    assert largest_difference(weights(sharded), weights(plain)) < rel


def test_fsdp2_computes_in_bf16_as_ddp_does(digits: Path, tmp_path: Path, tower: str, two_processes: TwoProcesses):
    shard(digits, tmp_path / "sharded", two_processes, tower, precision="bf16", **ZERO_STEPS)
    assert_same_in_bf16(tmp_path / "sharded", in_bf16_by_ddp(digits, tmp_path / "plain", tower, two_processes))


@needs_deepspeed
def test_zero_computes_in_bf16_as_ddp_does(digits: Path, tmp_path: Path, tower: str, two_processes: TwoProcesses):
    plain = in_bf16_by_ddp(digits, tmp_path / "plain", tower, two_processes)
    for stage in (2, 3):
        zero(digits, tmp_path / str(stage), stage, tower, precision="bf16", **ZERO_STEPS)
    assert_same_in_bf16(tmp_path / "2", plain)
    assert_same_in_bf16(tmp_path / "3", plain, rel=3e-3)  # ZeRO 3's linear maps add their bias in bfloat16


# --- what is refused -------------------------------------------------------------------------------------------------


def accelerator_of(kind: str, precision: str = "no", **settings: Any) -> Any:
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "cpu_offload": None}
    plugin |= {"activation_checkpointing": False, "zero_stage": 2, "deepspeed_config": {}}
    plugin |= {"hf_ds_config": SimpleNamespace(is_offload=lambda: settings.get("offload", False))}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin | settings))
    state.deepspeed_plugin = state.fsdp_plugin
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        mixed_precision=precision,
        state=state,
        num_processes=2,
        gradient_accumulation_steps=1,
        device=torch.device("cpu"),
        is_fsdp2=kind == "FSDP",
    )


def config_of(**fields: Any) -> TrainingConfig:
    return TrainingConfig(model="m", dataset=["d"], output_dir="o", max_steps=1, **fields)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("FSDP", {"precision": "fp16"}, "mixed_precision: fp16 is not supported under FSDP: take bf16"),
        ("FSDP", {"fsdp_version": 1}, "fsdp_version: 1 is not supported under FSDP: set fsdp_version: 2"),
        ("FSDP", {"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading is not supported"),
        ("FSDP", {"activation_checkpointing": True}, "set it to false, and pass --gradient_checkpointing"),
        ("DEEPSPEED", {"precision": "fp16"}, "mixed_precision: fp16 is not supported under DeepSpeed: take bf16"),
        ("DEEPSPEED", {"zero_stage": 0}, "zero_stage: 0 is not supported under DeepSpeed: take 1, 2 or 3"),
        ("DEEPSPEED", {"offload": True}, "offloading is not supported"),
        ("DEEPSPEED", {"deepspeed_config": {"optimizer": {}}}, "an optimizer in its configuration is not supported"),
        (
            "DEEPSPEED",
            {"deepspeed_config": {"gradient_accumulation_steps": 4}},
            "gradient_accumulation_steps: 4 in its configuration beside the launcher's 1 is not supported",
        ),
        (
            "DEEPSPEED",
            {"deepspeed_config": {"scheduler": {}}},
            "a scheduler in its configuration is not supported",
        ),
        (
            "DEEPSPEED",
            {"deepspeed_config": {"gradient_clipping": 1.0}},
            "gradient_clipping: 1.0 beside --max_grad_norm None is not supported under DeepSpeed: pass --max_grad_norm",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(kind: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.check_wrapper(accelerator_of(kind, **settings), config_of())
    sharding.check_wrapper(accelerator_of(kind, "bf16"), config_of())
    sharding.check_wrapper(accelerator_of("MULTI_GPU", "fp16"), config_of())


def test_optimizers_that_look_at_whole_matrices_are_refused_where_these_are_cut():
    adafactor = config_of(optim="Adafactor")
    with pytest.raises(ValueError, match="--optim Adafactor is not supported under DeepSpeed: it would see flat"):
        sharding.check_wrapper(accelerator_of("DEEPSPEED"), adafactor)
    sharding.check_wrapper(accelerator_of("FSDP"), adafactor)


@pytest.mark.parametrize(("kind", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_trying_sizes_is_refused_where_others_would_wait(kind: str, name: str):
    message = f"--micro_batch_size auto is not supported under {name}: a process that runs out of memory would leave"
    with pytest.raises(ValueError, match=message):
        sharding.check_wrapper(accelerator_of(kind), config_of(micro_batch_size="auto"))
    sharding.check_wrapper(accelerator_of(kind), config_of(micro_batch_size=8))
    sharding.check_wrapper(accelerator_of("MULTI_GPU"), config_of(micro_batch_size="auto"))


def test_statistics_that_no_one_shares_are_refused():
    accelerator = accelerator_of("FSDP")
    with pytest.raises(ValueError, match="Under FSDP every process would keep BatchNorm statistics of its own"):
        sharding.prepare(accelerator, nn.Sequential(nn.BatchNorm2d(3)), None, config_of())


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_wrapper_that_accelerate_leaves_out_is_said(variable: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"The launcher asks for {name}.*but accelerate shards nothing here"):
        sharding.check_wrapper(accelerator_of("MULTI_CPU"), config_of())


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp2_file_is_refused_on_a_cpu(digits: Path, tmp_path: Path):
    done = launch(options(digits, tmp_path / "no"), "--config_file", str(CONFIGS / "fsdp2.yaml"), processes=2)
    assert done.returncode != 0
    assert "error: The launcher asks for FSDP, but accelerate shards nothing here (2 process(es) on cpu)" in done.stderr
    assert not (tmp_path / "no").exists()


def test_files_say_what_is_supported(monkeypatch: pytest.MonkeyPatch):
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        assert f"--config_file accelerate_configs/{path.name} " in text
        values = yaml.safe_load(text)
        assert ClusterConfig.from_yaml_file(str(path)).num_processes == 2
        for name, value in values.get("fsdp_config", {}).items():
            monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()  # of the environment, as the launcher leaves it
    assert sharding.check_wrapper(accelerator_of("FSDP", "bf16", **vars(plugin)), config_of()) is None
    assert {path.stem for path in CONFIGS.glob("*")} == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    assert "ACCELERATE_USE_FSDP" not in os.environ
