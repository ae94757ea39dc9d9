"""Modules of a base model: its head, its tied embeddings, and GPT-2's transposed linear layers."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkit.engine.in_files import Keep, in_memory
from peftkit.errors import LoadError
from peftkit.tasks import TASKS
from peftkit.tasks.base import Task


def head_modules(model: PreTrainedModel, task: Task) -> list[str]:
    """Names of the modules that make up the task's head: all outside the backbone, or the output embedding of language models.

    Raises:
        LoadError: the backbone cannot be told from the head.
    """
    if not task.has_head:
        output = model.get_output_embeddings()
        return [name for name, module in model.named_modules() if module is output]
    names = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    backbone = [model.base_model_prefix] if model.base_model_prefix in names else _bare_children(model.config)
    head = [name for name in names if name not in backbone]
    if not head or head == names:
        raise LoadError(f"{type(model).__name__} has no head beside its backbone; its modules: {', '.join(names)}")
    return head


def other_tasks(config: PretrainedConfig, task: Task) -> str:
    """Which tasks transformers has classes for, where it has none for this one; empty where the reason is another."""
    whole = {name: known.encoder_auto_class if config.is_encoder_decoder else "" for name, known in TASKS.items()}
    classes = {name: getattr(transformers, whole[name] or known.auto_class) for name, known in TASKS.items()}
    has = [name for name, auto in classes.items() if type(config) in auto._model_mapping]
    return "" if task.name in has or not has else f"it has classes of this type for {', '.join(has)} only"


def _bare_children(config: PretrainedConfig) -> list[str]:
    """Modules of the same model without a head, for classes that hold the backbone's parts themselves (T5 for answers)."""
    with torch.device("meta"):
        return [name for name, _ in transformers.AutoModel.from_config(config).named_children()]


def new_modules(missing: set[str], head: list[str]) -> list[str]:
    """Modules outside the head whose weights the checkpoint lacks (an untrained pooler): they must be trained and saved too."""
    outside = {name.rpartition(".")[0] for name in missing if name.split(".")[0] not in head}
    return sorted(outside)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def linearised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every Conv1D (a transposed linear layer, GPT-2's) as a Linear of the same weights."""
    for name, old in list(model.named_modules()):
        if isinstance(old, Conv1D):
            inputs, outputs = old.weight.shape
            new = nn.Linear(inputs, outputs, device="meta")
            new.weight, new.bias = nn.Parameter(old.weight.detach().t().contiguous()), old.bias
            new.was_conv1d = True  # type: ignore[assignment]
            _replace(model, name, new)
    return model


def with_conv1d(model: nn.Module, keep: Keep = in_memory) -> nn.Module:
    """`linearised` undone, so that the model has the names and shapes of its class again; `keep` says where weights go."""
    for name, old in list(model.named_modules()):
        if getattr(old, "was_conv1d", False):
            new = Conv1D(old.out_features, old.in_features)
            new.weight, new.bias = nn.Parameter(keep(old.weight.detach().t().contiguous())), old.bias
            _replace(model, name, new)
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
