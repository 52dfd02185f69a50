"""The parts of a model card: metadata for the Hub, a table of the architecture, and snippets that load a repository.

`openai_cards` composes the cards of OpenAI's nine models from these parts, and other programs compose those of their
models.

Invariant: every Python block made here runs unchanged, if the repository exists and an image `cat.jpg` lies in the
current folder. The tests run them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig

USAGE_BEGIN = "<!-- How to use {}: written by hf_clip -->"
USAGE_END = "<!-- written by hf_clip until here -->"
USAGE_PART = re.compile("([^\\n]+)".join(map(re.escape, USAGE_BEGIN.split("{}"))) + f".*?{USAGE_END}", re.DOTALL)
"""Comments around the part of a card that names the place of the model, and is written again at publishing."""

TAGS = ("clip", "hf_clip", "vision", "contrastive", "image-text-retrieval")
"""Tags of every model of this package."""

USAGE = Template("""\
With the package `hf_clip` (`pip install hf-clip`), the calls are those of any other model:

```python
from transformers import pipeline

import hf_clip  # registers the classes with AutoModel, AutoProcessor and pipeline

classify = pipeline("zero-shot-image-classification", model="$repo_id")
print(classify("cat.jpg", candidate_labels=["a cat", "a dog", "a bird"]))
```

Without it, the code in this repository does the same; it has to be trusted, and needs \
`pip install "transformers>=5.18,<6" torch pillow ftfy`:

```python
from transformers import AutoModel, AutoProcessor, pipeline

classify = pipeline("zero-shot-image-classification", model="$repo_id", trust_remote_code=True)
print(classify("cat.jpg", candidate_labels=["a cat", "a dog", "a bird"]))

model = AutoModel.from_pretrained("$repo_id", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("$repo_id", trust_remote_code=True)
```

The package also brings what a repository cannot carry: a pipeline that encodes its labels once, and \
`ZeroShotClassifier`.

### Features of images and texts

```python
import torch
from transformers import AutoModel, AutoProcessor

import hf_clip

model = AutoModel.from_pretrained("$repo_id").eval()
processor = AutoProcessor.from_pretrained("$repo_id")
inputs = processor(text=["a photo of a cat", "a photo of a dog"], images=["cat.jpg"], return_tensors="pt")
with torch.no_grad():
    image_features = model.encode_image(inputs["pixel_values"])  # (1, $width)
    text_features = model.encode_text(inputs["input_ids"])  # (2, $width)
    outputs = model(**inputs)  # the fields of transformers' CLIPOutput
print(torch.cosine_similarity(image_features, text_features))
print(outputs.logits_per_image.$scores
```

The model computes in float32; `dtype=torch.bfloat16` halves the memory. Texts have at most $length tokens.

### A classifier with several phrasings

The labels are encoded once. Each may have several names, and each name is put into each template; here the templates \
are the seven that OpenAI chose for ImageNet.

```python
from transformers import AutoModel, AutoProcessor

from hf_clip import ZeroShotClassifier

model = AutoModel.from_pretrained("$repo_id").eval()
processor = AutoProcessor.from_pretrained("$repo_id")
labels = {"cat": ["cat", "kitten"], "dog": ["dog", "puppy"]}
classifier = ZeroShotClassifier(model, processor, labels, templates="imagenet_7")
print(classifier.classify("cat.jpg", top_k=1))
```
""")

STOCK_USAGE = Template("""\
This repository is in transformers' own layout: its classes load it, without further code.

```python
import torch
from transformers import CLIPModel, CLIPProcessor, pipeline

classify = pipeline("zero-shot-image-classification", model="$repo_id")
print(classify("cat.jpg", candidate_labels=["a cat", "a dog", "a bird"]))

model = CLIPModel.from_pretrained("$repo_id").eval()
processor = CLIPProcessor.from_pretrained("$repo_id")
images = processor(images="cat.jpg", return_tensors="pt")
texts = processor(text=["a photo of a cat", "a photo of a dog"], padding=True, return_tensors="pt")
with torch.no_grad():
    image_features = model.get_image_features(**images).pooler_output  # (1, $width)
    text_features = model.get_text_features(**texts).pooler_output  # (2, $width)
print(torch.cosine_similarity(image_features, text_features))
```

With the package `hf_clip` (`pip install hf-clip`), `HfClipModel.from_pretrained("$repo_id")` and `HfClipProcessor` \
read the same files. Texts have at most $length tokens.
""")


def name_of(repo_id: str) -> str:
    """Return a repository's name without its owner: `"org/clip-rn50"` → `"clip-rn50"`."""
    return repo_id.rstrip("/").rpartition("/")[2]


