"""Attach an adapter to a base model, on the meta device or with weights; the same code for the plan and for training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from peftkit.engine.model import head_modules, is_tied, new_modules
from peftkit.engine.targets import Targets, resolve_targets
from peftkit.errors import LoadError, RecipeError
from peftkit.methods.lora import LoraSection
from peftkit.plan import Plan


def attach_adapter(model: PreTrainedModel, plan: Plan, missing: set[str], *, meta: bool = False) -> nn.Module:
    """The model with its adapter, ready to train; everything else frozen.

    Args:
        model: the base model.
        plan: says which method.
        missing: names of base weights that the checkpoint lacks and that are therefore random.
        meta: on the meta device initialisations that compute on weights are left out; shapes and counts are the same.
    """
    head = head_modules(model, plan.task)
    kind = plan.method.kind
    if kind == "full":
        return model.requires_grad_(True)
    new = [*head, *new_modules(missing, head)] if plan.task.has_labels else []
    wanted = getattr(plan.recipe.adapter, "modules_to_save", None) or []
    whole = list(dict.fromkeys([*new, *wanted]))
    adapted = _train_only(model, whole or head) if kind == "head" else _inject(model, plan, whole, meta=meta)
    if plan.mixed_precision != "no":
        _train_in_float32(adapted, plan.hardware.device)
    return adapted


def _train_in_float32(model: nn.Module, device: str) -> None:
    """Heads and biases too, as PEFT does for lora_A and lora_B: small updates would be lost in 16 bits."""
    for module in model.modules():
        if device == "cpu" and not isinstance(module, nn.Linear):
            continue  # autocast on the CPU mixes dtypes in linear layers only
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _inject(model: PreTrainedModel, plan: Plan, whole: Sequence[str], *, meta: bool) -> nn.Module:
    set_seed(plan.recipe.training.seed)  # before the adapter is built: every process gets the same lora_A
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of here is checked by the plan, as errors
        try:
            config = peft_config(model, plan, whole, meta=meta)
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=meta)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecipeError(f"adapter: PEFT refuses these settings for this model: {error}") from error
    for name, parameter in adapted.named_parameters():
        if ".original_module." in name:
            parameter.requires_grad = False  # `bias: all` reaches into the untouched copy of a module that is saved whole
    return adapted


def _train_only(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    if is_tied(model) and any(model.get_submodule(name) is model.get_output_embeddings() for name in names):
        output = model.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        inside = any(f".{name}".rpartition(".")[0].endswith(f".{part}") or f".{part}." in f".{name}" for part in names)
        parameter.requires_grad_(inside)
    return model


def adapter_targets(model: PreTrainedModel, plan: Plan) -> Targets:
    """The modules that the recipe's adapter goes to."""
    section: Any = plan.recipe.adapter
    assert isinstance(section, LoraSection)
    if section.target_modules is None and section.target_parameters is not None:
        return Targets([], section.exclude_modules, "only target_parameters are named")
    return resolve_targets(model, section.target_modules, section.exclude_modules, head_modules(model, plan.task))


def peft_config(model: PreTrainedModel, plan: Plan, whole: Sequence[str], *, meta: bool = False) -> peft.PeftConfig:
    """The PEFT config of the recipe's adapter, targets resolved, head among the modules to save."""
    fields: dict[str, Any] = plan.method.peft_fields(plan.recipe.adapter)
    targets = adapter_targets(model, plan)
    fields |= {"target_modules": targets.modules, "exclude_modules": targets.exclude, "modules_to_save": list(whole) or None}
    if meta and plan.method.changes_base(plan.recipe.adapter):
        fields["init_lora_weights"] = True
    # PEFT adds `classifier` and `score` to whatever is named unless the task type is unknown to it; both are harmless.
    config = getattr(peft, plan.method.peft_config)(task_type=plan.task.name, **fields)
    config.revision = plan.recipe.model.revision
    return config


def adapter_state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names, on the CPU, none sharing memory with another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the bias of lora_B for a shard of a matrix (0.21)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # `bias: all` lists the biases of modules that are saved whole a second and a third time.
    twice = (".modules_to_save.", ".original_module.")
    return {name: t.detach().cpu().clone().contiguous() for name, t in state.items() if not any(part in name for part in twice)}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained tensor by its parameter name, on the CPU: what a checkpoint holds."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        LoadError: it is missing or damaged.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    return tensors


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's tensors back; names and shapes must be those of the model."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())[:3]
        raise RecipeError(f"--resume: the checkpoint trains other parameters than the recipe, such as {different}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, as `print_trainable_parameters` counts them."""
    if isinstance(model, peft.PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
