"""From what the model gives to scores, in float64."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


def sigmoids(vectors: Sequence[Vector]) -> tuple[list[float], list[float]]:
    """Logits, and their sigmoids. For a yes/no reranker that is the softmax over `no` and `yes`, of which
    the logit is the difference. Raises ValueError for anything but one finite logit each."""
    logits = []
    for vector in vectors:
        if vector.shape != (1,) or not np.isfinite(vector[0]):
            raise ValueError(
                f"the model gave {vector[:4]}… of shape {vector.shape}; a reranker gives one finite logit"
            )
        logits.append(float(vector[0]))
    return logits, [_sigmoid(logit) for logit in logits]


def cosines(query: Vector, documents: Sequence[Vector]) -> list[float]:
    """Cosine of the query with each document; 0 where a vector is all zeros. Raises ValueError for NaN."""
    if not documents:
        return []
    left = query.astype(np.float64)
    right = np.stack(documents).astype(np.float64)
    norms = np.linalg.norm(left) * np.linalg.norm(right, axis=1)
    products = right @ left
    if not np.isfinite(norms).all():
        raise ValueError("the model gave an embedding that is not finite")
    return [float(p / n) if n else 0.0 for p, n in zip(products, norms, strict=True)]


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
