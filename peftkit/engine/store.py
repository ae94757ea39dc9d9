"""The adapter folder: written so that plain PEFT (or, for `full`, plain transformers) loads it, and read back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from peftkit.adapters import CONFIG, FACTS, TENSORS, read_mapping
from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.adapter import adapter_state, head_by_hand, read_tensors, trainable_state
from peftkit.engine.facts import AdapterFacts
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.hooks import hook
from peftkit.engine.modules import is_tied
from peftkit.engine.parity import write_renderings
from peftkit.errors import LoadError
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.plan import Plan
from peftkit.run import new_folder, write_json
from peftkit.tasks import TASKS

HEAD = "head.safetensors"  # trained tensors of the base model that the PEFT config has no field for
SETTINGS = "adapter_settings"  # where a model with layers of ours keeps the section that they were made from

_PEFT_RAISES = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)
_PROMPT_TENSORS = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}  # PEFT loads them, and calls them unexpected


def initial_state(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The untrained adapter, for initialisations that change the base; empty for all others."""
    if not plan.method.changes_base(plan.recipe.adapter):
        return {}
    return adapter_state(model)


def save_adapter(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    facts: AdapterFacts,
    initial: dict[str, torch.Tensor],
    renderings: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the adapter folder atomically.

    Args:
        path: the folder.
        model: the trained model.
        tokenizer: saved along, with its chat template.
        facts: written to peftkit.json.
        initial: see `initial_state`.
        renderings: rows of training as the tokenizer made tokens of them.
    """
    with new_folder(path) as folder:
        if isinstance(model, PeftModel):
            _save_peft(folder, model, facts, initial)
        elif METHODS[facts.method].stands_alone:
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            _save_ours(folder, model, facts)
        tokenizer.save_pretrained(folder)
        if facts.generation:
            answering_config(model, tokenizer).save_pretrained(folder)
        write_renderings(folder, renderings)
        write_json(folder / FACTS, dataclasses.asdict(facts))


def _save_peft(folder: Path, model: PeftModel, facts: AdapterFacts, initial: dict[str, torch.Tensor]) -> None:
    method = METHODS[facts.method]
    if before := hook(method, "before_save"):
        before(model)
    own_state = hook(method, "adapter_state")
    state = own_state(model) if own_state else None
    state = adapter_state(model) if state is None else state
    config = model.active_peft_config.to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": facts.base}
    config["task_type"] = TASKS[facts.task].task_type
    if stored := hook(method, "stored_fields"):
        config |= stored(config)
    if initial:
        state, config = as_plain_lora(state, initial, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of conversions that PEFT would do; it is done here
        saved = type(model.active_peft_config)(**{key: value for key, value in config.items() if key != "peft_type"})
    saved.save_pretrained(str(folder))
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    if head := head_by_hand(model):
        save_file(head, folder / HEAD, metadata={"format": "pt"})
    if further := hook(method, "save"):
        further(model, folder)


def as_plain_lora(
    state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA whose initialisation changed the base, as a LoRA of twice the rank for the unchanged base.

    Training starts at W = W_res + s B0 A0 and ends at W_res + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
    (the conversion that PiSSA describes, Meng et al. 2024, arXiv:2404.02948).
    """
    result = dict(state)
    for name, tensor in state.items():
        if ".lora_A." in name:
            result[name] = torch.cat([tensor, initial[name]], dim=0).contiguous()
        elif ".lora_B." in name:
            result[name] = torch.cat([tensor, -initial[name]], dim=1).contiguous()
    # The scale alpha / r (or alpha / sqrt(r)) must stay what it was at the single rank.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    changed = {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in config["alpha_pattern"].items()},
        "init_lora_weights": True,
    }
    return result, config | changed


def _save_ours(folder: Path, model: nn.Module, facts: AdapterFacts) -> None:
    save_file(trainable_state(model), folder / TENSORS, metadata={"format": "pt"})
    settings = getattr(model, SETTINGS, {})
    what = "belong to layers put into the base model" if settings else "replace those of the same name in the base model"
    config = {
        "peft_type": facts.method.upper(),
        "task_type": facts.task,
        "base_model_name_or_path": facts.base,
        "revision": facts.revision,
        "settings": settings,
        "note": f"written by peftkit, which alone can load it: these tensors {what}",
    }
    write_json(folder / CONFIG, config)
    if further := hook(METHODS[facts.method], "save"):
        further(model, folder)


