"""What the targets `onnx` and `openvino` have in common: the graphs of what is exported, the files beside them, the check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftkit.adapters import RENDERINGS, read_mapping
from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.evaluate import flat_metrics, score_examples
from peftkit.engine.graph_clients import DecodingClient, Session, SinglePassClient
from peftkit.engine.graph_proof import answers_of, check_answers, check_outputs, with_metrics
from peftkit.engine.graphs import Graph, examples_batch, graphs_of
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.loaded import CPU
from peftkit.engine.model import first_line, read_tokenizer
from peftkit.engine.parity import check_renderings
from peftkit.engine.step import Step
from peftkit.errors import CertificateError, PeftkitError
from peftkit.exports.base import Check, Form, Material
from peftkit.exports.graph_options import GraphOptions, task_number
from peftkit.run import write_json
from peftkit.tasks import TASKS

_COPIED = ("generation_config.json", RENDERINGS)
_BATCH_SIZE = 8
Client = SinglePassClient | DecodingClient


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
    _write_tokenizer(material.runtime.tokenizer, folder)
    for name in _COPIED:
        if (material.subject.folder / name).is_file():
            (folder / name).write_bytes((material.subject.folder / name).read_bytes())
    task = TASKS[material.subject.task]
    check_renderings(folder, task.runtime(read_tokenizer(str(folder)), material.runtime.settings))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer, its chat template in both places: transformers.js (4) looks into tokenizer_config.json alone."""
    tokenizer.save_pretrained(folder)
    if tokenizer.chat_template:
        config = read_mapping(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", config | {"chat_template": tokenizer.chat_template})


def client_of(sessions: Mapping[str, Session], model: nn.Module, material: Material) -> Client:
    """Files, by the names of their graphs, in the place of the model that they were made of."""
    if not TASKS[material.subject.task].generates:
        return SinglePassClient(sessions["model"])
    base: Any = base_of_adapted(model)
    first = sessions.get("decoder_model_merged") or sessions.get("decoder_model") or sessions["model"]
    return DecodingClient(
        first=first,
        later=sessions.get("decoder_with_past_model", first),
        encoder=sessions.get("encoder_model"),
        start=getattr(base.config, "decoder_start_token_id", None) or 0,
        pad=material.runtime.tokenizer.pad_token_id,
        prepare_decoder_input_ids_from_labels=getattr(base, "prepare_decoder_input_ids_from_labels", None),
    )


@contextlib.contextmanager
def running(target: str) -> Iterator[None]:
    """What a runtime raises becomes an error for users.

    Raises:
        CertificateError: it cannot load the files, or fails while it computes.
    """
    try:
        yield
    except PeftkitError:
        raise
    except Exception as error:  # the runtimes have no class of their own in common
        raise_if_exhausted(error)
        raise CertificateError(
            f"{target}: the runtime cannot use the files: {first_line(error)}; nothing was written"
        ) from error


def require_sound(target: str, check: Callable[..., Check], material: Material, options: GraphOptions, folder: Path) -> None:
    """Check files before they are quantised.

    Raises:
        CertificateError: they give something else than the adapter already.
    """
    found = check(material, options.model_copy(update={"quantization": "none", "data": None}), folder)
    if not found.passed:
        raise CertificateError(f"{target}: {found.client}: before quantisation, {found.detail}; nothing was written")


def check_export(model: nn.Module, material: Material, client: Client, options: GraphOptions, relative: float) -> Check:
    """Compare a client's numbers with the model's; quantised ones may differ, and the metrics tell what that costs.

    Args:
        model: the adapter on its base.
        material: what was exported.
        client: the runtime with the files.
        options: those of the export.
        relative: largest difference of a number over the largest one, of a file that is not quantised.
    """
    found = check_client(model, material, client, relative if options.quantization == "none" else None)
    if options.data is None:
        return found
    examples = material.examples_of(Path(options.data))
    return with_metrics(found, _metrics(material, model, examples), _metrics(material, client, examples))


def _metrics(material: Material, model: Any, examples: list[Any]) -> dict[str, float]:
    """The task's metrics on rows."""
    results = score_examples(Step(model, material.runtime), examples, batch_size=_BATCH_SIZE, device=CPU)
    return flat_metrics(material.runtime.summarise(results))


def check_client(model: nn.Module, material: Material, client: Client, relative: float | None) -> Check:
    """Compare files with the adapter on its base.

    Args:
        model: the adapter on its base.
        material: what is exported.
        client: the files.
        relative: largest allowed difference over the largest number; None: any.
    """
    if isinstance(client, SinglePassClient):
        return check_outputs(model, material, client.session, relative)
    return check_answers(answers_of(model, material), client, relative)
