"""Packing: rows laid end to end in one sequence, without seeing each other; which rows go together, and the proof.

`recipe.packing` says in which way a model keeps the rows of a pack apart.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.certify import TOLERANCE, largest_difference
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.segments import BY_ROW
from peftkit.errors import Problem, RecipeError
from peftkit.recipe.packing import Way, packs_by, why_not_packed
from peftkit.tasks.example import Batch

Forward = Callable[[Any, Batch], torch.Tensor]

_MOST_ROWS, _MOST_TOKENS = 3, 16
_NUM_PADDING = 2
# How much more than rounding a row may differ behind other rows. What rounding does is seen in the first row of a pack, which
# nothing can reach: it differs from the row alone by another order of summation, and by an expert's place in a tie.
_OVER_ROUNDING = 10.0


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows by pack: best-fit decreasing (Johnson et al. 1974, SIAM J. Comput. 3, 299), at most 11/9 of the fewest.

    The longest row goes first, each to the fullest pack with room for it, the oldest of equals. Packs, and rows within a pack,
    are in the order of their smallest row. A row longer than the capacity gets a pack of its own.

    Args:
        lengths: tokens of each row.
        capacity: most tokens of a pack.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room -> heap of packs
    rooms: list[int] = []  # those that occur, in order
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(rooms, lengths[row])
        if place == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            pack = heapq.heappop(by_room[room])
            if not by_room[room]:
                del by_room[room], rooms[place]
        packs[pack].append(row)
        left = room - lengths[row]
        if left > 0 and left not in by_room:
            insort(rooms, left)
        if left > 0:
            heapq.heappush(by_room.setdefault(left, []), pack)
    return sorted(sorted(pack) for pack in packs)


def block_positions(lengths: Sequence[int], width: int) -> list[int]:
    """Position ids of one pack of rows, padded to a width: they start at 0 with every row and with every token of padding."""
    positions = [place for length in lengths for place in range(length)]
    return positions + [0] * (width - len(positions))


def way_of(model: nn.Module) -> Way:
    """How a model, adapted or not, keeps packed rows apart with its attention.

    Raises:
        RecipeError: it cannot.
    """
    config: Any = base_of_adapted(model).config
    facts, attention = config.to_dict(), config._attn_implementation
    if attention in BY_ROW:
        return "rows"
    if reason := why_not_packed(facts, attention):
        raise RecipeError([Problem("", "data.packing", reason)])
    return packs_by(facts, attention)


def for_model(batch: Batch, model: nn.Module, way: Way) -> dict[str, Any]:
    """A packed batch in the form in which the model keeps its rows apart.

    Args:
        batch: tensors (P, T), `input_ids` and `position_ids` among them, no `attention_mask`; on the model's device.
        model: the model, adapted or not.
        way: what `way_of` says.

    Returns:
        With `positions` the batch as it is. With `mask` the same and `attention_mask`, in what form the model's attention takes
        it: a tensor (P, 1, T, T), or one for each kind of layer. With `one_sequence` and `rows` tensors (1, P * T), the latter
        with that mask where the model takes it: it then says where rows begin.
    """
    if way in ("one_sequence", "rows"):
        batch = {name: tensor.reshape(1, -1, *tensor.shape[2:]) for name, tensor in batch.items()}
        by_mask = way == "rows" and packs_by(base_of_adapted(model).config.to_dict()) == "mask"  # type: ignore[operator, union-attr]
        return for_model(batch, model, "mask") if by_mask else batch
    return batch | {"attention_mask": block_mask(model, batch["position_ids"])} if way == "mask" else batch


def block_mask(model: nn.Module, position_ids: torch.Tensor) -> Any:
    """The causal mask within the rows of packs, as transformers makes it for the model's attention.

    Args:
        model: the model, adapted or not.
        position_ids: (P, T), starting again at 0 with every row.
    """
    base: Any = base_of_adapted(model)
    dtype = base.get_input_embeddings().weight.dtype
    # Only shape, dtype and device of the embeddings are read.
    embeddings = torch.empty(*position_ids.shape, 1, dtype=dtype, device=position_ids.device)
    return create_masks_for_generate(base.config.get_text_config(), embeddings, None, None, position_ids)


def prove_packing(model: nn.Module, rows: Sequence[Sequence[int]], forward: Forward) -> float:
    """The largest difference that packing makes to a logit of a few rows, each of them once in every place of a pack.

    Training mode, random numbers and gradients stay as they are.

    Args:
        model: the model with its adapter.
        rows: token ids of real rows; the first three are read, 16 tokens of each.
        forward: (model, batch) -> logits (B, T, V), as in training.

    Raises:
        RecipeError: rows change each other, or the model does not take packed rows.
    """
    way, device = way_of(model), next(model.parameters()).device
    chosen = _probes(rows)
    orders = [[*range(first, len(chosen)), *range(first)] for first in range(len(chosen))]
    with untouched(model):
        try:
            alone = [_logits(model, forward, {"input_ids": torch.tensor([row], device=device)})[0] for row in chosen]
            batch = for_model(_packed(chosen, orders, device), model, way)
            logits = _logits(model, forward, batch)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError) as error:
            raise_if_exhausted(error)
            what = f"{_name(model)} does not take packed rows: {type(error).__name__}: {error}"
            raise RecipeError([Problem("", "data.packing", what)]) from error
    logits = logits.reshape(len(orders), -1, logits.shape[-1])  # (P, T, V)
    return _judge(model, alone, [_cut(logits[pack], order, alone) for pack, order in enumerate(orders)])


def _probes(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Two or three rows of real tokens; a lone row is joined by itself, read backwards."""
    chosen = [list(row[:_MOST_TOKENS]) for row in rows if row][:_MOST_ROWS]
    assert chosen, "there are rows to train on"
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0][::-1]]


