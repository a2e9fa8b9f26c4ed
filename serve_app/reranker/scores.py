"""From what the model gives to scores, in float64."""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


def sigmoids(vectors: Vectors) -> tuple[list[float], list[float]]:
    """Logits of shape (documents, 1), and their sigmoids. For a yes/no reranker that is the softmax over `no` and
    `yes`, of which the logit is the difference. Raises ValueError for anything but one finite logit each."""
    if vectors.shape[1:] != (1,) or not np.isfinite(vectors).all():
        raise ValueError(
            f"the model gave {vectors[:4].tolist()}… of shape {vectors.shape}; a reranker gives one finite logit"
        )
    logits = vectors[:, 0].astype(np.float64)
    small = np.exp(-np.abs(logits))
    return logits.tolist(), (np.where(logits >= 0, 1, small) / (1 + small)).tolist()


def cosines(query: Vectors, documents: Vectors) -> list[float]:
    """Cosine of the query with each document; 0 where a vector is all zeros. Raises ValueError for NaN."""
    left = query.astype(np.float64)
    right = documents.astype(np.float64)
    norms = np.linalg.norm(left) * np.linalg.norm(right, axis=1)
    products = right @ left
    if not np.isfinite(norms).all():
        raise ValueError("the model gave an embedding that is not finite")
    return [float(p / n) if n else 0.0 for p, n in zip(products, norms, strict=True)]
