"""A trained adapter, ready to answer: from a run directory or from any PEFT adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.adapters import FACTS, adapter_folder
from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.hardware import autocast, process_device
from peftkit.engine.in_files import Keep, cast, in_memory
from peftkit.engine.model import Base, load_base_model, position_limit, read_tokenizer, set_pad_token
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

LoadBase = Callable[[Base, Encoding], tuple[Any, set[str]]]
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


def load_adapter(
    path: Path,
    base: str | None = None,
    device: torch.device | None = None,
    *,
    quantized: bool = True,
    load_base: LoadBase = load_base_model,
    put_onto: Callable[[Any, Path, str, set[str]], nn.Module] = load_into,
) -> LoadedAdapter:
    """Load an adapter and its base.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        device: where the model shall be; None: on this machine's device. Quantised layers cannot all move later.
        quantized: whether the base is quantised as it was in training, where it was.
        load_base: gives the base and the names of what its checkpoint lacks.
        put_onto: puts the adapter of a folder, of a method, onto that.

    Raises:
        LoadError: something is missing or does not fit.
        CertificateError: rows of training give other tokens now.
    """
    folder = adapter_folder(path)
    facts = read_facts(folder, base)
    facts = facts if quantized else dataclasses.replace(facts, quantization=None)
    _require_known(folder, facts)
    bare = load_bare(folder, facts, device, load_base)
    adapted = put_onto(bare.model, folder, facts.method, set(bare.missing))
    torch.seed()  # loading has set the seed of the run; sampling should not repeat itself at every call
    return dataclasses.replace(bare, model=adapted.to(bare.device).eval())


def load_bare(
    folder: Path, facts: AdapterFacts, device: torch.device | None = None, load_base: LoadBase = load_base_model
) -> LoadedAdapter:
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
        model, missing = load_base(source, encoding)
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


def with_full_weights(loaded: LoadedAdapter, keep: Keep = in_memory) -> nn.Module:
    """The same adapter on the weights that its base stands for, freshly loaded, on the CPU in float32."""
    source = dataclasses.replace(loaded.facts.base_model(loaded.folder), device=CPU)
    base, missing = load_base_model(source, loaded.runtime.settings)
    set_pad_token(base, loaded.runtime.tokenizer)
    full = load_into(dequantized(base, keep), loaded.folder, loaded.facts.method, missing)
    return cast(full, torch.float32, keep)


def _require_known(folder: Path, facts: AdapterFacts) -> None:
    """Raise for other tasks, and where PEFT itself trained virtual tokens with a head, which then reads them as text."""
    if facts.task not in TASKS:
        raise LoadError(f"{folder} is for the task {facts.task}; those known here are {', '.join(TASKS)}")
    method = METHODS.get(facts.method)
    embedded = method is not None and method.virtual_tokens_in == "embeddings"
    if embedded and TASKS[facts.task].has_head and not (folder / FACTS).is_file():
        raise LoadError(
            f"{folder} was trained by PEFT alone, which lets the head of {facts.task} read virtual tokens (0.21); here it "
            "reads the text, so that its answers would be wrong: use PEFT for it, or train it anew"
        )
