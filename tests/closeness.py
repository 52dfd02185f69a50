"""How near the results of two float computations must be to count as the same.

Two calls of a model give equal bits only where every product runs on equally aligned memory with equally many threads:
some math libraries choose their loops by both. `torch.equal` compares weights, ids, pixels and whatever else was only
moved or cut, and `assert_same_features` compares results that were computed twice.
"""

import torch
from torch import Tensor


def assert_same_features(found: Tensor, expected: Tensor) -> None:
    """Features, embeddings, logits or losses of the same computation, done twice in the same type."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients of the same loss, computed in two ways, by parameter.

    Compared by their norms: single elements of a sum over a batch lose more to rounding than the whole. A gradient that
    is zero but for rounding, as a key's bias has, is compared with those of all parameters.
    """
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error < 1e-5 * float(gradient.norm()) + 1e-7 * largest, name
