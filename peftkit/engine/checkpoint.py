"""Full checkpoints: what a run needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from peftkit.engine.adapter import load_trainable_state, read_tensors, trainable_state
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.hardware import process_index
from peftkit.engine.sharding import is_sharded
from peftkit.errors import LoadError
from peftkit.run import Run, new_folder, write_json

TENSORS, OPTIMIZER, RNG, STATE = "trainable.safetensors", "optimizer.pt", "rng.pt", "state.json"


@dataclass
class Progress:
    """How far a run is; written with every checkpoint.

    Attributes:
        step: optimizer steps done.
        target_tokens: targets trained on so far.
        seconds: time spent in training steps so far.
        best_value: best metric so far; None before the first evaluation.
        best_step: the step it was reached at.
        evaluations_without_best: since then, for early stopping.
        loss_sum: summed loss since the last logged line.
        loss_targets: targets that sum is over.
        stopped_early: whether early stopping ended the run.
        skipped_steps: steps whose gradients were not finite under fp16, so that nothing was learned in them.
        spikes: odd steps since the last logged line (see engine.spikes).
        recent: loss, gradient norm and whether it was odd, of each of the last steps.
    """

    step: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    evaluations_without_best: int = 0
    loss_sum: float = 0.0
    loss_targets: float = 0
    stopped_early: bool = False
    skipped_steps: int = 0
    spikes: int = 0
    recent: list[tuple[float, float, bool]] = field(default_factory=list)


def checkpoint_dir(run: Run, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run.checkpoints_dir / f"step-{step:06d}"


def list_checkpoints(run: Run) -> list[Path]:
    """Checkpoints of a run, oldest first; they are written atomically, so that none is there by half."""
    return sorted(run.checkpoints_dir.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(run: Run, model: nn.Module, parts: dict[str, Any], progress: Progress, keep: int) -> None:
    """Write a checkpoint from rank 0 and remove the oldest beyond `keep`; every rank must call it.

    Args:
        run: the run.
        model: the unwrapped model.
        parts: objects with `state_dict()`: optimizer, scheduler and, under fp16, scaler.
        progress: how far the run is.
        keep: checkpoints to keep.
    """
    states, writes = gather_object([rng_state()]), process_index() == 0
    if not writes and not is_sharded(model):
        return
    tensors, kept = trainable_state(model), {name: part.state_dict() for name, part in parts.items()}
    if not writes:
        return
    with new_folder(checkpoint_dir(run, progress.step)) as folder:
        save_file(tensors, folder / TENSORS)
        torch.save(kept, folder / OPTIMIZER)
        torch.save(states, folder / RNG)
        write_json(folder / STATE, dataclasses.asdict(progress))
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(path: Path, model: nn.Module, parts: dict[str, Any], process: int) -> Progress:
    """Put a checkpoint back into the model, the optimizer and the random number generators.

    Raises:
        LoadError: a file of it is missing or damaged.
    """
    try:
        load_trainable_state(model, read_tensors(path / TENSORS))
        states = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(states[name])
        generators = torch.load(path / RNG, weights_only=True)
        if process < len(generators):
            set_rng_state(generators[process])
        return Progress(**json.loads((path / STATE).read_text()))
    except (LoadError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise_if_exhausted(error)
        raise LoadError(f"the checkpoint {path} cannot be loaded: {error}") from error


def save_best(run: Run, model: nn.Module) -> None:
    """Keep the trained tensors of the best evaluation so far, from rank 0; every rank must call it."""
    tensors = trainable_state(model) if process_index() == 0 or is_sharded(model) else {}
    if process_index() != 0:
        return
    with new_folder(run.checkpoints_dir / "best") as folder:
        save_file(tensors, folder / TENSORS)


def load_best(run: Run, model: nn.Module) -> None:
    """Put the best tensors back into the model."""
    load_trainable_state(model, read_tensors(run.checkpoints_dir / "best" / TENSORS))


def rng_state() -> dict[str, Any]:
    """State of the generators that training draws from: dropout, NEFTune noise."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    version, internal, gauss = random.getstate()
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(internal), gauss]}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put `rng_state` back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
