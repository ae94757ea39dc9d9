"""Exports: what writers work on, made once for all targets of a command, and the folder that is left behind."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn

import peftkit
from peftkit.engine.certify import reference_logits
from peftkit.engine.data import encode_rows
from peftkit.engine.in_files import weights_in_files
from peftkit.engine.loaded import CPU, LoadedAdapter, load_adapter
from peftkit.engine.merge import Wanted, check_mergeable, dtype_of_base, merge_adapter, probe_examples
from peftkit.engine.model import Base, load_base_model, load_config, meta_model, read_tokenizer, set_pad_token
from peftkit.engine.modules import head_modules
from peftkit.engine.quantized import compute_in_float32
from peftkit.engine.scoring import rows_of_file
from peftkit.errors import CertificateError
from peftkit.exports.base import Check, Dtype, Form
from peftkit.exports.jobs import LAUNCH, RECORD, Job
from peftkit.exports.subject import Subject
from peftkit.recipe.quantization import Quantization, stored_quantization
from peftkit.run import new_folder, write_json, write_text
from peftkit.tasks.example import Batch, Example, Runtime


@dataclass
class SharedMaterial:
    """What the writers of one command share; see `peftkit.exports.base.Material`.

    Attributes:
        subject: what is exported.
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        work_dir: folder for files in between, which is removed afterwards.
    """

    subject: Subject
    path: Path
    base: str | None
    work_dir: Path
    _logits: dict[Form, list[torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def _loaded(self) -> LoadedAdapter:
        return load_adapter(self.path, self.base, CPU)

    @property
    def runtime(self) -> Runtime:
        """The task on tensors, with the tokenizer of the adapter."""
        return self._loaded.runtime

    @property
    def position_limit(self) -> int | None:
        """Longest input in tokens that the model has positions for."""
        return self._loaded.position_limit

    def base_dir(self) -> Path | None:
        """Folder of the base model, with its weights; None where it is not on this machine."""
        if Path(self.subject.base).is_dir():
            return Path(self.subject.base)
        try:
            patterns = ["*.json", "*.safetensors"]
            found = snapshot_download(
                self.subject.base, revision=self.subject.revision, allow_patterns=patterns, local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        return Path(found)

    def merged(self, dtype: Dtype) -> Path:
        """Folder of the merged model as plain transformers writes it, with the tokenizer."""
        folder = self.work_dir / f"merged-{dtype}"
        if not folder.exists():
            check_mergeable(self.path, self.base, folder)
            with weights_in_files(self.work_dir) as keep:
                loaded = load_adapter(self.path, self.base, CPU)  # merging uses it up
                merge_adapter(loaded, Wanted(folder, dtype_of_base(loaded) if dtype == "auto" else dtype, keep=keep))
        return folder

    def open(self, folder: Path, quantization: Quantization | None = None) -> nn.Module:
        """The task's model from a folder of plain transformers, on the CPU; its linear layers quantised as it is loaded."""
        trusted = bool(self.subject.facts.get("trust_remote_code"))
        base = Base(str(folder), self._loaded.task, trust_remote_code=trusted, device=CPU)
        config = load_config(base)
        base = dataclasses.replace(base, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
        if stored := stored_quantization(config.to_dict()):
            saved = config.to_dict()["quantization_config"].get("bnb_4bit_compute_dtype") or base.dtype
            quantization = dataclasses.replace(stored, compute_dtype=saved)
        elif quantization is not None:
            heads = tuple(head_modules(meta_model(base, config), base.task))
            quantization = dataclasses.replace(quantization, skip_modules=heads)
        model, _ = load_base_model(dataclasses.replace(base, quantization=quantization))
        set_pad_token(model, read_tokenizer(str(folder)))
        return model.eval()

    def load(self, form: Form) -> nn.Module:
        """The adapter on its base, or the merged model by plain transformers; on the CPU in float32."""
        if form == "adapter":
            return compute_in_float32(self._loaded.model)
        return self.open(self.merged("float32"))

    def examples(self) -> list[Example]:
        """Fixed rows for comparing two models of the task."""
        return probe_examples(self.runtime, self._loaded.task, self._loaded.position_limit or sys.maxsize)

    def examples_of(self, path: Path) -> list[Example]:
        """The rows of a file in the format of the training rows, their columns renamed alike."""
        return encode_rows(self.runtime, rows_of_file(self._loaded.facts, path), str(path))

    def batches(self) -> list[Batch]:
        """The model inputs of each of these rows alone, without labels."""
        collated = [self.runtime.collate([example]) for example in self.examples()]
        return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in collated]

    def logits(self, form: Form) -> list[torch.Tensor]:
        """Tensors that the task's forward gives for these rows, in float32; kept."""
        if form not in self._logits:
            self._logits[form] = reference_logits(self.load(form), self.runtime, self.examples())
        return self._logits[form]

    def logits_of(self, folder: Path) -> list[torch.Tensor]:
        """The same for an adapter folder that was written, on a fresh base."""
        model = compute_in_float32(load_adapter(folder, self.base or self.subject.base, CPU).model)
        return reference_logits(model, self.runtime, self.examples())


@contextmanager
def shared_material(subject: Subject, path: Path, base: str | None) -> Iterator[SharedMaterial]:
    """The material of one command; its merged models are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="peftkit-export-") as folder:
        yield SharedMaterial(subject, path, base, Path(folder))


def export_job(job: Job, material: SharedMaterial) -> dict[str, Any]:
    """Write one target's folder and have a client read it; returns what export.json says.

    Raises:
        CertificateError: the client gives other answers; nothing is left behind.
    """
    with new_folder(job.output) as folder:
        job.exporter.write(material, job.options, folder)
        if command := job.exporter.command(material.subject, job.options):
            write_text(folder / LAUNCH, f'#!/bin/sh\nhere=$(cd "$(dirname "$0")" && pwd)\nexec {command} "$@"\n')
        check = job.exporter.check(material, job.options, folder)
        if check.passed is False:
            raise CertificateError(f"{job.exporter.name}: {check.client}: {check.detail}; nothing was written")
        record = _record(job, material.subject, check, folder)
        write_json(folder / RECORD, record)
    return record | {"output": str(job.output)}


def _record(job: Job, subject: Subject, check: Check, folder: Path) -> dict[str, Any]:
    """What was exported, from what, what the lint said, and how it was checked."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "target": job.exporter.name,
        "form": job.exporter.form(job.options),
        "options": job.options.model_dump(mode="json"),
        "run": str(subject.run) if subject.run else None,
        "adapter": {"method": subject.method, "task": subject.task, "sha256": subject.fingerprint()},
        "base": {"name": subject.base, "revision": subject.revision},
        "launch": job.exporter.command(subject, job.options) or None,
        "findings": [vars(finding) for finding in job.findings],
        "check": {**vars(check), "numbers": dict(check.numbers)},
        "files": files,
        "peftkit": peftkit.__version__,
    }
