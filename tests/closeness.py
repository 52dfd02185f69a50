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
