"""CPT on tensors: the context's tokens from examples, and the loss on the answers that are part of the context."""

from __future__ import annotations

from typing import Any

import torch

from peftkit.errors import Problem, RecipeError
from peftkit.tasks.example import IGNORE_INDEX

_INPUT, _ANSWER, _KINDS = 2, 4, 4  # token types of Tsachor et al. 2024 (arXiv:2410.17222): input and label; each example adds 4


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """Token ids, mask and types of the context.

    Raises:
        RecipeError: an example has no answer, or there is no tokenizer to read the examples with.
    """
    if section.cpt_token_ids is not None:
        return {"num_virtual_tokens": len(section.cpt_token_ids)}
    if context.tokenizer is None:
        raise RecipeError([Problem("", "adapter.examples", "need the model's tokenizer, which is not there")])
    ids: list[int] = []
    types: list[int] = []
    for number, example in enumerate(section.examples):
        prompt = context.tokenizer(example.prompt, add_special_tokens=not ids)["input_ids"]
        answer = context.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        if not answer:
            raise RecipeError([Problem("", f"adapter.examples.{number}", "has an empty completion")])
        ids += prompt + answer
        types += [number * _KINDS + _INPUT] * len(prompt) + [number * _KINDS + _ANSWER] * len(answer)
    return {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": types, "num_virtual_tokens": len(ids)}


def batch_penalty(adapted: Any, batch: dict[str, torch.Tensor], loss_sum: Any) -> torch.Tensor | float:
    """The loss of the context's own answers, older ones weighted less (`opt_loss_decay_factor`); summed over rows.

    PEFT takes one mean over these and the row's targets; here they count beside the targets, so that the reported loss is that
    of the rows alone.
    """
    config = adapted.active_peft_config
    state = adapted.prompt_states
    if state is None:
        return 0.0
    ids = torch.tensor(config.cpt_token_ids, device=state.device)
    types = torch.tensor(config.cpt_tokens_type_mask, device=state.device)
    answers = torch.where((types > 0) & (types % _KINDS == 0), ids, IGNORE_INDEX)
    logits = adapted.get_base_model().get_output_embeddings()(state)
    total = logits.new_zeros(())
    decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
    weight = decay
    for kind in sorted({int(kind) for kind in types if kind > 0 and kind % _KINDS == 0}, reverse=True):
        labels = torch.where(types == kind, answers, IGNORE_INDEX).expand(len(state), -1)
        total = total + weight * loss_sum(logits, labels)
        weight *= decay
    return total
