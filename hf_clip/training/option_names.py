"""Options under other names: what `--lr`, `--epochs` or `--batch_size` is called here."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "checkpoint_steps": "save_steps",
    "epochs": "num_train_epochs",
    "keep_best": "metric_for_best_model",
    "keep_checkpoints": "save_total_limit",
    "label_smoothing": "label_smoothing_factor",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "overwrite": "overwrite_output_dir",
    "patience": "early_stopping_patience",
    "resume": "resume_from_checkpoint",
    "scheduler": "lr_scheduler_type",
}
"""What options were called before they took Hugging Face's names → what they are called now."""

KNOWN_AS = {
    "model": "base_model checkpoint ckpt init_from model_id model_name model_name_or_path model_path pretrained",
    "variant": "arch architecture backbone config config_name from_scratch scratch",
    "loss": "contrastive_loss loss_fn loss_type sigmoid siglip softmax",
    "matryoshka_dims": "dims matryoshka mrl mrl_dims nested_dims widths",
    "matryoshka_weights": "mrl_weights relative_importance",
    "image_size": "force_image_size img_size input_size px res resize resolution size",
    "max_text_length": "context_length max_length max_seq_len max_seq_length text_length",
    "lock": "freeze freeze_image freeze_text freeze_vision_model freeze_text_model lit lock_image lock_text",
    "teacher": "distill distill_from distill_model distillation_model teacher_model",
    "teacher_weight": "distill_weight distillation_weight kd_weight lambda_distill",
    "teacher_temperature": "distill_temperature distillation_temperature kd_temperature",
    "cache_frozen_features": "cache_embeddings cache_features cache_latents precompute_embeddings precompute_features",
    "cached_views": "num_views views",
    "lora_rank": "lora lora_r peft r rank use_lora use_peft",
    "lora_alpha": "adapter_alpha lora_scale lora_scaling",
    "lora_dropout": "adapter_dropout lora_drop",
    "lora_target_modules": "lora_modules lora_targets target_modules targets",
    "l2_to_pretrained": "distance_penalty l2_sp l2sp prolip",
    "sync_batchnorm": "sync_bn syncbn use_bn_sync",
    "patch_dropout": "flip_masking force_patch_dropout mask_patches mask_ratio masking patch_mask token_dropout",
    "gradient_checkpointing": "activation_checkpointing checkpointing grad_checkpointing",
    "dataset": (
        "csv data data_dir data_path data_root dataset_name dataset_path datasets input root train train_data "
        "train_data_dir train_dir train_file train_files"
    ),
    "replay": "rehearsal replay_data replay_dataset",
    "split": "dataset_split train_split train_split_name",
    "image_column": "csv_img_key image_col image_field image_key image_path_column img_col img_key",
    "caption_column": (
        "caption caption_col caption_key csv_caption_key label_column prompt prompt_template target_column template "
        "text text_col text_column text_key"
    ),
    "image_folders": "image_dir image_folder image_root images_dir img_dir",
    "mask_duplicates": "dedup deduplicate false_negatives ignore_duplicates",
    "streaming": "iterable stream",
    "validation": (
        "dev eval eval_data eval_dataset eval_file eval_split held_out test test_data test_split val val_data "
        "val_split valid validation_file validation_split validation_split_percentage"
    ),
    "guard_dataset": "forgetting_dataset guard guard_data guard_set retention_dataset",
    "guard_labels": "guard_class_names guard_classes guard_classnames",
    "augmentation": "aug aug_cfg augment augmentations transform transforms",
    "augment_on": "aug_device augmentation_device dali gpu_augment gpu_augmentation gpu_transforms",
    "dataloader_num_workers": "n_workers nw preprocessing_num_workers workers",
    "per_device_train_batch_size": "batch batchsize bs per_device_batch_size per_gpu_batch_size train_batch_size",
    "micro_batch_size": (
        "accum_freq chunk_size chunk_sizes gc_chunk_size gradcache grad_cache gradient_cache gradient_caching "
        "microbatch_size micro_batch mini_batch_size minibatch_size per_device_micro_batch_size"
    ),
    "num_train_epochs": "ep epoch max_epochs n_epochs num_epochs",
    "max_steps": "iterations iters max_iters max_iterations max_train_steps n_steps num_steps num_train_steps steps "
    "total_steps train_steps",
    "learning_rate": "base_lr eta learn_rate lr peak_lr rate",
    "optim": "opt optimiser",
    "weight_decay": "decay l2 wd",
    "layer_decay": "layer_lr_decay layerwise_decay layerwise_lr_decay ld llrd",
    "lr_scheduler_type": "lr_schedule lr_scheduler sched schedule",
    "warmup_steps": "num_warmup_steps warm_up warmup warmup_iters warmup_ratio",
    "max_grad_norm": "clip clip_grad clip_grad_norm clip_norm grad_clip grad_clip_norm gradient_clipping max_norm",
    "label_smoothing_factor": "ls smoothing",
    "loss_ring": "disco ring ring_loss",
    "seed": "data_seed manual_seed random_seed random_state",
    "output_dir": "log_dir logs o out out_dir outdir output output_folder output_path save_dir save_path save_to",
    "overwrite_output_dir": "force overwrite_output",
    "logging_steps": "log_every log_every_n_steps log_freq log_interval log_steps logging_frequency print_freq",
    "save_steps": "checkpoint_every checkpointing_steps save_every save_frequency save_freq save_interval "
    "save_strategy",
    "eval_steps": "eval_every eval_freq eval_frequency eval_interval eval_strategy evaluation_strategy val_frequency "
    "validation_steps",
    "save_total_limit": "checkpoints_total_limit keep_last",
    "resume_from_checkpoint": "resume_from restart",
    "metric_for_best_model": "best best_metric load_best_model_at_end monitor save_best",
    "early_stopping_patience": "early_stopping",
    "ema_decay": "ema model_ema model_ema_decay use_ema",
    "average_with_pretrained": "alpha wise wise_ft wiseft",
    "output_format": "export export_format format save_format",
    "push_to_hub": "push publish",
    "hub_model_id": "hub_id hub_repo push_to_hub_model_id repo repo_id repository",
    "report_to": "logger log_with tensorboard trackers wandb",
}
"""Option → what it is called by transformers' TrainingArguments, open_clip, diffusers' programs, timm and habit."""

