"""Several LoRA or IA3 adapters as one: the arithmetic, layer by layer, on the adapters' own tensors.

The functions on tensors are PEFT's (`peft.utils.merge_utils`). What its `add_weighted_adapter` (0.21) makes of them is not used
here: it keeps the rsLoRA scale and choice of layers of the first adapter, refuses heads, and takes a layer that an IA3
adapter has not for one that it silences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from peftkit.combination import ON_FACTORS, Combination

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What one LoRA adds to one layer: scale * b @ a.

    Attributes:
        a: (rank, inputs), float32.
        b: (outputs, rank), likewise.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def combined_layer(updates: Sequence[Update], weights: Sequence[float], how: Combination, rank: int) -> Update:
    """One layer of the combination, at scale 1 and filled up with zeros to `rank`.

    Args:
        updates: of those adapters that have the layer.
        weights: theirs.
        how: the combination.
        rank: of the result.
    """
    if how.method in ON_FACTORS:
        found = _on_factors(updates, weights, how)
    elif how.method == "cat":
        found = weighted_sum(updates, weights)
    elif how.method == "svd":
        found = _truncated(weighted_sum(updates, weights), rank)
    else:
        dense = [update.scale * (update.b @ update.a) for update in updates]
        left, values, right = torch.linalg.svd(_mixed(dense, weights, how), full_matrices=False)
        found = Update(right[:rank], left[:, :rank] * values[:rank], 1.0)
    room = rank - found.a.shape[0]
    pad = torch.nn.functional.pad
    return Update(pad(found.a, (0, 0, 0, room)).contiguous(), pad(found.b, (0, room)).contiguous(), 1.0)


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """sum_n w_n s_n B_n A_n exactly, at the sum of the ranks (`cat`)."""
    pairs = list(zip(updates, weights, strict=True))
    b = torch.cat([update.b * (weight * update.scale) for update, weight in pairs], dim=1)
    return Update(torch.cat([update.a for update in updates]), b, 1.0)


def _truncated(update: Update, rank: int) -> Update:
    """The best approximation of a rank (Eckart and Young 1936), from the factors: B A = Q_b (R_b R_a^T) Q_a^T."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(update.b), torch.linalg.qr(update.a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Update(right[:rank] @ q_a.T, (q_b @ left[:, :rank]) * values[:rank], 1.0)


def _on_factors(updates: Sequence[Update], weights: Sequence[float], how: Combination) -> Update:
    """A and B each combined by itself, the weight's square root on either side and its sign on one, as PEFT does it."""
    scaled = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
    a = _mixed([update.a for update in updates], signed, how)
    return Update(a, _mixed([update.b for update in updates], roots, how), 1.0)


def _mixed(tensors: list[torch.Tensor], weights: Sequence[float], how: Combination) -> torch.Tensor:
    """The method on tensors of one shape, by PEFT's functions."""
    factors, name = torch.tensor(weights), how.method.removesuffix("_svd")
    functions: Mapping[str, Callable[[], torch.Tensor]] = {
        "linear": lambda: task_arithmetic(tensors, factors),
        "ties": lambda: ties(tensors, factors, how.density, how.majority_sign_method),
        "dare_ties": lambda: dare_ties(tensors, factors, how.density, how.majority_sign_method),
        "dare_linear": lambda: dare_linear(tensors, factors, how.density),
        "magnitude_prune": lambda: magnitude_prune(tensors, factors, how.density),
    }
    return functions[name]()


def combined_whole(tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor | None) -> torch.Tensor:
    """A tensor that was trained whole: W + sum_n w_n (W_n - W); of a new head, which has no W, the weighted mean.

    Args:
        tensors: of those adapters that have it.
        weights: theirs.
        base: the base model's; None where its checkpoint has none.
    """
    start = tensors[0].float() * 0 if base is None else base.float().cpu()
    total = sum(weights) if base is None else 1.0
    shares = torch.tensor([weight / total for weight in weights])
    return (start + task_arithmetic([tensor.float() - start for tensor in tensors], shares)).to(tensors[0].dtype)


def combined_vector(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """IA3: 1 + sum_n w_n (l_n - 1), which is PEFT's sum_n w_n l_n where the weights of the layer add up to 1."""
    return 1 + task_arithmetic([vector.float() - 1 for vector in vectors], torch.tensor(weights))


def squared_error(found: Update, exact: Update) -> tuple[float, float]:
    """Squared Frobenius norms of found - exact and of exact, from the factors; see `relative_error`."""
    difference = weighted_sum([_double(found), _double(exact)], [1.0, -1.0])
    return _norm(difference) ** 2, _norm(exact) ** 2


def _double(update: Update) -> Update:
    return Update(update.a.double(), update.b.double(), update.scale)


def _norm(update: Update) -> float:
    """Frobenius norm of b @ a: that of the small product R_b R_a^T, in float64."""
    r_b, r_a = (torch.linalg.qr(matrix.double(), mode="r").R for matrix in (update.b, update.a.T))
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def relative_error(parts: Sequence[tuple[float, float]]) -> float:
    """||D - sum_n w_n D_n|| / ||sum_n w_n D_n|| over all layers together (Frobenius); 0 where both are 0.

    Args:
        parts: of each layer, see `squared_error`.
    """
    error, size = (math.sqrt(sum(part)) for part in zip(*parts, strict=True)) if parts else (0.0, 0.0)
    return error / size if size else (math.inf if error else 0.0)
