"""A trained adapter, ready to answer: from a run directory or from any PEFT adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.facts import FACTS, AdapterFacts, read_facts
from peftkit.engine.hardware import autocast, process_device
from peftkit.engine.model import load_base_model, position_limit, read_tokenizer, set_pad_token
from peftkit.engine.parity import check_renderings
from peftkit.engine.quantized import bitsandbytes_layers, dequantized
from peftkit.engine.store import HEAD, load_into
from peftkit.errors import LoadError
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.tasks import TASKS
from peftkit.tasks.base import Task
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Runtime

CPU = torch.device("cpu")  # where adapters are merged and converted, on machines with a GPU too


@dataclass(frozen=True)
class LoadedAdapter:
    """A model with its adapter on this machine's device.

    Attributes:
        folder: the adapter folder.
        facts: how it was trained.
        model: in evaluation mode.
        runtime: the task on tensors, with the tokenizer.
        device: where the model is.
        missing: weights that the base's checkpoint lacks, which are random without the adapter.
    """

    folder: Path
    facts: AdapterFacts
    model: nn.Module
    runtime: Runtime
    device: torch.device
    missing: frozenset[str] = frozenset()

    @property
    def task(self) -> Task:
        """The task's facts."""
        return TASKS[self.facts.task]

    @property
    def method(self) -> Method | None:
        """The method's facts; None for an adapter of a type that is not known here."""
        return METHODS.get(self.facts.method)

    @property
    def is_quantized(self) -> bool:
        """Whether the base's linear layers are quantised, by training's wish or as its checkpoint has them."""
        return self.facts.quantization is not None or next(bitsandbytes_layers(self.model), None) is not None

    @property
    def position_limit(self) -> int | None:
        """Longest input in tokens that the model has positions for, beside the adapter's virtual tokens."""
        return position_limit(self.model.config, self.runtime.tokenizer, self._num_virtual_tokens)

    @property
    def _num_virtual_tokens(self) -> int:
        config = getattr(self.model, "active_peft_config", None)
        return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0

    def room_after(self, num_tokens: int) -> int:
        """New tokens that the model has positions for after a prompt of so many; the last new one is never read."""
        config: Any = self.model.config
        names = ("max_decoder_position_embeddings", "max_position_embeddings")
        limits = [getattr(config.get_text_config(), name, None) for name in names]
        limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), sys.maxsize)
        num_read = 1 if config.is_encoder_decoder else num_tokens  # a decoder of its own begins with one token
        return limit - self._num_virtual_tokens - num_read + 1

    @property
    def prompts(self) -> Runtime:
        """The runtime for prompts: bound by the model's positions, not by training's max_length, and none is cut in silence."""
        if not self.task.generates:
            return self.runtime
        return self.task.runtime(self.runtime.tokenizer, self.runtime.settings.for_prompts(self.position_limit))

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, and the autocast of training."""
        with torch.inference_mode(), autocast(self.device.type, self.facts.mixed_precision):
            yield


def adapter_folder(path: Path) -> Path:
    """The adapter folder of a run directory, or the path itself.

    Raises:
        LoadError: there is neither.
    """
    if not path.is_dir():
        raise LoadError(f"there is no run directory or adapter folder `{path}`")
    if (path / "adapter").is_dir():
        return path / "adapter"
    if (path / "resolved.yaml").is_file():
        raise LoadError(
            f"the run {path} has no adapter yet: its training did not end; `peftkit train --resume --output {path}`"
        )
    return path


def load_adapter(path: Path, base: str | None = None, device: torch.device | None = None) -> LoadedAdapter:
    """Load an adapter and its base.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        device: where the model shall be; None: on this machine's device. Quantised layers cannot all move later.

    Raises:
        LoadError: something is missing or does not fit.
        CertificateError: rows of training give other tokens now.
    """
    folder = adapter_folder(path)
    facts = read_facts(folder, base)
    if facts.task not in TASKS:
        raise LoadError(f"{folder} is for the task {facts.task}; those known here are {', '.join(TASKS)}")
    _require_own_virtual_tokens(folder, facts)
    bare = load_bare(folder, facts, device)
    adapted = load_into(bare.model, folder, facts.method, set(bare.missing))
    torch.seed()  # loading has set the seed of the run; sampling should not repeat itself at every call
    return dataclasses.replace(bare, model=adapted.to(bare.device).eval())


def load_bare(folder: Path, facts: AdapterFacts, device: torch.device | None = None) -> LoadedAdapter:
    """The base of an adapter, with the adapter's tokenizer and task, before the adapter is put into it.

    Raises:
        LoadError, CertificateError: as `load_adapter`.
    """
    encoding = facts.encoding or Encoding(max_length=4096, truncation="right")
    source = dataclasses.replace(facts.base_model(folder), device=device)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    try:
        if Path(source.path).is_absolute() and not Path(source.path).is_dir():
            raise LoadError(f"there is no folder `{source.path}`")
        tokenizer = read_tokenizer(str(folder) if has_tokenizer else source.path, None if has_tokenizer else source.revision)
        check_renderings(folder, TASKS[facts.task].runtime(tokenizer, encoding))
        model, missing = load_base_model(source, encoding)
    except LoadError as error:
        raise LoadError(f"the base of the adapter {folder}: {error}; where it has moved, name it with --base") from error
    set_pad_token(model, tokenizer)
    limit = position_limit(model.config, tokenizer)
    if limit is not None and limit < encoding.max_length:  # of a plain adapter, which does not say
        encoding = dataclasses.replace(encoding, max_length=limit)
    runtime = TASKS[facts.task].runtime(tokenizer, encoding)
    return LoadedAdapter(folder, facts, model, runtime, device or process_device(), frozenset(missing))


@contextlib.contextmanager
def without_adapter(loaded: LoadedAdapter) -> Iterator[LoadedAdapter]:
    """The base model in the adapter's place: the adapter switched off or, where nothing does that, the base loaded afresh."""
    if is_switchable(loaded):
        with loaded.model.disable_adapter():  # type: ignore[operator]
            yield loaded
        return
    source = dataclasses.replace(loaded.facts.untrained_base, device=loaded.device)
    base, missing = load_base_model(source, loaded.runtime.settings)
    set_pad_token(base, loaded.runtime.tokenizer)
    yield dataclasses.replace(loaded, model=base.to(loaded.device).eval(), missing=frozenset(missing))


