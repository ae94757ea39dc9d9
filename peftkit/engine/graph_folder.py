"""What the targets `onnx` and `openvino` have in common: the graphs of what is exported, the files beside them, the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.graph_clients import DecodingClient, Session
from peftkit.engine.graph_proof import answers_of, check_answers, check_outputs
from peftkit.engine.graphs import Graph, examples_batch, graphs_of
from peftkit.engine.model import read_tokenizer
from peftkit.engine.parity import RENDERINGS, check_renderings
from peftkit.exports.base import Check, Form, Material
from peftkit.exports.graph_options import task_number
from peftkit.tasks import TASKS

_COPIED = ("generation_config.json", RENDERINGS)


def model_of(material: Material, form: Form, task_id: str | None) -> Any:
    """What is exported, in float32; of an adapter of several tasks one."""
    model = material.load(form)
    if isinstance(model, AdaptedModel):
        model.only_task = task_number(material.subject, task_id)
    return model.requires_grad_(False)


def graphs_for(model: nn.Module, material: Material) -> list[Graph]:
    """The graphs of a model with this material's rows as examples."""
    subject = material.subject
    cached = subject.known_method is None or not subject.known_method.not_cached
    example = examples_batch(material.runtime, material.examples())
    return graphs_of(model, material.runtime, example, generates=TASKS[subject.task].generates, cached=cached)


def write_companions(material: Material, model: nn.Module, folder: Path) -> None:
    """Tokenizer with its template, config with its labels, generation settings, and rows that prove the template.

    Raises:
        CertificateError: the tokenizer as written gives other tokens than that of training.
    """
    base: Any = base_of_adapted(model)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    tokenizer = material.runtime.tokenizer
    tokenizer.save_pretrained(folder)
    for name in _COPIED:
        if (material.subject.folder / name).is_file():
            (folder / name).write_bytes((material.subject.folder / name).read_bytes())
    task = TASKS[material.subject.task]
    check_renderings(folder, task.runtime(read_tokenizer(str(folder)), material.runtime.settings))


def check_files(material: Material, task_id: str | None, sessions: Mapping[str, Session], relative: float | None) -> Check:
    """Compare files with the adapter on its base.

    Args:
        material: what is exported.
        task_id: the task, of adapters of several.
        sessions: the files by the names of their graphs.
        relative: largest allowed difference over the largest number; None: any.
    """
    model = model_of(material, "adapter", task_id)
    if not TASKS[material.subject.task].generates:
        return check_outputs(model, material, sessions["model"], relative)
    config = base_of_adapted(model).config
    start = config.decoder_start_token_id if config.is_encoder_decoder else 0
    later = sessions.get("decoder_with_past_model")
    first = sessions.get("decoder_model") or sessions.get("model") or sessions["decoder_model_merged"]
    client = DecodingClient(
        first, later or first, sessions.get("encoder_model"), start, material.runtime.tokenizer.pad_token_id
    )
    return check_answers(answers_of(model, material), client, relative)
