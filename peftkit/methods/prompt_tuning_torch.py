"""Prompt tuning, also of several tasks, on tensors: where its first prompt comes from."""

from __future__ import annotations

from typing import Any


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """The model's own tokenizer for `prompt_tuning_init: TEXT`, and the file of the source adapter where one is named."""
    fields: dict[str, Any] = {}
    if section.prompt_tuning_init == "TEXT":
        fields["tokenizer_name_or_path"] = context.plan.recipe.model.tokenizer_name_or_path or model.config.name_or_path
    source = getattr(section, "prompt_tuning_init_state_dict_path", None)
    if source is None:
        return fields
    if context.shapes_only:
        return fields | {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_state_dict_path": None}
    return fields | {"prompt_tuning_init_state_dict_path": str(context.find_adapter(source) / "adapter_model.safetensors")}


def stored_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The source is not needed again: loading must not look for it."""
    path = "prompt_tuning_init_state_dict_path"
    return {path: None, "prompt_tuning_init": "RANDOM"} if config.get(path) else {}
