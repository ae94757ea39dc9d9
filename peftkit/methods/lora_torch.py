"""LoRA on tensors: initialisations that look at data, losses of its variants, and what aLoRA needs of the rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.arrow import check_loaded_lora_compatibility_arrow
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.monteclora import MontecloraSampler

from peftkit.errors import DataError, Problem, RecipeError
from peftkit.tasks.example import IGNORE_INDEX

Batch = dict[str, torch.Tensor]
_EXPERTS, _ROUTER = "experts", "arrow_router"


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """On the meta device, the shapes of initialisations that look at data; else the tokens that call an activated LoRA."""
    if context.shapes_only and section.init_lora_weights in ("eva", "corda", "lora_ga", "loftq"):
        nothing: dict[str, Any] = {"eva_config": None, "corda_config": None, "lora_ga_config": None, "loftq_config": {}}
        return {"init_lora_weights": True} | nothing
    if section.arrow_config is not None:
        chosen = section.arrow_config.model_dump(exclude={"adapters", "general_adapters"})
        seed = context.plan.recipe.training.seed if chosen["rng_seed"] is None else chosen["rng_seed"]
        return {"arrow_config": chosen | {"rng_seed": seed}}
    if section.init_lora_weights == "lora_ga" and section.lora_ga_config is None:
        return {"lora_ga_config": {}}
    if section.alora_invocation_text is not None and context.tokenizer is not None:
        ids = context.tokenizer(section.alora_invocation_text, add_special_tokens=False)["input_ids"]
        return {"alora_invocation_tokens": ids}
    return {"loftq_config": section.loftq_config.model_dump()} if section.loftq_config else {}


def attach(build: Any, model: Any, config: Any, context: Any) -> Any:
    """The adapted model; for Arrow with the adapters to choose from and a router over them."""
    if config.arrow_config is None:
        return build(model, config, low_cpu_mem_usage=context.shapes_only)
    arrow = context.plan.recipe.adapter.arrow_config
    folders = {"task": arrow.adapters, "gks": arrow.general_adapters}
    paths = {kind: [context.find_adapter(name) for name in names] for kind, names in folders.items()}
    adapted = _routed(build, model, config, paths)
    return adapted.to("meta") if context.shapes_only else adapted


def _routed(build: Any, model: Any, config: Any, paths: dict[str, list[Path]]) -> Any:
    """A model with LoRA adapters and an Arrow router over them, which is active; all of it frozen.

    The names are those of PEFT's `create_arrow_model`: under others its router takes itself and what is to be subtracted for
    adapters to choose from (0.21).

    Raises:
        RecipeError: the adapters differ in rank or targets.
    """
    experts = [(f"{kind}_{number}", path) for kind, found in paths.items() for number, path in enumerate(found)]
    first = LoraConfig.from_pretrained(str(experts[0][1]))
    first.inference_mode = True
    adapted = build(model, first, experts[0][0])
    on_meta = next(model.parameters()).is_meta
    for name, path in experts:
        if on_meta and name != experts[0][0]:
            adapted.add_adapter(name, LoraConfig.from_pretrained(str(path)))
        elif not on_meta:
            adapted.load_adapter(str(path), name)
    names = [name for name, _ in experts]
    config.arrow_config.task_adapter_names = [name for name in names if name.startswith("task_")]
    config.arrow_config.gks_adapter_names = [name for name in names if name.startswith("gks_")]
    try:
        config.target_modules, config.r = check_loaded_lora_compatibility_arrow(adapted, adapter_names=names)
    except ValueError as error:
        raise RecipeError([Problem("", "adapter.arrow_config.adapters", str(error))]) from error
    adapted.add_adapter(_ROUTER, config)
    adapted.set_adapter(_ROUTER)
    adapted.requires_grad_(False)
    adapted.expert_paths = {kind: list(map(str, found)) for kind, found in paths.items()}
    return adapted


def adapter_state(adapted: Any) -> dict[str, torch.Tensor] | None:
    """Nothing of its own for a router, whose adapters are copied whole; None for all other LoRAs, as PEFT has it."""
    return {} if adapted.active_peft_config.arrow_config is not None else None


def save(adapted: Any, folder: Path) -> None:
    """The adapters that a router chooses from, copied into the folder, which is then whole."""
    for kind, paths in getattr(adapted, "expert_paths", {}).items():
        for number, source in enumerate(paths):
            target = folder / _EXPERTS / f"{kind}_{number}"
            target.mkdir(parents=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(Path(source) / name, target / name)


def load(build: Any, base: Any, config: Any, folder: Path) -> Any:
    """A router with its adapters; None for all other LoRAs."""
    if config.arrow_config is None:
        return None
    found = {kind: sorted((folder / _EXPERTS).glob(f"{kind}_*")) for kind in ("task", "gks")}
    return _routed(build, base, config, found)


def before_attach(model: Any, config: Any, context: Any) -> None:
    """CorDA's covariances and LoRA-GA's gradients, from training rows; aLoRA's check of the rows."""
    if config.alora_invocation_tokens:
        _require_invocation(config.alora_invocation_tokens, context)
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: _run(model, context))
    elif config.init_lora_weights == "lora_ga":
        was_training = model.training
        preprocess_loraga(model, config, train_step=lambda: _accumulate_gradients(model, context))
        model.train(was_training)


