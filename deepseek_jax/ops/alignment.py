"""Token alignment, the weighting of several losses, and signs that embeddings collapse.

Alignment: REPA, arXiv 2410.06940, section 3, with the cosine as similarity. Learned weights:
Kendall, Gal and Cipolla, arXiv 1705.07115, section 3.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.ops.contrastive import Kind, l2_normalized
from deepseek_jax.ops.matmul import dot

COLLAPSED_COSINE = 0.95  # a mean over pairs above it: hardly anything tells embeddings apart
STUCK = 0.01  # a loss this near (relatively) to that of guessing


def alignment_terms(
    features: Float[Array, "B T D"],
    targets: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """1 - cosine, summed over the tokens of the mask, and how many those are.

    Of features projected to the targets' width; what the mask leaves out has no effect, nor NaN
    there. Whether targets learn is the caller's choice: REPA stops their gradient.
    """
    features, targets = (
        l2_normalized(jnp.where(mask[..., None], x, 0.0)) for x in (features, targets)
    )
    losses = jnp.where(mask, 1.0 - (features * targets).sum(-1), 0.0)
    return losses.sum(), mask.sum().astype(jnp.float32)


def uncertainty_terms(
    terms: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]],
    log_variances: Mapping[str, Float[Array, ""]],
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Each (sum, weight) that has a learned log-variance s, so that its mean is exp(-s) L + s / 2.

    That is Kendall's form for a classification (equation 10: L / sigma^2 + log sigma), which
    contrastive and captioning losses are. It is also the one for a regression (equation 7:
    |error|^2 / (2 sigma^2) + log sigma) of a loss that is half a squared distance, as 1 - cosine
    of unit vectors is: all three terms take the same. Least at exp(-s) = 1 / (2 L), where every
    term weighs 1/2, whatever its scale. Of losses that are not negative. A batch without rows of a
    term leaves its s alone.
    """
    return {
        name: (jnp.exp(-s) * terms[name][0] + s / 2 * terms[name][1], terms[name][1])
        for name, s in log_variances.items()
    }


def total_loss(
    losses: Mapping[str, Float[Array, ""]],
    lambdas: Mapping[str, float],
    log_variances: Mapping[str, Float[Array, ""]] | None = None,
) -> Float[Array, ""]:
    """The sum of lambda * loss over `lambdas`; where a term has a log-variance s, of
    lambda * (exp(-s) loss + s / 2), as `uncertainty_terms` says.

    Raises KeyError for a lambda without loss, ValueError for a log-variance without lambda.
    """
    learned = log_variances or {}
    if unknown := set(learned) - set(lambdas):
        raise ValueError(f"log-variances without lambda: {sorted(unknown)}")
    one = jnp.ones((), jnp.float32)
    weighted = uncertainty_terms({name: (losses[name], one) for name in learned}, learned)
    values = {name: pair[0] for name, pair in weighted.items()}
    total = jnp.zeros((), jnp.float32)
    for name, factor in lambdas.items():
        total = total + factor * values.get(name, losses[name])
    return total


def guessing_loss(kind: Kind, rows: Float[Array, ""]) -> Float[Array, ""]:
    """What a contrastive loss is, at best, where all embeddings are the same: to stand beside it.

    Softmax: log(rows). Sigmoid: every pairing a positive with probability 1 / rows, which is
    log(rows) and, for many rows, 1 more. Duplicates among the rows make it less.
    """
    rows = jnp.maximum(rows, 1.0)
    if kind == "softmax":
        return jnp.log(rows)
    others = jnp.maximum(rows - 1.0, 1.0)
    return jnp.log(rows) - (rows - 1.0) * jnp.log(others / rows)


def collapse_signs(
    embeddings: Float[Array, "B D"], valid: Bool[Array, " B"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Of a batch's valid embeddings: `log_batch`, `mean_cosine`, `effective_rank`.

    `mean_cosine` of all pairs of different rows: 1 where all are one point, about 0 where they
    spread. `effective_rank`: the participation ratio (sum s)^2 / sum s^2 of the squared singular
    values s of the normalized embeddings, which is 1 for one point and at most min(B, D): low where
    only a few directions are used, though no two rows are the same. Both from D x D sums.
    """
    if valid is None:
        valid = jnp.ones(embeddings.shape[0], bool)
    x = jax.lax.stop_gradient(l2_normalized(jnp.where(valid[:, None], embeddings, 0.0)))
    count = valid.sum().astype(jnp.float32)
    total, lengths = x.sum(0), (x * x).sum()
    pairs = jnp.maximum(count * (count - 1.0), 1.0)
    squares = dot("bd,be->de", x, x)
    return {
        "log_batch": jnp.log(jnp.maximum(count, 1.0)),
        "mean_cosine": ((total * total).sum() - lengths) / pairs,
        "effective_rank": lengths**2 / jnp.maximum((squares * squares).sum(), 1e-30),
    }


def collapse_warning(
    mean_cosine: float, loss: float | None = None, guessing: float | None = None
) -> str | None:
    """A sentence that says why embeddings look collapsed; None where they do not.

    `loss` beside `guessing` (`guessing_loss`): leave both out while a model has just begun, when a
    loss that is no better than guessing means nothing.
    """
    if not math.isfinite(mean_cosine):
        return "the embeddings are not finite"
    if mean_cosine > COLLAPSED_COSINE:
        return (
            f"embeddings collapse: the mean cosine of different rows is {mean_cosine:.3f}; lower "
            "the learning rate, or look whether the inputs differ"
        )
    if loss is not None and guessing is not None and abs(loss - guessing) < STUCK * guessing:
        return (
            f"the contrastive loss ({loss:.3f}) is that of guessing ({guessing:.3f}): nothing is "
            "learned; look at the pairing, the temperature and the learning rate"
        )
    return None
