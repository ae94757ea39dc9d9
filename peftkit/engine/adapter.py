"""Attach an adapter to a base model, on the meta device or with weights; the same code for the plan and for training."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from peftkit.engine.adapted import AdaptedModel, encoder_and_decoder
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.hooks import Context, hook
from peftkit.engine.modules import head_modules, is_tied, new_modules
from peftkit.engine.sharding import assign, gathered, return_parts
from peftkit.engine.targets import Targets, feedforward_modules, linear_sizes, resolve_targets
from peftkit.engine.tensor_parallel import weights_look_whole
from peftkit.errors import LoadError, RecipeError
from peftkit.methods.base import Method
from peftkit.plan import Plan


def attach_adapter(model: PreTrainedModel, missing: set[str], context: Context) -> nn.Module:
    """The model with its adapter, ready to train; everything else frozen.

    Args:
        model: the base model; on the meta device where the context asks for shapes only.
        missing: names of base weights that the checkpoint lacks and that are therefore random.
        context: says which method.
    """
    plan = context.plan
    own = {id(parameter) for parameter in model.parameters()}
    set_seed(plan.recipe.training.seed)  # before the adapter is built: every process gets the same one
    whole = modules_to_save(model, missing, plan)
    if plan.method.kind == "subset":
        adapted = _train_subset(model, plan.method, whole)
    elif context.shapes_only and plan.method.trained_shapes:
        adapted = _stand_in(model, plan, whole)
    elif plan.method.in_peft:
        adapted = _inject(model, whole, context)
    else:
        attach = hook(plan.method, "attach")
        assert attach is not None, "a method of ours brings its own modules"
        adapted = attach(model, plan.recipe.adapter, whole, context.find_adapter)
    if plan.mixed_precision != "no" and not plan.method.stands_alone:
        _train_in_float32(adapted, plan.hardware.device)
    if plan.recipe.training.optim == "lorafa":
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad = parameter.requires_grad and ".lora_A." not in name
    named = dict(adapted.named_parameters())
    adapted.trained_names = [name for name, parameter in named.items() if parameter.requires_grad]
    adapted.saved_names = [name for name, parameter in named.items() if parameter.requires_grad or id(parameter) not in own]
    if not adapted.trained_names and not plan.method.trains_nothing(plan.recipe.adapter):
        raise RecipeError(f"adapter.method: `{plan.method.name}` would train nothing in {type(model).__name__}")
    return adapted


def modules_to_save(model: PreTrainedModel, missing: set[str], plan: Plan) -> list[str]:
    """Modules that are trained whole: the head, where it is new, what the checkpoint lacks, and what the recipe names."""
    head = head_modules(model, plan.task)
    new = [*head, *new_modules(missing, head)] if plan.task.has_head else []
    wanted = getattr(plan.recipe.adapter, "modules_to_save", None) or []
    if not new and not wanted and plan.method.trains_output:
        return head
    return list(dict.fromkeys([*new, *wanted]))


def _train_in_float32(model: nn.Module, device: str) -> None:
    """Heads and biases too, as PEFT does for lora_A and lora_B: small updates would be lost in 16 bits."""
    for module in model.modules():
        if device == "cpu" and not isinstance(module, nn.Linear):
            continue  # autocast on the CPU mixes dtypes in linear layers only
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _inject(model: PreTrainedModel, whole: Sequence[str], context: Context) -> nn.Module:
    plan, section = context.plan, context.plan.recipe.adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of here is checked by the plan, as errors
        try:
            config = peft_config(model, whole, context)
            if not context.shapes_only and (prepare := hook(plan.method, "before_attach")):
                prepare(model, config, context)
            attach = hook(plan.method, "attach")
            options: dict[str, Any] = {"low_cpu_mem_usage": context.shapes_only}
            with weights_look_whole(model):
                adapted = attach(AdaptedModel, model, config, context) if attach else AdaptedModel(model, config, **options)
            if finish := hook(plan.method, "after_attach"):
                finish(adapted, section, context)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            raise_if_exhausted(error)
            raise RecipeError(f"adapter: PEFT refuses these settings for this model: {error}") from error
    train_whole(adapted, whole, config)
    for name, parameter in adapted.named_parameters():
        if ".original_module." in name:
            parameter.requires_grad = False  # `bias: all` reaches into the untouched copy of a module that is saved whole
    return adapted


def _stand_in(model: PreTrainedModel, plan: Plan, whole: Sequence[str]) -> PreTrainedModel:
    """The model with parameters of the adapter's shapes and no function, for methods that compute with weights when built."""
    assert plan.method.trained_shapes is not None
    section = plan.recipe.adapter
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    chosen = targeted(plan, model, adapter_targets(model, plan), layers)
    model.requires_grad_(False)
    for name in whole:
        module = model.get_submodule(name)
        module.add_module("trained_copy", copy.deepcopy(module).requires_grad_(True))
    model.add_module("shared_by_adapter", _of_shapes(plan.method.shared_shapes(section)))
    for name in chosen:
        shapes = plan.method.trained_shapes(section, *linear_sizes(layers[name]), layers[name].bias is not None)
        layers[name].add_module("adapter", _of_shapes(shapes))
    return model