def after_attach(adapted: Any, section: Any, context: Any) -> None:
    """EVA's components, from training rows."""
    if context.shapes_only or section.init_lora_weights != "eva":
        return
    rows = context.plan.micro_batch_size
    batches = list(_some(context, rows))
    initialize_lora_eva_weights(
        adapted,
        batches,
        forward_fn=context.runtime.forward,
        prepare_model_inputs_fn=lambda batch, config: batch,
        prepare_layer_inputs_fn=_real_positions,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _real_positions(layer_input: Any, batch: Batch, name: str) -> torch.Tensor:
    """Inputs of a layer (N, D) at positions that hold text: the encoder's or a decoder-only model's, or the decoder's."""
    hidden = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    for mask in (batch["attention_mask"].bool(), batch["labels"] != IGNORE_INDEX):
        if mask.shape == hidden.shape[:2]:
            return hidden[mask]
    return hidden.reshape(-1, hidden.shape[-1])


def _some(context: Any, rows_per_batch: int) -> Iterator[Batch]:
    """Batches of the first `init_num_rows` training rows."""
    count = -(-context.plan.recipe.adapter.init_num_rows // rows_per_batch)
    yield from islice(context.batches(rows_per_batch), count)


@torch.no_grad()
def _run(model: Any, context: Any) -> None:
    for batch in _some(context, 1):  # PEFT 0.21 takes a batch of one row only
        context.runtime.forward(model, batch)


def _accumulate_gradients(model: Any, context: Any) -> None:
    for batch in _some(context, context.plan.micro_batch_size):
        context.runtime.loss_sum(context.runtime.forward(model, batch), batch["labels"]).backward()


def _require_invocation(tokens: list[int], context: Any) -> None:
    """Raise where a row lacks the invocation sequence: it would train nothing, in silence."""
    lacking = total = 0
    for batch in context.batches(1):
        windows = batch["input_ids"][0].unfold(0, min(len(tokens), batch["input_ids"].shape[1]), 1)
        total += 1
        lacking += windows.shape[1] != len(tokens) or not bool((windows == torch.tensor(tokens)).all(-1).any())
    if lacking:
        raise DataError(
            f"{lacking} of {total} training rows lack the tokens of `adapter.alora_invocation_tokens` ({tokens}): "
            "they would train nothing; put the invocation into the prompt or the chat template"
        )


def penalty(adapted: Any) -> torch.Tensor | float:
    """KaSA's regularisation (arXiv:2412.06071, eq. 9-12) and MonteCLoRA's variational loss."""
    config = adapted.active_peft_config
    loss: torch.Tensor | float = 0.0
    if config.kasa_config is not None:
        loss = loss + adapted.base_model._get_kasa_loss()
    if config.monteclora_config is not None:
        loss = loss + adapted.base_model._get_monteclora_loss()
    return loss


def stored_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Initialisations that looked at data are done: loading must not look for it again."""
    if config["init_lora_weights"] not in ("eva", "corda", "lora_ga"):
        return {}
    return {"init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None}


def _samplers(adapted: Any) -> dict[str, MontecloraSampler]:
    return {name: module for name, module in adapted.named_modules() if isinstance(module, MontecloraSampler)}


def extra_state(adapted: Any) -> dict[str, Any]:
    """MonteCLoRA's samples that are drawn and not yet used; empty for all other variants."""
    return {
        name: {"buffer": sampler.sampler.buffer, "index": sampler.sampler.index, "expert_weights": sampler.expert_weights}
        for name, sampler in _samplers(adapted).items()
    }


def load_extra_state(adapted: Any, state: dict[str, Any]) -> None:
    """Put `extra_state` back."""
    for name, sampler in _samplers(adapted).items():
        sampler.sampler.buffer, sampler.sampler.index = state[name]["buffer"], state[name]["index"]
        sampler.expert_weights = state[name]["expert_weights"]
