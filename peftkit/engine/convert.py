"""Turn an adapter into a LoRA: an approximation by singular values, whose error is measured and reported."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, convert_to_lora
from safetensors.torch import save_file

from peftkit.adapters import FACTS, TENSORS
from peftkit.engine.adapter import adapter_state
from peftkit.engine.certify import largest_difference, reference_logits, scale_of
from peftkit.engine.loaded import LoadedAdapter, with_full_weights
from peftkit.engine.merge import own_probes, read_before_loading, stored_layers
from peftkit.engine.model import load_base_model, set_pad_token
from peftkit.engine.quantized import compute_in_float32
from peftkit.engine.store import load_into
from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.recipe.quantization import why_not_plain
from peftkit.run import new_folder, write_json

_COPIED = ("generation_config.json",)


def check_convertible(path: Path, base: str | None, output: Path) -> None:
    """Refuse what is known to be impossible before a weight is loaded.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        output: folder to write; must not exist or be empty.

    Raises:
        RecipeError: the method cannot be converted, the base has no full weights, or `output` is not empty.
        LoadError: there is no adapter.
    """
    folder, facts = read_before_loading(path, base, output)
    known = METHODS.get(facts.method)
    if known is not None and not known.to_lora:
        raise _unable(facts.method)
    if reason := why_not_plain(stored_layers(folder, facts)):
        raise RecipeError(f"--adapter: it cannot be turned into a LoRA: {reason}")


def _unable(method: str) -> RecipeError:
    able = ", ".join(name for name, item in METHODS.items() if item.to_lora)
    return RecipeError(f"--adapter: a {method} adapter cannot be turned into a LoRA; these can: {able}")


def convert_adapter(loaded: LoadedAdapter, output: Path, rank: float) -> dict[str, Any]:
    """Write a LoRA adapter folder that does nearly what an adapter of another method does.

    Args:
        loaded: the adapter, on the CPU.
        output: folder to write.
        rank: rank of every layer, or below 1 the share of the update's energy (squared singular values) to keep.

    Returns:
        `output`, `rank_min`, `rank_max`, `max_abs_diff` and `relative_diff` of the logits.

    Raises:
        RecipeError: the adapter cannot be converted.
    """
    model: Any = compute_in_float32(loaded.model)
    examples = own_probes(loaded)
    reference = reference_logits(model, loaded.runtime, examples)
    if loaded.is_quantized:
        model = with_full_weights(loaded)
    config, state = _as_lora(model, loaded.facts.method, rank)
    facts = dataclasses.replace(loaded.facts, method="lora", dtype="float32")
    with new_folder(output) as folder:
        config.save_pretrained(str(folder))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / TENSORS, metadata={"format": "pt"})
        loaded.runtime.tokenizer.save_pretrained(folder)
        write_json(folder / FACTS, dataclasses.asdict(facts))
        for name in _COPIED:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)
        source = dataclasses.replace(facts.base_model(folder), device=loaded.device)
        base, missing = load_base_model(source, loaded.runtime.settings)
        set_pad_token(base, loaded.runtime.tokenizer)
        onto = compute_in_float32(load_into(base, folder, "lora", missing))
        converted = reference_logits(onto, loaded.runtime, examples)
    difference = largest_difference(reference, converted)
    ranks = [tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name]
    differences = {"max_abs_diff": difference, "relative_diff": difference / scale_of(reference)}
    return {"output": str(output), "rank_min": min(ranks), "rank_max": max(ranks), **differences}


def _as_lora(model: Any, method: str, rank: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and tensors of the LoRA, the modules that were trained whole among them."""
    if not isinstance(model, PeftModel):
        raise _unable(method)
    old = model.active_peft_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config, state = convert_to_lora(model, rank if rank < 1 else int(rank))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"--adapter: it cannot be turned into a LoRA: {error}") from error
    if rank >= 1 and any(tensor.shape[0] > rank for name, tensor in state.items() if ".lora_A." in name):
        state = _truncated(state, int(rank))  # PEFT 0.21 converts MiSS exactly, at a rank of its own
        config.r = config.lora_alpha = int(rank)
        config.rank_pattern, config.alpha_pattern = {}, {}
    config.task_type, config.modules_to_save, config.inference_mode = old.task_type, old.modules_to_save, True
    whole = tuple(f".{name}." for name in old.modules_to_save or ())
    return config, state | {
        name: tensor for name, tensor in adapter_state(model).items() if any(part in name for part in whole)
    }


def _truncated(state: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best update of this rank for every layer: the largest singular values of B A."""
    result = dict(state)
    for name, a in state.items():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            left, values, right = torch.linalg.svd(state[other].float() @ a.float(), full_matrices=False)
            result[name], result[other] = right[:rank].contiguous(), (left[:, :rank] * values[:rank]).contiguous()
    return result
