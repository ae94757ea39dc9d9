"""Prefix tuning and cartridges on tensors: a prefix that starts as the keys and values of a text."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

from peftkit.errors import Problem, RecipeError


def after_attach(adapted: Any, section: Any, context: Any) -> None:
    """Fill the prefix with what the base model computes for `init_text`.

    Raises:
        RecipeError: the text has fewer tokens than the prefix.
    """
    if context.shapes_only or section.init_text is None:
        return
    ids = context.tokenizer(section.init_text, return_tensors="pt")["input_ids"]
    if ids.shape[1] < section.num_virtual_tokens:
        what = f"has {ids.shape[1]} tokens, `num_virtual_tokens` is {section.num_virtual_tokens}; give a longer text"
        raise RecipeError([Problem("", "adapter.init_text", what)])
    with torch.no_grad(), adapted.disable_adapter():
        output = adapted(input_ids=ids.to(adapted.device), use_cache=True)
    initialize_kv_prefix_from_past_key_values(adapted, past_key_values=output.past_key_values)
