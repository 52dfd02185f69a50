"""LP++ (Huang et al. 2024, arXiv:2404.02285): a few-shot classifier that blends images with the classes' texts.

The logit of image i for class k is f_i · (w_k + α_k t_k) + b_k, with a visual prototype w_k and a multiplier α_k for
each class. All of it is fitted to all shots at once:

1. w_k begins as the sum of the class's features, and all α_k as 250 times the mean similarity of shots and texts.
2. 300 steps of gradient descent with momentum 0.9. The step size is 4 I over the largest eigenvalue of FᵀF, where F
   (I, D) are the features. It is the inverse of a Lipschitz constant of the gradient, so nothing is searched.
3. Every tenth step α follows its gradient, with a step size from its own Lipschitz constant.
4. The step with the best accuracy on the validation shots is taken, the last of equal ones.

This is what the authors' program does, but for b, which begins at zero and not at small random numbers. Step 1 takes
for granted that images and texts are similar on average, as they are to OpenAI's models; where the mean similarity is
negative, the texts begin with a negative weight.

Dimensions: I images, K classes, D embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .metrics import ranks_of_labels

STEPS = 300
MOMENTUM = 0.9
MULTIPLIER = 250
ALPHA_EVERY = 10


@dataclass(frozen=True)
class BlendedHead:
    """The classifier.   weight: (K, D), w   bias: (K,), b   alpha: (K,)   texts: (K, D), of length one   step: taken"""

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    texts: Tensor
    step: int

    def logits(self, features: Tensor) -> Tensor:
        """(I, D) of length one → (I, K)."""
        return features @ self.weight.T + self.bias + self.alpha * (features @ self.texts.T)


def step_size_of_weight(features: Tensor) -> float:
    """Return 4 I over the largest eigenvalue of FᵀF.   features: (I, D)"""
    return 4 * len(features) / float(torch.linalg.eigvalsh(features.T @ features)[-1])


def step_size_of_alpha(similarities: Tensor) -> float:
    """Return I over four times the largest sum of squared similarities to a class.   similarities: (I, K)

    0 where all similarities are 0, since α has no gradient there.
    """
    largest = float(similarities.square().sum(0).max())
    return len(similarities) / (4 * largest) if largest > 0 else 0.0


def first_alpha(similarities: Tensor, labels: Tensor) -> float:
    """Return 250 times the mean, over classes and texts, of the mean similarity (I, K) of a class's shots to a text."""
    member = one_hot(labels, similarities.shape[1]).float()  # (I, K)
    means = member.T @ similarities / member.sum(0).clamp(min=1)[:, None]  # (K, K)
    return MULTIPLIER * float(means[member.sum(0) > 0].mean())


def gradients(logits: Tensor, member: Tensor, features: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the mean cross-entropy in w, b and α.

    Args:
        logits: (I, K).
        member: (I, K), 1 for a shot's class and 0 for the others.
        features: (I, D).
        similarities: (I, K) of shots and texts.

    Returns:
        (K, D), (K,) and (K,).
    """
    residual = (logits.softmax(1) - member) / len(logits)  # (I, K)
    return residual.T @ features, residual.sum(0), (residual * similarities).sum(0)


def fit_lp_plus_plus(
    features: Tensor, labels: Tensor, texts: Tensor, validation: tuple[Tensor, Tensor] | None = None
) -> BlendedHead:
    """Fit LP++.

    Args:
        features: (I, D) features of the shots, of length one.
        labels: (I,) places of the classes.
        texts: (K, D) features of the classes' prompts, of length one.
        validation: Features and labels that the step is chosen on. None: the last step is taken.

    Returns:
        The classifier.
    """
    similarities = features @ texts.T  # (I, K)
    member = one_hot(labels, len(texts)).to(features.dtype)
    head = BlendedHead(
        member.T @ features,
        torch.zeros(len(texts)),
        torch.full((len(texts),), first_alpha(similarities, labels)),
        texts,
        0,
    )
    weight_step, alpha_step = step_size_of_weight(features), step_size_of_alpha(similarities)
    speed = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
    best, best_right = head, -1
    for step in range(1, STEPS + 1):
        found = gradients(head.logits(features), member, features, similarities)
        speed = MOMENTUM * speed[0] + found[0], MOMENTUM * speed[1] + found[1]
        head = BlendedHead(
            head.weight - weight_step * speed[0],
            head.bias - weight_step * speed[1],
            head.alpha - alpha_step * found[2] if step % ALPHA_EVERY == 0 else head.alpha,
            texts,
            step,
        )
        if validation is not None:
            right = int((ranks_of_labels(head.logits(validation[0]), validation[1]) == 0).sum())
            if right >= best_right:
                best, best_right = head, right
    return head if validation is None else best