def is_switchable(loaded: LoadedAdapter) -> bool:
    """Whether PEFT gives the untouched base back: not where trained tensors are the base model's own."""
    return isinstance(loaded.model, AdaptedModel) and not (loaded.folder / HEAD).is_file()


def with_full_weights(loaded: LoadedAdapter) -> nn.Module:
    """The same adapter on the weights that its quantised base stands for, freshly loaded, on the CPU in float32."""
    source = dataclasses.replace(loaded.facts.base_model(loaded.folder), device=CPU)
    base, missing = load_base_model(source, loaded.runtime.settings)
    set_pad_token(base, loaded.runtime.tokenizer)
    return load_into(dequantized(base), loaded.folder, loaded.facts.method, missing).float()


def _require_own_virtual_tokens(folder: Path, facts: AdapterFacts) -> None:
    """Raise where PEFT itself has trained virtual tokens with a head, which then reads them in place of the text's own."""
    method = METHODS.get(facts.method)
    embedded = method is not None and method.virtual_tokens_in == "embeddings"
    if embedded and TASKS[facts.task].has_head and not (folder / FACTS).is_file():
        raise LoadError(
            f"{folder} was trained by PEFT alone, which lets the head of {facts.task} read virtual tokens (0.21); here it "
            "reads the text, so that its answers would be wrong: use PEFT for it, or train it anew"
        )
