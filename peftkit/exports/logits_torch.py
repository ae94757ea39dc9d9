"""Logits of a client against those of the model that was exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftkit.exports.base import Check


def compare_logits(client: str, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], relative: float) -> Check:
    """The check of a client that gives logits.

    Args:
        client: program and version.
        expected: of every row, from the model that was exported.
        found: the client's, of the same shapes.
        relative: largest allowed difference over the largest logit (at least 1).
    """
    if wrong := [(tuple(a.shape), tuple(b.shape)) for a, b in zip(expected, found, strict=True) if a.shape != b.shape]:
        return Check(client, False, f"gives logits of shape {wrong[0][1]} in place of {wrong[0][0]}")
    tolerance = relative * max(1.0, *(float(part.abs().max()) for part in expected))
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in zip(expected, found, strict=True))
    detail = f"logits of {len(expected)} rows differ by at most {difference:.3g} (allowed {tolerance:.3g})"
    return Check(client, difference <= tolerance, detail, {"max_abs_diff": difference, "tolerance": tolerance})
