"""What is to be exported, as far as JSON files and the headers of tensor files say it: free of torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftkit.adapters import CONFIG, FACTS, TENSORS, adapter_folder, read_mapping
from peftkit.errors import LoadError
from peftkit.hub import cached_file
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.recipe.quantization import Quantization, stored_quantization, why_not_plain
from peftkit.run import Run


@dataclass(frozen=True)
class Subject:
    """An adapter and its base, without their weights.

    Attributes:
        folder: the adapter folder.
        run: the run directory that it is from; None for a plain adapter folder.
        task: task type.
        method: adapter method.
        base: folder or hub id of the base model.
        revision: its revision.
        adapter: adapter_config.json; empty for `full`, whose folder is a model.
        model: the base's config.json; empty where it is not at hand.
        tokenizer: tokenizer_config.json beside the adapter, or that of the base; empty where it is not at hand.
        facts: peftkit.json; empty for an adapter of plain PEFT.
        shapes: tensor name -> shape, of the adapter's file; empty for `full`.
        quantization: how the base is quantised.
    """

    folder: Path
    run: Path | None
    task: str
    method: str
    base: str
    revision: str | None = None
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def known_method(self) -> Method | None:
        """The facts of its method; None for one that is not known here."""
        return METHODS.get(self.method)

    @property
    def stands_alone(self) -> bool:
        """Whether the folder is a whole model."""
        return self.known_method is not None and self.known_method.stands_alone

    @property
    def architecture(self) -> str:
        """The class of the base's checkpoint; empty where it is not known."""
        return str(next(iter(self.model.get("architectures") or ()), ""))

    @property
    def model_type(self) -> str:
        """transformers' name for the kind of base model; empty where its config is not at hand."""
        return str(self.model.get("model_type", ""))

    @property
    def is_tied(self) -> bool:
        """Whether the base's output layer is its input embedding, as far as its config says."""
        return bool(self.model.get("tie_word_embeddings", False))

    def why_not_merged(self) -> Iterator[str]:
        """Reasons why the adapter cannot be folded into its base."""
        method = self.known_method
        if method is not None and method.not_mergeable:
            yield method.not_mergeable
        # PEFT writes every field, so that the config can stand in for the section.
        elif method and method.in_peft and (reason := method.not_mergeable_with(_Fields(**self.adapter))):
            yield reason
        if reason := why_not_plain(self.quantization):
            yield reason

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the adapter, or of the base; None where neither is on this machine."""
        return _read(self.folder / name) or model_file(self.base, self.revision, name) or None

    def fingerprint(self) -> str:
        """sha256 of the adapter's tensors, or of the whole model's for `full`."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


class _Fields(SimpleNamespace):
    """A config whose fields that were not written are None."""

    def __getattr__(self, name: str) -> None:
        return None


def read_subject(path: Path, base: str | None) -> Subject:
    """Read what there is to know of a run directory or adapter folder.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.

    Raises:
        LoadError: there is no adapter, or it does not say its base or its task.
    """
    folder = adapter_folder(path)
    facts, adapter = _read(folder / FACTS), _read(folder / CONFIG)
    if not facts and not adapter:
        raise LoadError(f"{folder} is no adapter: it has neither {FACTS} nor {CONFIG}")
    task = facts.get("task") or adapter.get("task_type")
    found = base or facts.get("base") or adapter.get("base_model_name_or_path")
    if not task:
        raise LoadError(f"{folder}/{CONFIG} has no task_type, so its model class cannot be told")
    if not found:
        raise LoadError(f"{folder} does not say its base model; name it with --base")
    revision = facts.get("revision") or adapter.get("revision")
    own = _read(folder / "config.json")  # of `full`, whose folder is the model
    model = own or model_file(found, revision, "config.json") or {}
    raw = facts.get("quantization")
    return Subject(
        folder=folder,
        run=path if folder != path and Run(path).resolved_path.is_file() else None,
        task=str(task),
        method=str(facts.get("method") or adapter.get("peft_type", "")).lower(),
        base=str(found),
        revision=revision,
        adapter=adapter,
        model=model,
        tokenizer=_read(folder / "tokenizer_config.json") or model_file(found, revision, "tokenizer_config.json") or {},
        facts=facts,
        shapes=tensor_shapes(folder / TENSORS),
        quantization=Quantization.from_json(raw) if raw else stored_quantization(model),
    )


def model_file(base: str, revision: str | None, name: str) -> dict[str, Any] | None:
    """A JSON file of a base model, from its folder or the hub's cache; None where it is not on this machine."""
    path = cached_file(base, revision, name)
    return _read(path) if path is not None else None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header: 8 bytes of length, then JSON (the format's README).

    Raises:
        LoadError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError) as error:
        raise LoadError(f"{path} is damaged: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is no such file."""
    return read_mapping(path) if path.is_file() else {}
