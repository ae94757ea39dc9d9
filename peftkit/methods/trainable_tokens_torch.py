"""Trainable tokens on tensors: ids of tokens that the recipe names by their text."""

from __future__ import annotations

from typing import Any

from peftkit.errors import Problem, RecipeError


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """Token ids, and the embedding by name, which PEFT 0.21 does not find in some models with a head.

    Raises:
        RecipeError: a text is no single token of the vocabulary.
    """
    ids = list(section.token_indices)
    for text in section.tokens:
        if context.tokenizer is None:
            raise RecipeError([Problem("", "adapter.tokens", "need the model's tokenizer, which is not there")])
        found = context.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            what = f"`{text}` is {len(found)} tokens of this vocabulary, not one"
            raise RecipeError([Problem("", "adapter.tokens", what)])
        ids += found
    fields: dict[str, Any] = {"token_indices": list(dict.fromkeys(ids))}
    if section.target_modules is None:
        embedding = model.get_input_embeddings()
        fields["target_modules"] = [name for name, module in model.named_modules() if module is embedding][:1]
    return fields
