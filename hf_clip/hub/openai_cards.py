"""Write the model card of one of OpenAI's models, for the repository in which it is published.

`card_data/template.md` holds the prose, and `card_data/figures/` the numbers that are filled into it.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..model.configuration_hf_clip import HfClipConfig
from ..model.variants import Variant, get_variant
from .model_card import architecture_table, card_metadata, card_text, markdown_table, name_of, usage_section
from .published_figures import DATA_SETS, LINEAR_PROBE, OPEN_CLIP, PARITY, PRETRAINING, ZERO_SHOT

FOLDER = Path(__file__).with_name("card_data")

CHART = FOLDER / "imagenet-against-gflops.png"
"""The picture that a card shows; it belongs beside the card, under its own name."""

PAPER_URL = "https://arxiv.org/abs/2103.00020"
OPEN_CLIP_URL = "https://github.com/mlfoundations/open_clip/blob/main/docs"

METRIC_TYPES = {
    "accuracy": "accuracy",
    "mean per class": "mean_per_class_accuracy",
    "11-point mAP": "mean_average_precision",
    "mean of top-1 and top-5": "mean_top1_top5_accuracy",
    "ROC AUC": "roc_auc",
}
"""Name in the model-index of each metric of the paper."""

OPEN_CLIP_RESULTS = [
    # column, data set, its type, what is measured
    ("ImageNet_top1", "ImageNet", "imagenet-1k", "top-1"),
    ("ImageNetV2_top1", "ImageNet V2", "imagenet-v2", "top-1"),
    ("average_38_datasets", "open_clip's 38 data sets", "openclip-38", "average"),
    ("Flickr30k_image_R@1", "Flickr30k", "flickr30k", "image for a text, recall at 1"),
    ("Flickr30k_text_R@1", "Flickr30k", "flickr30k", "text for an image, recall at 1"),
    ("COCO_image_R@1", "COCO captions", "coco-captions", "image for a text, recall at 1"),
    ("COCO_text_R@1", "COCO captions", "coco-captions", "text for an image, recall at 1"),
]


def paper_results(variant: str) -> list[EvalResult]:
    """Return the results of tables 10 and 11 of the paper, for the model-index."""
    results = []
    for figures, task, method, table in (
        (ZERO_SHOT, "zero-shot-image-classification", "zero-shot", 11),
        (LINEAR_PROBE, "image-classification", "linear probe", 10),
    ):
        for data_set in DATA_SETS:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type="imagenet-1k" if data_set.column == "ImageNet" else data_set.column.lower(),
                    dataset_name=data_set.name,
                    metric_type=METRIC_TYPES[data_set.metric],
                    metric_name=f"{method}, {data_set.metric} (%)",
                    metric_value=float(figures[variant][data_set.column]),
                    source_name=f"Radford et al. 2021, table {table}",
                    source_url=PAPER_URL,
                )
            )
    return results


def open_clip_results(variant: str) -> list[EvalResult]:
    """Return the results that open_clip measured with the same weights, for the model-index."""
    results = []
    for column, name, kind, what in OPEN_CLIP_RESULTS:
        is_retrieval = "recall" in what
        results.append(
            EvalResult(
                task_type="image-text-retrieval" if is_retrieval else "zero-shot-image-classification",
                dataset_type=kind,
                dataset_name=name,
                # Without this the model-index would file the result under the paper, which has one for the same set.
                dataset_config="measured by open_clip",
                metric_type="recall_at_1" if is_retrieval else "accuracy",
                metric_name=f"{what} (%)",
                metric_value=float(OPEN_CLIP[variant][column]),
                source_name="open_clip",
                source_url=f"{OPEN_CLIP_URL}/openclip_{'retrieval_' if is_retrieval else ''}results.csv",
            )
        )
    return results


def metadata(variant: Variant, repo_id: str) -> ModelCardData:
    return card_metadata(
        repo_id,
        license="mit",
        tags=["openai-clip", "vit" if variant.patch_size else "resnet"],
        results=[*paper_results(variant.name), *open_clip_results(variant.name)],
    )


def results_table(variant: str) -> str:
    rows = [(d.name, d.metric, ZERO_SHOT[variant][d.column], LINEAR_PROBE[variant][d.column]) for d in DATA_SETS]
    return markdown_table(["data set", "measured", "zero-shot", "linear probe"], rows)


def open_clip_table(variant: str) -> str:
    rows = [(name, what, OPEN_CLIP[variant][column]) for column, name, _, what in OPEN_CLIP_RESULTS]
    return markdown_table(["data set", "measured", "%"], rows)


def parity_table(variant: str) -> str:
    stages = ["image_tower", "image_features", "text_tower", "text_features", "logits"]
    return markdown_table([stage.replace("_", " ") for stage in stages], [[PARITY[variant][s] for s in stages]])


def pretraining_table(variant: str) -> str:
    own = PRETRAINING[variant]
    rows = {
        "Pairs in a batch": "32,768",
        "Epochs": own["epochs"],
        "Optimizer": f"Adam, β₁ 0.9, β₂ {own['beta2']}, ε {own['epsilon']}",
        "Weight decay": "0.2, decoupled; not on gains and biases",
        "Learning rate": f"{own['learning_rate']}, 2,000 steps of warm-up, cosine",
        "Logit scale": "learned, from 1 / 0.07, at most 100",
        "Vocabulary": "49,408",
    }
    if own["hardware"]:
        rows["Hardware"] = own["hardware"]
    return markdown_table(["", ""], rows.items())


def _fill_in(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template(template).render(values)


def render_card(variant_name: str, repo_id: str, *, stock: bool = False) -> str:
    """Write the README.md of one of OpenAI's nine models. The file `CHART` must be put beside it.

    Args:
        variant_name: OpenAI's exact name.
        repo_id: Name of the repository.
        stock: Whether the repository is in the layout of transformers' `CLIPModel`.

    Returns:
        The text of the card.

    Raises:
        ValueError: The name is none of the nine.
    """
    variant = get_variant(variant_name)
    config = HfClipConfig.from_variant(variant_name)
    parameters = (
        f"{variant.total_parameters / 1e6:,.1f} million: {variant.image_parameters / 1e6:,.1f} for images, "
        f"{variant.text_parameters / 1e6:,.1f} for texts"
    )
    work = {"Parameters": parameters, "Work per image": f"{variant.image_gflops:,.1f} GFLOPs"}
    body = _fill_in(
        "template.md",
        variant=variant,
        name=name_of(repo_id),
        chart=CHART.name,
        architecture=architecture_table(config, **work),
        usage=usage_section(config, repo_id, stock=stock),
        results=results_table(variant_name),
        open_clip=open_clip_table(variant_name),
        parity=parity_table(variant_name),
        measured=PARITY[variant_name],
        pretraining=pretraining_table(variant_name),
        zero_shot=ZERO_SHOT[variant_name],
        paper=PAPER_URL,
        open_clip_url=OPEN_CLIP_URL,
    )
    return card_text(metadata(variant, repo_id), body)


def render_custom_card(config: HfClipConfig | dict[str, Any], repo_id: str, *, stock: bool = False) -> str:
    """Write the README.md of a converted model that is none of the nine, from its configuration.

    Args:
        config: Configuration of the model.
        repo_id: Name of the repository.
        stock: Whether the repository is in the layout of transformers' `CLIPModel`.

    Returns:
        The text of the card.
    """
    described: HfClipConfig = HfClipConfig.from_dict(config) if isinstance(config, dict) else config
    body = _fill_in(
        "custom_template.md",
        name=name_of(repo_id),
        architecture=architecture_table(described),
        usage=usage_section(described, repo_id, stock=stock),
    )
    return card_text(card_metadata(repo_id, language=None), body)