def answering_config(model: nn.Module, tokenizer: Any) -> GenerationConfig:
    """The base's generation config with every token that ends an answer."""
    config = GenerationConfig.from_dict(getattr(model, "generation_config", GenerationConfig()).to_dict())
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in dict.fromkeys([*known, tokenizer.eos_token_id, *_turn_ends(tokenizer)]) if token is not None]
    config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after an assistant turn, where it writes one."""
    if not tokenizer.chat_template:
        return []
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
        )
    except Exception:  # a template that refuses this exchange has no say here
        return []
    tail = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"][-1:]
    return [token for token in tail if token in tokenizer.all_special_ids]


def load_into(base: PreTrainedModel, folder: Path, method: str, missing: set[str]) -> nn.Module:
    """Put the adapter of a folder onto a fresh base model; for `full` the base is the model.

    Args:
        base: the base model.
        folder: the adapter folder.
        method: its method.
        missing: weights of the base that its checkpoint lacks: the adapter must bring them.

    Raises:
        LoadError: tensors are missing, unexpected or of another shape.
    """
    known = METHODS.get(method)
    in_file = {} if known and known.stands_alone else read_tensors(folder / TENSORS)
    if (folder / HEAD).is_file():
        head = read_tensors(folder / HEAD)
        _load_subset(base, folder, head)
        missing = missing - head.keys()
    if random := sorted(missing - {name.removeprefix("base_model.model.").removeprefix("base_model.") for name in in_file}):
        raise LoadError(f"neither {folder} nor its base has weights for {', '.join(random[:3])}: they would be random")
    if known and known.stands_alone:
        return base.eval()
    if known is None or known.in_peft:
        return _load_peft(base, folder, in_file, known)
    if known.kind == "modules":
        attach = hook(known, "attach")
        assert attach is not None, "a method of ours brings its own modules"
        base = attach(base, known.section.model_validate(read_mapping(folder / CONFIG)["settings"]), [], folder.joinpath)
    return _load_subset(base, folder, in_file)


def _load_peft(base: PreTrainedModel, folder: Path, in_file: dict[str, torch.Tensor], method: Method | None) -> nn.Module:
    _resize_embeddings(base, folder, in_file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of here was settled before training
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            load = hook(method, "load") if method else None
            if load and (loaded := load(AdaptedModel, base, config, folder)) is not None:
                return loaded.eval()
            model = AdaptedModel(base, config)
        _match_dtypes(model, in_file)
        _fill(model, folder, in_file, "default")
    except _PEFT_RAISES as error:
        raise_if_exhausted(error)
        raise LoadError(f"the adapter {folder} cannot be loaded onto {type(base).__name__}: {error}") from error
    return model.eval()


def _without_place(unexpected: set[str], state: dict[str, torch.Tensor]) -> list[str]:
    """Those of the names whose tensors the model has not; PEFT saves resized embeddings under two names each (0.21)."""
    used = [tensor for name, tensor in state.items() if name not in unexpected]
    return sorted(name for name in unexpected if name not in state or not any(torch.equal(state[name], t) for t in used))


def _resize_embeddings(base: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Give the base as many token embeddings as the adapter's file has: PEFT saves those that were resized before training."""
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    rows = {len(tensor) for name, tensor in _tensors_of(base, embedding, state).items() if name.endswith(".weight")}
    if len(rows) != 1 or rows == {len(embedding.weight)}:
        return
    if output is not None and not is_tied(base) and not _tensors_of(base, output, state):
        raise LoadError(
            f"{folder} was trained with {rows.pop()} tokens on a base of {len(embedding.weight)}, and has no weights of the "
            "output layer for the new ones: they would be random. Save the resized base and name it with --base"
        )
    base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _tensors_of(base: nn.Module, module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those tensors of an adapter that belong to a module of its base."""
    names = tuple(f"base_model.model.{name}." for name, part in base.named_modules() if part is module)
    return {name: tensor for name, tensor in state.items() if name.startswith(names)}


def load_beside(model: AdaptedModel, folder: Path, name: str) -> None:
    """Put another adapter of the same method, without a head, into a model that has one already.

    Raises:
        LoadError: it does not fit; the model is as it was.
    """
    in_file = read_tensors(folder / TENSORS)
    base = type(model.get_base_model()).__name__
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            model.add_adapter(name, config)
        _fill(model, folder, in_file, name)
    except (*_PEFT_RAISES, LoadError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise_if_exhausted(error)
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"the adapter {folder} cannot be loaded onto {base}: {error}") from error
    model.eval()


def _fill(model: AdaptedModel, folder: Path, in_file: dict[str, torch.Tensor], name: str) -> None:
    """Read the weights of an adapter that the model has a place for under this name."""
    base = type(model.get_base_model()).__name__
    if missing := sorted(adapter_state(model, name).keys() - in_file.keys()):
        raise LoadError(f"the adapter {folder} does not fit {base}: it lacks {', '.join(missing[:3])}")
    found = model.load_adapter(str(folder), name, torch_device="cpu")  # its tensors are copied to where the base is
    if unexpected := _without_place(set(found.unexpected_keys) - _PROMPT_TENSORS, in_file):
        raise LoadError(f"the adapter {folder} does not fit {base}: it has no place for {', '.join(unexpected[:3])}")


def _match_dtypes(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Give modules that were saved whole the dtype they were trained in; PEFT would round them to that of the base."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtypes = {tensor.dtype for key, tensor in state.items() if key.startswith(f"{name}.")}
            if len(dtypes) == 1:
                module.modules_to_save.to(dtypes.pop())


def _load_subset(base: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    own = dict(base.named_parameters(remove_duplicate=False))
    if unknown := sorted(state.keys() - own.keys()):
        raise LoadError(f"the adapter {folder} has tensors that {type(base).__name__} has not: {unknown[:3]}")
    output = base.get_output_embeddings()
    if is_tied(base) and any(own[name] is output.weight for name in state):
        output.weight = nn.Parameter(output.weight.detach().clone())
        base.config.tie_word_embeddings = False
        own = dict(base.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise LoadError(
                f"the adapter {folder} has {name} of shape {tuple(tensor.shape)}, the base {tuple(own[name].shape)}"
            )
        # In place of the base's own, which other models may share (`engine.several`).
        ours = nn.Parameter(tensor.to(own[name]), requires_grad=own[name].requires_grad)
        for other in [other for other, parameter in own.items() if parameter is own[name]]:
            place, _, leaf = other.rpartition(".")
            setattr(base.get_submodule(place), leaf, ours)
    return base.eval()
