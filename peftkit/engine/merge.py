"""Fold an adapter into its base: one stand-alone model, compared with the adapter before it is called done."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from peftkit.adapters import RENDERINGS, adapter_folder, read_mapping
from peftkit.engine.certify import TOLERANCE, largest_difference, reference_logits, scale_of
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.fold import folded
from peftkit.engine.in_files import Keep, cast, in_memory
from peftkit.engine.loaded import LoadedAdapter, with_full_weights
from peftkit.engine.model import Base, first_line, load_base_model, load_config, read_tokenizer, set_pad_token
from peftkit.engine.parity import check_renderings
from peftkit.engine.quantized import compute_in_float32
from peftkit.errors import CertificateError, LoadError, RecipeError
from peftkit.exports.llama_cpp import name_added_tokens
from peftkit.guides import CERTIFIED_MERGE
from peftkit.methods import METHODS
from peftkit.recipe.quantization import Quantization, stored_quantization, why_not_plain
from peftkit.run import new_folder
from peftkit.tasks.base import Task
from peftkit.tasks.example import Example, Runtime

_SENTENCEPIECE, _VOCABULARY = "tokenizer.model", "tokenizer.json"
_MAY_MISS = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
_MOST_ROUNDING = 0.25  # of the largest logit: what rounding to 16 bits moves further is another model
Proof = tuple[Sequence[Example], Sequence[torch.Tensor]]  # rows, and the logits of base and adapter


def probe_examples(runtime: Runtime, task: Task, max_length: int) -> list[Example]:
    """Fixed rows for comparing two models of a task, cut where the model has no positions for more."""
    cut = task.runtime(runtime.tokenizer, dataclasses.replace(runtime.settings, truncation="right", max_length=max_length))
    return [example for row in cut.probe_rows() for example in cut.encode(row, "probe")]


def check_mergeable(path: Path, base: str | None, output: Path) -> None:
    """Refuse what is known to be impossible before a weight is loaded.

    Args:
        path: run directory or adapter folder.
        base: base model, where the one that the adapter names cannot be found.
        output: folder to write; must not exist or be empty.

    Raises:
        RecipeError: the adapter cannot be merged, or `output` is not empty.
        LoadError: there is no adapter.
    """
    folder, facts = read_before_loading(path, base, output)
    known = METHODS.get(facts.method)
    if known and known.not_mergeable:
        raise RecipeError(f"--adapter: a {facts.method} adapter cannot be merged: {known.not_mergeable}")
    reason = known.not_mergeable_with(_peft_config(folder)) if known and known.in_peft else ""
    if reason := reason or why_not_plain(stored_layers(folder, facts)):
        raise RecipeError(f"--adapter: this adapter cannot be merged: {reason}")


def check_shard_size(text: str) -> None:
    """Refuse a size that is none.

    Raises:
        RecipeError: it is no whole number with a unit.
    """
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text, re.IGNORECASE):
        raise RecipeError(f"--max-shard-size: `{text}` is no size; write it as 500MB or 5GB")


def read_before_loading(path: Path, base: str | None, output: Path) -> tuple[Path, AdapterFacts]:
    """The folder of an adapter and its facts; arguments and errors are those of `check_mergeable`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"--output {output}: is not empty; name a new folder")
    folder = adapter_folder(path)
    return folder, read_facts(folder, base)


def _peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"the adapter {folder} cannot be loaded: {first_line(error)}") from error


def stored_layers(folder: Path, facts: AdapterFacts) -> Quantization | None:
    """How the base of an adapter is quantised: as it was trained, or for an adapter of plain PEFT as its checkpoint is."""
    if facts.quantization is not None:
        return facts.quantization
    with contextlib.suppress(LoadError):  # loading will say where to look for the base
        raw = getattr(load_config(facts.base_model(folder)), "quantization_config", None)
        return stored_quantization({"quantization_config": raw})
    return None


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        output: folder of the merged model.
        dtype: of its weights.
        max_shard_size: largest file of weights, as `5GB`.
        keep: where weights go that are computed on the way.
    """

    output: Path
    dtype: str
    max_shard_size: str = "5GB"
    keep: Keep = in_memory


def merge_adapter(loaded: LoadedAdapter, wanted: Wanted) -> dict[str, Any]:
    """Merge in float32, compare, cast, save, load again with plain transformers, compare again.

    On a quantised base: into the weights that its layers stand for, so that nothing is rounded and the result is plain.

    Args:
        loaded: the adapter, on the CPU.
        wanted: what to write.

    Returns:
        `max_abs_diff` (as computed), `compared_in` (float32, or float64 where that is too coarse), `max_abs_diff_saved` (as
        written), `tolerance`, `dtype`, `output`.

    Raises:
        RecipeError: the adapter cannot be merged.
        CertificateError: the merged model gives other logits; nothing is left behind.
    """
    examples = own_probes(loaded)
    reference = reference_logits(compute_in_float32(loaded.model, wanted.keep), loaded.runtime, examples)
    model = with_full_weights(loaded, wanted.keep) if loaded.is_quantized else loaded.model
    merged = folded(model, loaded.facts.method, wanted.keep)
    exact = largest_difference(reference, reference_logits(merged, loaded.runtime, examples))
    compared_in, tolerance = "float32", TOLERANCE[wanted.dtype]
    if exact > TOLERANCE["float32"] * scale_of(reference):
        require(exact, TOLERANCE["bfloat16"] * scale_of(reference), "merged")  # more than rounding makes of it
        merged, exact = _merged_in_float64(loaded, examples, wanted.keep)
        compared_in, tolerance = "float64", max(tolerance, TOLERANCE["float16"])
    require(exact, TOLERANCE["float32"] * scale_of(reference), "merged")
    saved, allowed = _write(merged, loaded, wanted, (examples, reference), tolerance)
    found = {"output": str(wanted.output), "dtype": wanted.dtype, "max_abs_diff": exact, "compared_in": compared_in}
    return found | {"max_abs_diff_saved": saved, "tolerance": allowed}


def _write(merged: Any, loaded: LoadedAdapter, wanted: Wanted, proof: Proof, tolerance: float) -> tuple[float, float]:
    """Write the merged model, if it loads alone as what it is; its difference from the proof's logits, and what is allowed."""
    (examples, reference), dtype = proof, wanted.dtype
    with new_folder(wanted.output) as folder:
        cast(merged, getattr(torch, dtype), wanted.keep).save_pretrained(folder, max_shard_size=wanted.max_shard_size)
        copy_companions(folder, loaded)
        alone = _load_alone(folder, loaded, dtype)
        if other := _other_weights(merged, alone):
            raise CertificateError(f"weights are others when the merged model is loaded alone: {other[:3]}")
        cast(alone, torch.float32, wanted.keep)
        saved = largest_difference(reference, reference_logits(alone, loaded.runtime, examples))
        allowed = tolerance * scale_of(reference)
        if saved > allowed and dtype != "float32":
            rounding = 2 * _rounding(loaded, dtype, proof, wanted.keep)
            allowed = max(allowed, min(rounding, _MOST_ROUNDING * scale_of(reference)))
        require(saved, allowed, f"saved ({dtype}; float32 rounds least)")
    return saved, allowed