def _packed(rows: Sequence[Sequence[int]], orders: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """All rows in each of the orders, and padding."""
    lengths = [[len(rows[row]) for row in order] for order in orders]
    width = sum(lengths[0]) + _NUM_PADDING
    ids = [[token for row in order for token in rows[row]] + [0] * _NUM_PADDING for order in orders]
    positions = [block_positions(parts, width) for parts in lengths]
    return {"input_ids": torch.tensor(ids, device=device), "position_ids": torch.tensor(positions, device=device)}


def _logits(model: nn.Module, forward: Forward, batch: Batch) -> torch.Tensor:
    return forward(model, batch).float().cpu()


def _cut(logits: torch.Tensor, order: Sequence[int], alone: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The logits (T, V) of one pack by row, first row first."""
    parts = logits[: sum(map(len, alone))].split([len(alone[row]) for row in order])
    return dict(zip(order, parts, strict=True))


def _judge(model: nn.Module, alone: Sequence[torch.Tensor], packs: Sequence[dict[int, torch.Tensor]]) -> float:
    """The largest difference of all.

    Raises:
        RecipeError: a row behind others differs by more than the first rows do, or any row by more than 16 bits explain.
    """
    scale = max(float(logits.abs().max()) for logits in alone)
    firsts, others = [], []
    for pack in packs:
        differences = [largest_difference([logits], [alone[row]]) for row, logits in pack.items()]
        firsts.append(differences[0])
        others += differences[1:]
    most = TOLERANCE["bfloat16"] * scale
    allowed = min(most, max(TOLERANCE["float32"] * scale, _OVER_ROUNDING * max(firsts)))
    if max(others) <= allowed and max(firsts) <= most:
        return max(*firsts, *others)
    worst = max(others) if max(others) > allowed else max(firsts)
    what = (
        f"{_name(model)} does not keep packed rows apart: logits of a row change by {worst:.3g} in a pack (allowed "
        f"{allowed:.3g}); set `data.packing: false`, or another `model.attn_implementation`"
    )
    raise RecipeError([Problem("", "data.packing", what)])


def _name(model: nn.Module) -> str:
    base: Any = base_of_adapted(model)
    return f"{type(base).__name__} with {base.config._attn_implementation} attention"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are put back."""
    training, device = [module for module in model.modules() if module.training], next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
