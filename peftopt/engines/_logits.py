"""Logits to scores with numpy, for engines that compute without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftopt.engines import TOP_K, Scores

if TYPE_CHECKING:
    import numpy as np


def scored(logits: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of answer tokens from their logits [tokens, vocabulary]: log-probabilities [n], the likeliest tokens and their
    log-probabilities [n, k], and whether all logits are finite [n]."""
    import numpy as np

    highest = logits.max(axis=1, keepdims=True)
    total = highest + np.log(np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64))
    count = min(TOP_K, logits.shape[1])
    top = np.argpartition(logits, -count, axis=1)[:, -count:]
    values = np.take_along_axis(logits, top, axis=1)
    order = np.lexsort((top, -values))  # most likely first, of equals the lower id, as argmax has it
    top, values = (np.take_along_axis(each, order, axis=1) for each in (top, values))
    own = np.take_along_axis(logits, given[:, None], axis=1) - total
    return own[:, 0], top, values - total, np.isfinite(logits).all(axis=1)


def scores_of(own: np.ndarray, top: np.ndarray, logs: np.ndarray, finite: np.ndarray) -> Scores:
    """The scores of one answer, from its tokens' scores as `scored` returns them."""
    return Scores(own.tolist(), top[:, 0].tolist(), top.tolist(), logs.tolist(), bool(finite.all()))