def _of_shapes(shapes: Sequence[tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes])


def train_whole(adapted: nn.Module, whole: Sequence[str], config: peft.PeftConfig) -> None:
    """Train the head by hand for methods whose PEFT config has no `modules_to_save`."""
    if has_field(config, "modules_to_save") or not whole:
        return
    base = base_of_adapted(adapted)
    names = [name for name, _ in base.named_parameters() if any(f".{part}." in f".{name}" for part in whole)]
    adapted.head_names = names  # type: ignore[assignment]
    for name in names:
        base.get_parameter(name).requires_grad = True


def head_by_hand(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `train_whole` has set free, by the base model's names."""
    names: list[str] = getattr(adapted, "head_names", [])
    base = base_of_adapted(adapted)
    return {name: base.get_parameter(name).detach().cpu().clone().contiguous() for name in names}


def has_field(config: peft.PeftConfig, name: str) -> bool:
    """Whether a PEFT config class has a field."""
    return name in {field.name for field in dataclasses.fields(config)}


def base_of_adapted(adapted: nn.Module) -> nn.Module:
    """The base model inside an adapted one."""
    return adapted.get_base_model() if isinstance(adapted, peft.PeftModel) else adapted


def _train_subset(model: PreTrainedModel, method: Method, whole: Sequence[str]) -> PreTrainedModel:
    if not method.stands_alone:
        untie_if_trained(model, whole)
    if not method.trains_output and not any(method.trains(name) for name, _ in model.named_parameters()):
        raise RecipeError(f"adapter.method: `{method.name}` would train nothing in {type(model).__name__}, {method.why_not}")
    for name, parameter in model.named_parameters():
        inside = any(f".{name}".rpartition(".")[0].endswith(f".{part}") or f".{part}." in f".{name}" for part in whole)
        parameter.requires_grad_(inside or method.trains(name))
    return model


def untie_if_trained(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Give an output embedding that is to be trained weights of its own."""
    if is_tied(model) and any(model.get_submodule(name) is model.get_output_embeddings() for name in names):
        output = model.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False


def adapter_targets(model: PreTrainedModel, plan: Plan) -> Targets:
    """The modules that the recipe's adapter goes to; none for methods that go into none."""
    section: Any = plan.recipe.adapter
    fields = type(section).model_fields
    if "target_modules" not in fields:
        return Targets([], None, "")
    exclude = getattr(section, "exclude_modules", None)
    if section.target_modules is None and getattr(section, "target_parameters", None) is not None:
        return Targets([], exclude, "only target_parameters are named")
    return resolve_targets(model, section.target_modules, exclude, head_modules(model, plan.task), plan.method)


def targeted(plan: Plan, model: PreTrainedModel, targets: Targets, names: Iterable[str]) -> list[str]:
    """Those of the names that PEFT will adapt."""
    section: Any = plan.recipe.adapter
    rule = SimpleNamespace(
        target_modules=targets.modules,
        exclude_modules=targets.exclude,
        modules_to_save=modules_to_save(model, set(), plan),
        layers_to_transform=getattr(section, "layers_to_transform", None),
        layers_pattern=getattr(section, "layers_pattern", None),
    )
    return [name for name in names if check_target_module_exists(rule, name)]


def peft_config(model: PreTrainedModel, whole: Sequence[str], context: Context) -> peft.PeftConfig:
    """The PEFT config of the recipe's adapter, targets resolved, head among the modules to save."""
    plan, section = context.plan, context.plan.recipe.adapter
    config_class = getattr(peft, plan.method.peft_config)
    known = {field.name for field in dataclasses.fields(config_class)}
    targets = adapter_targets(model, plan)
    fields: dict[str, Any] = plan.method.peft_fields(section)
    revision = plan.recipe.model.revision
    ours: dict[str, Any] = {"exclude_modules": targets.exclude, "modules_to_save": list(whole) or None, "revision": revision}
    if "target_modules" in type(section).model_fields:
        ours["target_modules"] = targets.modules or None
    if plan.method.targets == "key_value_feedforward" and fields["feedforward_modules"] is None:
        ours["feedforward_modules"] = feedforward_modules(model, targets.modules)
    if plan.method.kind == "prompt":
        ours |= _prompt_shape(model, plan)
    if fill := hook(plan.method, "config_fields"):
        ours |= fill(section, model, context)
    if context.shapes_only and plan.method.changes_base(section):
        ours["init_lora_weights"] = True
    return config_class(
        task_type=plan.task.task_type, **(fields | {name: value for name, value in ours.items() if name in known})
    )


def _prompt_shape(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """Virtual tokens go into one transformer: the encoder's embeddings, or the decoder's keys and values.

    PEFT would make as many again for the decoder, which then get no gradient (prompt tuning, P-tuning) or are left out when
    generating (multitask prompt tuning).
    """
    config = model.config
    # PEFT looks into the config's dict, where DistilBERT and MPT have names of their own for these (0.21).
    heads = {"num_attention_heads": getattr(config.get_text_config(), "num_attention_heads", None)}
    if plan.method.virtual_tokens_in == "embeddings":
        return {"num_transformer_submodules": 1, "token_dim": model.get_input_embeddings().weight.shape[1], **heads}
    if encoder_and_decoder(model)[1] is None:
        return {"num_transformer_submodules": 1, **heads, "token_dim": getattr(config.get_text_config(), "hidden_size", None)}
    shape = {"num_transformer_submodules": 2, "num_layers": getattr(config, "num_decoder_layers", None)}
    # T5's keys have a width of their own; PEFT takes them to be as wide as the model (0.21).
    width = config.d_kv * config.num_heads if hasattr(config, "d_kv") else None
    return {name: value for name, value in (shape | {"token_dim": width}).items() if value is not None}


def adapter_state(model: peft.PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors by PEFT's names, on the CPU, none sharing memory with another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the bias of lora_B for a shard of a matrix (0.21)
        # PEFT would gather the base too (0.21), from processes that have left by then; what is the adapter's is whole.
        known = {key: tensor for key, tensor in model.state_dict().items() if not isinstance(tensor, DTensor)}
        state = peft.get_peft_model_state_dict(model, known, name, save_embedding_layers=False)
    # `bias: all` lists the biases of modules that are saved whole a second and a third time.
    twice = (".modules_to_save.", ".original_module.")
    return {key: t.detach().cpu().clone().contiguous() for key, t in state.items() if not any(part in key for part in twice)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the adapter was attached with, by name; a method may freeze some of them for a while."""
    names: list[str] = getattr(model, "trained_names", [])
    return {name: model.get_parameter(name) for name in names}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained tensor by its parameter name, whole and on the CPU: what a checkpoint holds."""
    return_parts(model)
    return {name: gathered(parameter).cpu().contiguous() for name, parameter in trained_parameters(model).items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        LoadError: it is missing or damaged.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise_if_exhausted(error)
        raise LoadError(f"{path} cannot be read: {error}") from error
    return tensors


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's tensors back; names and shapes must be those of the model."""
    return_parts(model)
    own = trained_parameters(model)
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())[:3]
        raise RecipeError(f"--resume: the checkpoint trains other parameters than the recipe, such as {different}")
    for name, parameter in own.items():
        assign(parameter, state[name])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, as `print_trainable_parameters` counts them."""
    if isinstance(model, peft.PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