def card_metadata(
    repo_id: str,
    *,
    license: str | None = None,
    language: str | None = "en",
    tags: Iterable[str] = (),
    results: Sequence[EvalResult] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    **others: Any,
) -> ModelCardData:
    """Make the metadata of a card, which the Hub reads. Unknown fields are left out.

    Args:
        repo_id: Name of the repository, such as "org/clip-rn50".
        license: Identifier of the licence, e.g. "mit".
        language: Language of the texts.
        tags: Tags besides those of every model of this package.
        results: Measurements, for the model-index.
        base_model: Name of the repository of the model that was fine-tuned.
        datasets: Names of the data sets that the model was trained on.
        **others: Further fields of `ModelCardData`.

    Returns:
        The metadata.

    Raises:
        ValueError: Two results for one task and data set have different sources. The model-index has only one source
            for them.
    """
    described: dict[tuple, EvalResult] = {}
    for result in results:
        first = described.setdefault(result.unique_identifier, result)
        for field in ("dataset_name", "source_name", "source_url"):
            if getattr(first, field) != getattr(result, field):
                raise ValueError(
                    f"Two results of {result.task_type} on {result.dataset_type!r} differ in {field} "
                    f"({getattr(first, field)!r}, {getattr(result, field)!r}), but the model-index keeps one for each "
                    f"task and data set. Give them different values of dataset_config or dataset_split."
                )
    return ModelCardData(
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS, *tags],
        base_model=base_model,
        datasets=list(datasets) or None,
        model_name=name_of(repo_id) if results else None,
        eval_results=list(results) or None,
        **others,
    )


def card_text(metadata: ModelCardData, body: str) -> str:
    """Return the text of a README.md with this metadata and body."""
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in Markdown. Columns of numbers are aligned right. A cell that is None stays blank."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    is_number = [all(row[column][:1].isdigit() or not row[column] for row in cells) for column in range(len(header))]
    rules = ["---:" if number and column else "---" for column, number in enumerate(is_number)]
    lines = [list(header), rules, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def architecture_table(config: HfClipConfig, **others: str) -> str:
    """Write a table of a model's architecture. `others` are further rows."""
    vision, text = config.vision_config, config.text_config
    if isinstance(vision, HfClipResNetConfig):
        blocks = "-".join(map(str, vision.depths))
        tower = f"ResNet, {blocks} blocks, stem of {vision.stem_width} channels, attention pool with "
        tower += f"{vision.num_attention_heads} heads"
    else:
        tower = f"Vision Transformer, {vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        tower += f"{vision.num_attention_heads} heads, patches of {vision.patch_size} × {vision.patch_size}"
    rows = {
        "Image tower": tower,
        "Images": f"{vision.image_size} × {vision.image_size} pixels",
        "Text tower": (
            f"Transformer, {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} "
            f"heads, causal"
        ),
        "Texts": f"up to {text.max_position_embeddings} tokens, vocabulary of {text.vocab_size:,}",
        "Embedding": f"{config.projection_dim} dimensions{_widths_in_words(config)}",
    }
    return markdown_table(["", ""], (rows | others).items())


def _widths_in_words(config: HfClipConfig) -> str:
    widths = config.matryoshka_dims
    return f"; trained at the widths {', '.join(map(str, widths))}, see `truncate_dim`" if widths else ""


def usage_section(config: HfClipConfig, repo_id: str, *, stock: bool = False) -> str:
    """Write snippets that load the repository, with this package and without it.

    Args:
        config: Configuration of the model.
        repo_id: Name of the repository.
        stock: Whether the repository is in the layout of transformers' `CLIPModel`.

    Returns:
        The snippets, in Markdown.
    """
    is_sigmoid = config.contrastive_loss == "sigmoid"
    return (
        (STOCK_USAGE if stock else USAGE)
        .substitute(
            repo_id=repo_id,
            width=config.projection_dim,
            length=config.text_config.max_position_embeddings,
            scores="sigmoid())  # how probable each text is, by itself"
            if is_sigmoid
            else "softmax(dim=-1))  # how probable each text is, among these two",
        )
        .strip()
    )


def usage_part(config: HfClipConfig, name: str, *, stock: bool = False, note: str = "") -> str:
    """Write the part of a card that `named_for_repository` finds again.

    Args:
        config: Configuration of the model.
        name: The folder or repository that the snippets load.
        stock: Whether it is in the layout of transformers' `CLIPModel`.
        note: A paragraph before the snippets.

    Returns:
        The part, in Markdown.
    """
    parts = [USAGE_BEGIN.format(name), "## How to use it", note, usage_section(config, name, stock=stock), USAGE_END]
    return "\n\n".join(part for part in parts if part)


def named_for_repository(card: str, config: HfClipConfig, repo_id: str, *, stock: bool = False) -> str | None:
    """Write a card that the trainer made for a folder again, for a repository.

    Its title, the name in its model-index and its snippets become the repository's. All else stays as it is, also what
    a user has changed there.

    Args:
        card: Text of the card.
        config: Configuration of the model.
        repo_id: Name of the repository.
        stock: Whether the repository is in the layout of transformers' `CLIPModel`.

    Returns:
        The text; None for a card without a part that `usage_part` has written.
    """
    if (found := USAGE_PART.search(card)) is None:
        return None
    old, new = re.escape(name_of(found[1])), name_of(repo_id)
    before, after = card[: found.start()], card[found.end() :]
    before = re.sub(rf"^# {old}$", lambda _: f"# {new}", before, count=1, flags=re.MULTILINE)
    in_index = re.compile(rf"^(model-index:\n- name: )(['\"]?){old}\2$", re.MULTILINE)
    before = in_index.sub(lambda match: f"{match[1]}{json.dumps(new)}", before, count=1)
    return f"{before}{usage_part(config, repo_id, stock=stock)}{after}"
