"""What a model has unlearned: its loss on text that the adapter is not about, with the adapter and without.

A language model's own loss is taken. Where a task has no language-model head, that of the base's checkpoint reads the hidden
states, masked or causal as it was trained; where there is none, how far the hidden states have moved is measured instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftkit.engine.adapted import backbone_of
from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import scores_of
from peftkit.engine.fast import proven_head
from peftkit.engine.loaded import LoadedAdapter, without_adapter
from peftkit.engine.sources import read_rows, sound_rows
from peftkit.engine.step import Step
from peftkit.errors import DataError
from peftkit.plan import Plan
from peftkit.recipe.paths import find_path
from peftkit.recipe.schema import SourceSection
from peftkit.tasks.example import Example, Runtime
from peftkit.tasks.runtime_torch import pad_inputs

MASKED_SHARE = (
    0.15  # of tokens, as BERT was trained (Devlin et al. 2019, arXiv:1810.04805, section 3.1); all become [MASK] here
)
MAX_LENGTH = 512  # tokens of a piece of text
Texts = Sequence[tuple[str, str]]  # `file:row` and text


def read_texts(path: Path) -> Texts:
    """The lines of a txt file, or the column `text` of rows.

    Raises:
        DataError: a row has no text, or there is none.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path} to measure forgetting on")
    texts = []
    for origin, row in sound_rows(read_rows(SourceSection(path=str(path.absolute())), Path())):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise DataError(f"{origin}: no text in `text`; the row has {', '.join(row) or 'no columns'}")
        texts.append((origin, row["text"]))
    if not texts:
        raise DataError(f"{path} has no rows to measure forgetting on")
    return texts


def forgetting_texts(plan: Plan) -> Texts:
    """The texts that a recipe names; none where it names none."""
    name = plan.recipe.evaluation.forgetting
    path = find_path(name, plan.recipe_dir) if name is not None else None
    return read_texts(path) if path is not None else ()


def measure_forgetting(loaded: LoadedAdapter, texts: Texts, batch_size: int) -> dict[str, Any]:
    """What is measured, before and after, by how much it rose, and the number of tokens (or texts) that it is about."""
    if loaded.task.generates:
        return _of_language_model(loaded, texts, batch_size)
    head = _language_model_of(loaded)
    if head is None:
        return _of_states(loaded, texts, batch_size)
    measure = "causal_lm_loss" if loaded.runtime.tokenizer.mask_token_id is None else "masked_lm_loss"
    after, before = (_loss(found) for found in _with_and_without(loaded, lambda model: _losses(model, head, texts, batch_size)))
    return _summary(measure, before, after)


def _summary(measure: str, before: tuple[float, int], after: tuple[float, int]) -> dict[str, Any]:
    rise = after[0] - before[0]
    return {"measure": measure, "loss_before": before[0], "loss_after": after[0], "rise": rise, "num_tokens": after[1]}


def _with_and_without(loaded: LoadedAdapter, measure: Any) -> Iterator[Any]:
    with loaded.inference():
        yield measure(loaded)
    with without_adapter(loaded) as bare, bare.inference():
        yield measure(bare)


def _of_language_model(loaded: LoadedAdapter, texts: Texts, batch_size: int) -> dict[str, Any]:
    """Loss per token; an encoder-decoder model reads the first half of a text and writes the second."""
    settings = loaded.runtime.settings
    length = min(MAX_LENGTH, loaded.position_limit or MAX_LENGTH)
    halves = loaded.model.config.is_encoder_decoder  # type: ignore[union-attr]
    further: dict[str, Any] = {"truncation": "right"} if halves else {"truncation": "split", "train_on": "all"}
    runtime = loaded.task.runtime(
        loaded.runtime.tokenizer, dataclasses.replace(settings, max_length=length, source_prefix="", **further)
    )
    tasks = {"task_id": settings.task_names[0]} if settings.task_names else {}
    rows = [(origin, (_halves(text) if halves else {"text": text}) | tasks) for origin, text in texts]
    examples = encode_rows(runtime, rows, "the text for forgetting")

    def measure(model: LoadedAdapter) -> float:
        chosen = examples if model.model is loaded.model else [dataclasses.replace(part, task_id=None) for part in examples]
        return _loss_of(model, runtime, chosen, batch_size)

    after, before = _with_and_without(loaded, measure)
    num_tokens = sum(example.num_target_tokens for example in examples)
    return _summary("lm_loss", (before, num_tokens), (after, num_tokens))


def _loss_of(loaded: LoadedAdapter, runtime: Runtime, examples: Sequence[Example], batch_size: int) -> float:
    """Loss per target, computed by this process alone: in a launched run the others have ended their part."""
    head = proven_head(loaded.model, runtime, list(examples), loaded.facts.mixed_precision, loaded.facts.dtype)
    step, results = Step(loaded.model, runtime, head).eval(), []
    order = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {name: tensor.to(loaded.device) for name, tensor in runtime.collate(chosen).items()}
        results += scores_of(step, step(batch, outputs_only=True), batch, chosen)
    loss: float = runtime.summarise(results)["loss"]
    return loss