def own_probes(loaded: LoadedAdapter) -> list[Example]:
    """Fixed rows for comparing an adapter's model with another one."""
    return probe_examples(loaded.runtime, loaded.task, loaded.position_limit or sys.maxsize)


def _merged_in_float64(loaded: LoadedAdapter, examples: Sequence[Example], keep: Keep) -> tuple[Any, float]:
    """The merged model and its difference where float32 does not do: deep models make much of the rounding of a weight."""
    model = cast(with_full_weights(loaded, keep), torch.float64, keep)
    reference = reference_logits(model, loaded.runtime, examples)
    merged = folded(model, loaded.facts.method, keep)
    return merged, largest_difference(reference, reference_logits(merged, loaded.runtime, examples))


def copy_companions(folder: Path, loaded: LoadedAdapter) -> None:
    """Write what belongs to a model beside its weights; the tokenizer must read rows as it did in training.

    Raises:
        CertificateError: it does not.
    """
    loaded.runtime.tokenizer.save_pretrained(folder)
    for name in ("generation_config.json", RENDERINGS):
        if (loaded.folder / name).is_file():
            (folder / name).write_bytes((loaded.folder / name).read_bytes())
    _copy_sentencepiece(folder, loaded)
    check_renderings(folder, loaded.task.runtime(read_tokenizer(str(folder)), loaded.runtime.settings))


def _copy_sentencepiece(folder: Path, loaded: LoadedAdapter) -> None:
    """The base's SentencePiece model beside the same vocabulary in tokenizer.json: llama.cpp's converter reads no other."""
    base = loaded.facts.untrained_base

    def find(name: str) -> Path | None:
        path = cached_file(base.path, name, revision=base.revision, **_MAY_MISS)
        return Path(path) if path else None

    found, vocabulary, own = find(_SENTENCEPIECE), find(_VOCABULARY), folder / _VOCABULARY
    if not found or not vocabulary or not own.is_file() or read_mapping(own)["model"] != read_mapping(vocabulary)["model"]:
        return
    (folder / _SENTENCEPIECE).write_bytes(found.read_bytes())
    name_added_tokens(folder)


def _load_alone(folder: Path, loaded: LoadedAdapter, dtype: str) -> PreTrainedModel:
    """The merged model as plain transformers loads it."""
    alone, missing = load_base_model(Base(str(folder), loaded.task, dtype, trust_remote_code=loaded.facts.trust_remote_code))
    if missing:
        raise CertificateError(f"the merged model lacks weights when loaded alone: {sorted(missing)[:3]}")
    set_pad_token(alone, loaded.runtime.tokenizer)
    return alone


def _other_weights(merged: nn.Module, alone: nn.Module) -> list[str]:
    """Names of weights that are not the same, bit by bit, in two models of a class."""
    own = dict(merged.named_parameters(remove_duplicate=False))
    return [name for name, weight in alone.named_parameters() if name not in own or not torch.equal(weight, own[name])]


def dtype_of_base(loaded: LoadedAdapter) -> str:
    """The dtype of the base's weights, or of those of them that are not quantised."""
    if loaded.is_quantized:
        model: Any = loaded.model
        return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return str(next(loaded.model.parameters()).dtype).removeprefix("torch.")


def _rounding(loaded: LoadedAdapter, dtype: str, proof: Proof, keep: Keep) -> float:
    """How far base and adapter are from themselves when they compute in a dtype: mixtures may choose other experts."""
    examples, reference = proof
    model = cast(with_full_weights(loaded, keep), getattr(torch, dtype), keep)
    return largest_difference(reference, reference_logits(model, loaded.runtime, examples))


def require(difference: float, allowed: float, what: str, whose: str = "the adapter's") -> None:
    """Raise where a model's logits differ from other ones by more than is allowed.

    Raises:
        CertificateError: they do.
    """
    if not difference <= allowed:
        raise CertificateError(
            f"the {what} model's logits differ from {whose} by up to {difference:.3g} (allowed {allowed:.3g}); "
            "nothing was written",
            guide=CERTIFIED_MERGE,
        )
