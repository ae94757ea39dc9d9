"""Fold an adapter into its base: one stand-alone model, compared with the adapter before it is called done."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peftkit.adapters import adapter_folder
from peftkit.engine.certify import TOLERANCE, largest_difference, reference_logits, scale_of
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.loaded import LoadedAdapter, with_full_weights
from peftkit.engine.model import Base, first_line, load_base_model, load_config, read_tokenizer, set_pad_token
from peftkit.engine.modules import with_conv1d
from peftkit.engine.parity import RENDERINGS, check_renderings
from peftkit.engine.quantized import compute_in_float32
from peftkit.errors import CertificateError, LoadError, RecipeError
from peftkit.methods import METHODS
from peftkit.recipe.quantization import Quantization, stored_quantization, why_not_plain
from peftkit.run import new_folder
from peftkit.tasks.base import Task
from peftkit.tasks.example import Example, Runtime


def probe_examples(runtime: Runtime, task: Task, max_length: int) -> list[Example]:
    """Fixed rows for comparing two models of a task, cut where the model has no positions for more."""
    cut = task.runtime(runtime.tokenizer, dataclasses.replace(runtime.settings, truncation="right", max_length=max_length))
    return [example for row in cut.probe_rows() for example in cut.encode(row, "probe")]


def check_mergeable(path: Path, base: str | None, output: Path) -> None:
    """Refuse what is known to be impossible before a weight is loaded.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        output: folder to write; must not exist or be empty.

    Raises:
        RecipeError: the adapter cannot be merged, or `output` is not empty.
        LoadError: there is no adapter.
    """
    folder, facts = read_before_loading(path, base, output)
    known = METHODS.get(facts.method)
    if known and known.not_mergeable:
        raise RecipeError(f"--adapter: a {facts.method} adapter cannot be merged: {known.not_mergeable}")
    reason = known.not_mergeable_with(_peft_config(folder)) if known and known.in_peft else ""
    if reason := reason or why_not_plain(stored_layers(folder, facts)):
        raise RecipeError(f"--adapter: this adapter cannot be merged: {reason}")


def read_before_loading(path: Path, base: str | None, output: Path) -> tuple[Path, AdapterFacts]:
    """The folder of an adapter and its facts; arguments and errors are those of `check_mergeable`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"--output {output}: is not empty; name a new folder")
    folder = adapter_folder(path)
    return folder, read_facts(folder, base)


def _peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"the adapter {folder} cannot be loaded: {first_line(error)}") from error


def stored_layers(folder: Path, facts: AdapterFacts) -> Quantization | None:
    """How the base of an adapter is quantised: as it was trained, or for an adapter of plain PEFT as its checkpoint is."""
    if facts.quantization is not None:
        return facts.quantization
    with contextlib.suppress(LoadError):  # loading will say where to look for the base
        raw = getattr(load_config(facts.base_model(folder)), "quantization_config", None)
        return stored_quantization({"quantization_config": raw})
    return None


def merge_adapter(loaded: LoadedAdapter, output: Path, dtype: str) -> dict[str, Any]:
    """Merge in float32, compare, cast, save, load again with plain transformers, compare again.

    On a quantised base: into the weights that its layers stand for, so that nothing is rounded and the result is plain.

    Args:
        loaded: the adapter, on the CPU.
        output: folder to write.
        dtype: dtype of the written weights; `auto` is that of the base.

    Returns:
        `max_abs_diff` (in float32), `max_abs_diff_saved` (as written), `tolerance`, `dtype`, `output`.

    Raises:
        RecipeError: the adapter cannot be merged.
        CertificateError: the merged model gives other logits; nothing is left behind.
    """
    wanted = _dtype_of_base(loaded) if dtype == "auto" else dtype
    examples = probe_examples(loaded.runtime, loaded.task, loaded.position_limit or sys.maxsize)
    model = compute_in_float32(loaded.model)
    reference = reference_logits(model, loaded.runtime, examples)
    if loaded.is_quantized:
        model = with_full_weights(loaded)
    merged = with_conv1d(_merged(model, loaded.facts.method))
    exact = largest_difference(reference, reference_logits(merged, loaded.runtime, examples))
    _require(exact, TOLERANCE["float32"], reference, "merged")
    with new_folder(output) as folder:
        saved = _save_and_compare(folder, merged, loaded, wanted, (examples, reference))
    tolerance = TOLERANCE[wanted] * scale_of(reference)
    return {"output": str(output), "dtype": wanted, "max_abs_diff": exact, "max_abs_diff_saved": saved, "tolerance": tolerance}


def _save_and_compare(
    folder: Path, merged: Any, loaded: LoadedAdapter, wanted: str, proof: tuple[Sequence[Example], Sequence[torch.Tensor]]
) -> float:
    """Write the model and load it again with plain transformers; the largest difference from the proof's logits."""
    examples, reference = proof
    merged.to(getattr(torch, wanted)).save_pretrained(folder)
    loaded.runtime.tokenizer.save_pretrained(folder)
    _copy(loaded.folder, folder, "generation_config.json", RENDERINGS)
    check_renderings(folder, loaded.task.runtime(read_tokenizer(str(folder)), loaded.runtime.settings))
    alone, missing = load_base_model(Base(str(folder), loaded.task, wanted, trust_remote_code=loaded.facts.trust_remote_code))
    if missing:
        raise CertificateError(f"the merged model lacks weights when loaded alone: {sorted(missing)[:3]}")
    set_pad_token(alone, loaded.runtime.tokenizer)
    saved = largest_difference(reference, reference_logits(alone.float(), loaded.runtime, examples))
    _require(saved, TOLERANCE[wanted], reference, f"saved ({wanted})")
    return saved


def _dtype_of_base(loaded: LoadedAdapter) -> str:
    """The dtype of the base's weights, or of those of them that are not quantised."""
    if loaded.is_quantized:
        model: Any = loaded.model
        return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return str(next(loaded.model.parameters()).dtype).removeprefix("torch.")


def _copy(source: Path, folder: Path, *names: str) -> None:
    """Copy those of the named files that are there."""
    for name in names:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def _merged(model: nn.Module, method: str) -> nn.Module:
    if not isinstance(model, PeftModel):
        return model  # trained in the base's own tensors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties that merging breaks: the comparison of logits decides
            return _unwrapped(model).merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise_if_exhausted(error)
        kind = "" if method in METHODS else f" ({method})"
        raise RecipeError(f"--adapter: this adapter cannot be merged{kind}: {error or type(error).__name__}") from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model with modules that were trained whole in their places; PEFT 0.21 cannot put all of them there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
    return model


def _require(difference: float, tolerance: float, reference: Sequence[torch.Tensor], what: str) -> None:
    allowed = tolerance * scale_of(reference)
    if not difference <= allowed:
        raise CertificateError(
            f"the {what} model's logits differ from the adapter's by up to {difference:.3g} (allowed {allowed:.3g}); "
            "nothing was written. Adapted embeddings that are tied to the output layer are a known cause"
        )
