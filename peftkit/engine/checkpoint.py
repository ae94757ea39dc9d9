"""Full checkpoints: what a run needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors.torch import save_file
from torch import nn

from peftkit.engine.adapter import load_trainable_state, read_tensors, trainable_state
from peftkit.engine.checksums import damage_of, write_checksums
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.hardware import process_index
from peftkit.engine.sharding import is_sharded
from peftkit.errors import LoadError
from peftkit.guides import RESUME
from peftkit.run import Run, new_folder, remove_folder, write_json

TENSORS, OPTIMIZER, RNG, STATE = "trainable.safetensors", "optimizer.pt", "rng.pt", "state.json"
IDENTITY = "identity.json"  # fingerprints of the recipe, rows and model that it belongs to


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
        metrics_bytes: size of metrics.jsonl when the last checkpoint was written.
        rows: digest of the rows since the last logged line, see `peftkit.engine.digest`.
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
    metrics_bytes: int = 0
    rows: str = ""


def checkpoint_dir(run: Run, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run.checkpoints_dir / f"step-{step:06d}"


def best_dir(run: Run, step: int) -> Path:
    """Folder of the trained tensors of the best evaluation, which was after `step` steps."""
    return run.checkpoints_dir / f"best-{step:06d}"


def list_checkpoints(run: Run) -> list[Path]:
    """Checkpoints of a run, oldest first; they are written atomically, so that none is there by half."""
    return _numbered(run, "step")


def _numbered(run: Run, kind: str) -> list[Path]:
    return sorted((path for path in run.checkpoints_dir.glob(f"{kind}-*") if path.name[5:].isdigit()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


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
    progress.metrics_bytes = run.sync_metrics()
    with new_folder(checkpoint_dir(run, progress.step)) as folder:
        save_file(tensors, folder / TENSORS)
        torch.save(kept, folder / OPTIMIZER)
        torch.save(states, folder / RNG)
        write_json(folder / STATE, dataclasses.asdict(progress))
        write_json(folder / IDENTITY, run.identity)
        write_checksums(folder)
    _remove_old(run, progress.step, keep)


def _remove_old(run: Run, step: int, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, and what was best in them alone.

    Those of later steps are damaged ones that a resumed run has passed over: they are no reason to remove a sound one.
    """
    for old in [path for path in list_checkpoints(run) if _step_of(path) <= step][:-keep]:
        remove_folder(old)
    needed = {_best_step(path) for path in list_checkpoints(run)}
    for best in _numbered(run, "best")[:-1]:
        if _step_of(best) not in needed:
            remove_folder(best)


def _best_step(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: nothing can go on from there


def find_checkpoint(run: Run, note: Callable[[str], None], *, needs_best: bool) -> Path | None:
    """The newest sound checkpoint, None where the run has none; rank 0 looks, all ranks must call it and get the same.

    Args:
        run: the run.
        note: told of every checkpoint that is passed over, and why; these are left where they are.
        needs_best: whether the tensors of its best evaluation must be there too.

    Raises:
        LoadError: there are checkpoints, and none of them is sound.
    """
    found: list[Any] = [None, ""]
    if process_index() == 0:
        found = [*_newest_sound(run, note, needs_best)]
    if torch.distributed.is_initialized():
        broadcast_object_list(found)
    path, damage = found
    if path is None and damage:
        text = f"no checkpoint of {run.dir} can be loaded:{damage}\nStart again without `--resume`, in a new folder"
        raise LoadError(text, guide=RESUME)
    return path


def _newest_sound(run: Run, note: Callable[[str], None], needs_best: bool) -> tuple[Path | None, str]:
    """The checkpoint, and what is wrong with those passed over, a line each."""
    passed_over = ""
    for path in reversed(list_checkpoints(run)):
        damage = damage_of(path) or _foreign(path, run)
        if not damage and needs_best and (step := _best_step(path)) and (hurt := damage_of(best_dir(run, step))):
            damage = f"the best adapter until then, {best_dir(run, step).name}, is damaged: {hurt}"
        if not damage:
            return path, passed_over
        note(f"note: the checkpoint {path} is passed over: {damage}")
        passed_over += f"\n  {path}: {damage}"
    return None, passed_over


def _foreign(path: Path, run: Run) -> str | None:
    """Which fingerprints of a checkpoint are not the run's, now or before something was forced."""
    own = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
    known = [run.identity, *(forced["was"] for forced in run.read_environment().get("forced", []))]
    if own in known:
        return None
    return f"it is of another {' and '.join(key for key in own if own[key] != known[0].get(key)) or 'run'}"


def load_checkpoint(path: Path, model: nn.Module, parts: dict[str, Any], process: int, seed: int) -> Progress:
    """Put a checkpoint back into the model, the optimizer and the random number generators.

    A process that did not exist when it was written draws from generators seeded by `seed`, its number and the step.

    Raises:
        LoadError: a file of it is missing, damaged, or of another version of peftkit.
    """
    try:
        load_trainable_state(model, read_tensors(path / TENSORS))
        states = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(states[name])
        progress = Progress(**json.loads((path / STATE).read_text()))
        generators = torch.load(path / RNG, weights_only=True)
    except (LoadError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise_if_exhausted(error)
        raise LoadError(f"the checkpoint {path} cannot be loaded: {error}") from error
    if process < len(generators):
        set_rng_state(generators[process])
    else:
        set_seed(random.Random(f"{seed} {process} {progress.step}").getrandbits(32))
    return progress


def save_best(run: Run, model: nn.Module, step: int) -> None:
    """Keep the trained tensors of the best evaluation so far, from rank 0; every rank must call it.

    Earlier ones stay while a checkpoint needs them.
    """
    tensors = trainable_state(model) if process_index() == 0 or is_sharded(model) else {}
    if process_index() != 0:
        return
    with new_folder(best_dir(run, step)) as folder:
        save_file(tensors, folder / TENSORS)
        write_checksums(folder)


def load_best(run: Run, model: nn.Module, step: int) -> None:
    """Put the best tensors back into the model.

    Raises:
        LoadError: they are damaged.
    """
    folder = best_dir(run, step)
    if damage := damage_of(folder):
        raise LoadError(f"the best adapter {folder} cannot be loaded: {damage}")
    load_trainable_state(model, read_tensors(folder / TENSORS))


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