def _halves(text: str) -> dict[str, str]:
    words = text.split()
    middle = (len(words) + 1) // 2
    return {"prompt": " ".join(words[:middle]), "completion": " ".join(words[middle:] or words)}


def _language_model_of(loaded: LoadedAdapter) -> PreTrainedModel | None:
    """The language model that the base's checkpoint is, for its head alone; None where it is none, or is quantised."""
    base, masked = loaded.facts.untrained_base, loaded.runtime.tokenizer.mask_token_id is not None
    if base.quantization is not None or base.init == "random":
        return None
    wanted = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code, "dtype": base.dtype}
    try:
        model, info = wanted.from_pretrained(base.path, output_loading_info=True, **options)
    except ValueError:  # no such class for this type of model
        return None
    if info["missing_keys"] or model.config.is_encoder_decoder:
        return None
    return model.to(loaded.device).eval()


class _States(nn.Module):
    """In place of a transformer: hidden states that are there already."""

    states: torch.Tensor

    def forward(self, *inputs: Any, **options: Any) -> BaseModelOutput:
        """What the head goes on with."""
        return BaseModelOutput(last_hidden_state=self.states)


def _losses(loaded: LoadedAdapter, head: PreTrainedModel, texts: Texts, batch_size: int) -> list[tuple[float, int]]:
    """Sum of the loss and number of its tokens, by batch."""
    mask, found, reader = loaded.runtime.tokenizer.mask_token_id, [], _States()
    setattr(head, head.base_model_prefix, reader)
    generator = torch.Generator().manual_seed(0)  # the same tokens are masked for both models
    for batch in _batches(loaded, texts, batch_size):
        ids, wanted = batch["input_ids"], _wanted(batch, loaded.runtime.tokenizer, generator)
        read = batch if mask is None else batch | {"input_ids": ids.masked_fill(wanted, mask)}
        reader.states = _hidden_states(loaded, read)
        logits = head(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
        if mask is None:
            logits, ids, wanted = logits[:, :-1], ids[:, 1:], wanted[:, 1:]
        found.append((float(functional.cross_entropy(logits[wanted].float(), ids[wanted], reduction="sum")), int(wanted.sum())))
    return found


def _loss(found: Sequence[tuple[float, int]]) -> tuple[float, int]:
    num_tokens = sum(number for _, number in found)
    return math.fsum(loss for loss, _ in found) / max(1, num_tokens), num_tokens


def _wanted(batch: dict[str, torch.Tensor], tokenizer: Any, generator: torch.Generator) -> torch.Tensor:
    """Which tokens (N, T) are to be told: without a mask token all that are read, else the masked share of them."""
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids, device=batch["input_ids"].device))
    read = batch["attention_mask"].bool() & ~special
    if tokenizer.mask_token_id is None:
        return read
    chances = torch.rand(read.shape, generator=generator).to(read.device).masked_fill(~read, 2.0)
    return read & ((chances < MASKED_SHARE) | (chances == chances.amin(1, keepdim=True)))  # at least one of every text


def _batches(loaded: LoadedAdapter, texts: Texts, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Texts as the model reads them, cut at the right."""
    length = min(MAX_LENGTH, loaded.position_limit or MAX_LENGTH)
    for start in range(0, len(texts), batch_size):
        examples = []
        for origin, text in texts[start : start + batch_size]:
            ids = loaded.runtime.tokenizer(text, truncation=True, max_length=length)["input_ids"]
            task_id = 0 if loaded.runtime.settings.task_names else None
            examples.append(Example({"input_ids": ids}, [], 0, origin, len(ids), task_id=task_id))
        padded = pad_inputs(loaded.runtime.tokenizer, examples)
        yield {name: tensor.to(loaded.device) for name, tensor in padded.items()}


def _hidden_states(loaded: LoadedAdapter, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The backbone's last hidden states (N, T, D)."""
    base: Any = base_of_adapted(loaded.model)
    seen: list[torch.Tensor] = []
    hook = backbone_of(base).register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    try:
        known = batch if base is not loaded.model else {name: part for name, part in batch.items() if name != "task_ids"}
        loaded.model(**known)
    finally:
        hook.remove()
    return seen[-1]


def _of_states(loaded: LoadedAdapter, texts: Texts, batch_size: int) -> dict[str, Any]:
    """Mean cosine distance of the texts' vectors, the mean of their hidden states, to those of the base."""

    def measure(model: LoadedAdapter) -> torch.Tensor:
        vectors = []
        for batch in _batches(model, texts, batch_size):
            states, seen = _hidden_states(model, batch).float(), batch["attention_mask"][:, :, None]
            vectors.append(((states * seen).sum(1) / seen.sum(1)).cpu())
        return torch.cat(vectors)

    after, before = _with_and_without(loaded, measure)
    distance = 1 - float(functional.cosine_similarity(after, before).mean())
    return _summary("cosine_distance", (0.0, len(texts)), (distance, len(texts)))
