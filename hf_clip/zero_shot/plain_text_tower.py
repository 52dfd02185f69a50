"""A text tower in numpy, for programs that encode a few texts and import neither torch nor transformers.

It is `HfClipTextModel` with its projection, in evaluation mode and float32, for texts that are padded on the right. The
weights are those of the model's own file. A layer is read when the first text needs it, and of the token embeddings
only the rows that texts name are read.

Whoever uses it has compared it with the model before: a configuration may hold what is not known here.

Dimensions: T texts, L text length, W tower width, H heads, E = W / H, D embedding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..model.checked_files import DamagedWeightsError
from .plain_inputs import PlainTokenizer
from .text_batches import text_batches

SMALLEST_NORM = np.float32(1e-12)

HIDDEN = np.float32(-np.inf)

DTYPES = ("F16", "F32", "F64")
"""Of weights, as safetensors calls them, that every numpy knows."""


def quick_gelu(values: np.ndarray) -> np.ndarray:
    """x · σ(1.702 x)."""
    with np.errstate(over="ignore"):  # infinite is right: of such a value nothing is left
        return values / (1 + np.exp(np.float32(-1.702) * values))


def gelu(values: np.ndarray) -> np.ndarray:
    """x · Φ(x), with erf by Abramowitz & Stegun 7.1.26, whose error of 1.5e-7 is that of a rounding in float32."""
    scaled = values * np.float32(math.sqrt(0.5))
    size = np.abs(scaled)
    t = 1 / (1 + np.float32(0.3275911) * size)
    factors = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    polynomial = np.zeros_like(t)
    for factor in factors:
        polynomial = (polynomial + np.float32(factor)) * t
    return values * (np.float32(0.5) * (1 + np.sign(scaled) * (1 - polynomial * np.exp(-size * size))))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"quick_gelu": quick_gelu, "gelu": gelu}
"""By `hidden_act` of the configuration."""


@dataclass(frozen=True)
class TextTowerSettings:
    """What a text tower is besides its weights.

    Attributes:
        layers: Number of its layers.
        heads: H.
        activation: A key of `ACTIVATIONS`.
        epsilon: Of LayerNorm.
        end: The id at which a text's feature is taken, where it stands first. None: at the highest id.
        limit: Largest text length.
    """

    layers: int
    heads: int
    activation: str
    epsilon: float
    end: int | None
    limit: int

    @classmethod
    def of(cls, config: Any) -> "TextTowerSettings | None":
        """Read the settings from a model's `config.text_config`. None: its activation is not known here."""
        if config.hidden_act not in ACTIVATIONS:
            return None
        return cls(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.hidden_act,
            config.layer_norm_eps,
            config.eos_token_id,
            config.max_position_embeddings,
        )


class PlainTextTower:
    """Encodes texts.

    Args:
        folder: A model's folder, with its tokenizer and `model.safetensors`.
        settings: Of the text tower.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file of the tokenizer is damaged.
        DamagedWeightsError: The weights are damaged. An OSError.

    Example::

        tower = PlainTextTower(Path("clip-vit-b32"), settings)
        tower.encode(["a cat", "a dog"])  # (2, 512) for ViT-B/32
    """

    def __init__(self, folder: Path, settings: TextTowerSettings):
        self.folder, self.settings = folder, settings
        self.tokenizer = PlainTokenizer(folder)
        path = folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}; check the path.")
        with self._reading():
            self._file = safe_open(str(path), "np")
        self._weights: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Encode texts, of which the end is cut off where they are too long.

        Args:
            texts: T texts.
            batch_size: Number of texts encoded at once.

        Returns:
            (T, D) float32, of length one.

        Raises:
            TextError: A text cannot be tokenized. A ValueError; its `index` is the text's place.
            DamagedWeightsError: The weights are damaged or of another model. An OSError.
        """
        found: np.ndarray | None = None
        for places, ids in text_batches(
            self.tokenizer, self.settings.limit, texts, batch_size=batch_size, settings={"truncation": True}
        ):
            features = self._features(ids)
            found = np.empty((len(texts), features.shape[1]), np.float32) if found is None else found
            found[places] = features
        return np.empty((0, 0), np.float32) if found is None else found

    def _features(self, ids: np.ndarray) -> np.ndarray:
        """Encode ids (T, L): features (T, D) of length one."""
        settings, length = self.settings, ids.shape[1]
        hidden = self._token_embeddings(ids) + self._weight("text_model.embeddings.position_embedding.weight")[:length]
        mask = np.triu(np.full((length, length), HIDDEN, np.float32), 1)
        for layer in range(settings.layers):
            part = f"text_model.encoder.layers.{layer}"
            hidden += self._attend(f"{part}.self_attn", self._normed(f"{part}.layer_norm1", hidden), mask)
            inner = self._linear(f"{part}.mlp.fc1", self._normed(f"{part}.layer_norm2", hidden))
            hidden += self._linear(f"{part}.mlp.fc2", ACTIVATIONS[settings.activation](inner))
        ends = (ids if settings.end is None else ids == settings.end).argmax(axis=1)
        pooled = self._normed("text_model.final_layer_norm", hidden[np.arange(len(ids)), ends])
        features = pooled @ self._weight("text_projection.weight").T
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), SMALLEST_NORM)

    def _token_embeddings(self, ids: np.ndarray) -> np.ndarray:
        """The token embeddings of ids (T, L): (T, L, W)."""
        known, places = np.unique(ids, return_inverse=True)
        with self._reading():
            table = self._file.get_slice("text_model.embeddings.token_embedding.weight")
            rows = np.concatenate([table[int(id) : int(id) + 1] for id in known]).astype(np.float32)
        return rows[places.reshape(ids.shape)]

    def _attend(self, name: str, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Attention of each position (T, L, W) to itself and those before it."""
        texts, length, width = hidden.shape
        heads = self.settings.heads

        def split(projection: str) -> np.ndarray:  # (T, H, L, E)
            return self._linear(f"{name}.{projection}", hidden).reshape(texts, length, heads, -1).swapaxes(1, 2)

        scale = np.float32((width // heads) ** -0.5)
        scores = split("q_proj") @ split("k_proj").swapaxes(2, 3) * scale + mask
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (powers / powers.sum(axis=-1, keepdims=True)) @ split("v_proj")
        return self._linear(f"{name}.out_proj", mixed.swapaxes(1, 2).reshape(texts, length, width))

    def _normed(self, name: str, hidden: np.ndarray) -> np.ndarray:
        """LayerNorm."""
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + np.float32(self.settings.epsilon))
        return scaled * self._weight(f"{name}.weight") + self._weight(f"{name}.bias")

    def _linear(self, name: str, hidden: np.ndarray) -> np.ndarray:
        # One product of two matrices: numpy would compute one for each text.
        flat = hidden.reshape(-1, hidden.shape[-1]) @ self._weight(f"{name}.weight").T
        return (flat + self._weight(f"{name}.bias")).reshape(*hidden.shape[:-1], -1)

    def _weight(self, name: str) -> np.ndarray:
        """A weight in float32, read when it is first needed."""
        if name not in self._weights:
            with self._reading():
                dtype = self._file.get_slice(name).get_dtype()
                if dtype not in DTYPES:  # numpy knows bfloat16 where another library has brought it
                    raise TypeError(f"{name} is {dtype}")
                self._weights[name] = self._file.get_tensor(name).astype(np.float32, copy=False)
        return self._weights[name]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, TypeError) as error:  # TypeError: of another dtype
            raise DamagedWeightsError(self.folder, error) from error


__all__ = ["ACTIVATIONS", "PlainTextTower", "TextTowerSettings"]