OF_THE_LAUNCHER = {
    "accelerate launch --mixed_precision bf16": "amp bf16 dtype fp16 half mixed_precision precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in front of the command": (
        "accumulate_grad_batches accumulation_steps grad_accum gradient_accumulation gradient_accumulation_steps"
    ),
    "accelerate launch --num_processes 8": "devices gpus n_gpu nproc_per_node num_gpus num_processes world_size",
    "accelerate launch --dynamo_backend inductor": "compile torch_compile torchcompile",
}
"""What is said to `accelerate launch` and not to the program."""


def _by_habit(table: dict[str, str]) -> dict[str, str]:
    return {habit: name for name, habits in table.items() for habit in habits.split()}


def hint(given: str, known: Iterable[str], dashes: str = "") -> str:
    """What an option that there isn't is called here: ` It is called …` or ` Did you mean …?`, or an empty text.

    Args:
        given: what was written, with or without dashes and value.
        known: the options that there are.
        dashes: what stands in front of an option where the answer is read.
    """
    name = given.split("=")[0].lstrip("-").replace("-", "_").lower()
    launcher, habits = _by_habit(OF_THE_LAUNCHER), _by_habit(KNOWN_AS) | RENAMED
    if name in RENAMED:
        return f" It is called {dashes + RENAMED[name]!r}, as in Hugging Face's TrainingArguments."
    if name in launcher:
        return f" That is the launcher's: {launcher[name]}."
    meant = habits.get(name)
    if meant is None:
        near = get_close_matches(name, [*known, *(habit for habit in habits if len(habit) > 3)], n=1, cutoff=0.7)
        meant = habits.get(near[0], near[0]) if near else None
    return f" Did you mean {dashes + meant!r}?" if meant else ""


def moved_repository(name: Any) -> str:
    """The line for a repository that was given to `--push_to_hub`, which is a switch."""
    return (
        f"--push_to_hub is a switch, but was given {str(name)!r}: name the repository with --hub_model_id, as in "
        f"--push_to_hub --hub_model_id {name}."
    )
