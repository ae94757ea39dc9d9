"""Adapters and their combination in one model: the base is loaded once, and which of them is active is switched in place."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper, set_peft_model_state_dict

from peftkit.adapters import RENDERINGS, read_mapping
from peftkit.combination import BASE, COMBINATION, Combination
from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.certify import certify, reference_logits
from peftkit.engine.combinable import PREFIX, WHERE, Source, combined_facts, rank_of
from peftkit.engine.combine import (
    Tensors,
    combined_layer,
    combined_vector,
    combined_whole,
    relative_error,
    squared_error,
    weighted_sum,
)
from peftkit.engine.loaded import LoadedAdapter, load_bare
from peftkit.engine.merge import probe_examples
from peftkit.engine.model import read_tokenizer
from peftkit.engine.store import save_adapter
from peftkit.errors import LoadError
from peftkit.run import new_folder, write_json, write_text

REPORT = "combination.json"
_NAME = "default"  # the combination's name in PEFT, under which it is saved


@dataclass(frozen=True)
class Combined:
    """The model, with every adapter and the combination in it.

    Attributes:
        sources: the adapters.
        loaded: the model; its facts and runtime are the combination's.
        originals: tensors of the base that adapters have trained whole, by PEFT's names; a new head has none.
        notes: what the adapters' facts differ in.
    """

    sources: Sequence[Source]
    loaded: LoadedAdapter
    originals: Tensors
    notes: list[str]

    def put(self, state: Tensors) -> None:
        """Give the combination other tensors."""
        _put(self.loaded.model, _NAME, state)

    @contextlib.contextmanager
    def active(self, name: str) -> Iterator[LoadedAdapter]:
        """The model with only the named adapter at work: a source's name, COMBINATION, or BASE for none."""
        model: Any = self.loaded.model
        if name == BASE:
            with model.disable_adapter():
                yield self.loaded
            return
        names = [source.name for source in self.sources]
        model.set_adapter(_NAME if name == COMBINATION else _in_peft(names.index(name)), inference_mode=True)
        yield self.loaded
        model.set_adapter(_NAME, inference_mode=True)


def num_layers(sources: Sequence[Source]) -> int:
    """Layers that any of the adapters has an update for."""
    return len({layer for source in sources for layer in source.updates})


def combined_state(
    sources: Sequence[Source], how: Combination, originals: Tensors, advance: Callable[[int], None] = lambda done: None
) -> tuple[Tensors, float]:
    """The tensors of a combination, and how far its update is from the exact weighted sum (relative, Frobenius).

    Args:
        sources: the adapters.
        how: the combination.
        originals: see `Combined`.
        advance: told when a layer is done.
    """

    def having(kind: str, key: str) -> tuple[list[Any], list[float]]:
        pairs = [(getattr(source, kind), weight) for source, weight in zip(sources, how.weights, strict=True)]
        return [held[key] for held, _ in pairs if key in held], [weight for held, weight in pairs if key in held]

    def keys(kind: str) -> list[str]:
        return sorted({key for source in sources for key in getattr(source, kind)})

    state, errors, rank = {}, [], rank_of(sources, how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        for layer in keys("updates"):
            found = combined_layer(*having("updates", layer), how, rank)
            errors.append(squared_error(found, weighted_sum(*having("updates", layer))))
            ending = "" if layer.endswith("embedding") else ".weight"
            state[f"{layer}_A{ending}"], state[f"{layer}_B{ending}"] = found.a, found.b
            advance(1)
    state |= {key: combined_vector(*having("vectors", key)) for key in keys("vectors")}
    state |= {key: combined_whole(*having("whole", key), originals.get(key)) for key in keys("whole")}
    return state, relative_error(errors)


def combined_config(sources: Sequence[Source], how: Combination) -> Any:
    """The PEFT config of a combination: where the adapters are, at scale 1."""
    first, rank = sources[0].config, rank_of(sources, how)
    whole = {name for source in sources for name in source.config.modules_to_save or ()}
    fields: dict[str, Any] = {name: getattr(first, name) for name in WHERE if hasattr(first, name)}
    if any(getattr(source.config, name) != value for source in sources for name, value in fields.items()):
        fields = dict.fromkeys(fields) | {"target_modules": sorted({name for source in sources for name in source.layers})}
        if "feedforward_modules" in fields:  # their vectors are for the inputs, (1, inputs); all others are (outputs, 1)
            inputs = {key for source in sources for key, vector in source.vectors.items() if vector.shape[0] == 1}
            fields["feedforward_modules"] = sorted(key.removeprefix(PREFIX).rpartition(".")[0] for key in inputs)
    fields |= {"modules_to_save": sorted(whole) or None, "fan_in_fan_out": first.fan_in_fan_out, "task_type": first.task_type}
    fields |= {"r": rank, "lora_alpha": rank} if rank else {}
    return type(first)(**fields, inference_mode=True, base_model_name_or_path=sources[0].facts.base)


def load_combined(sources: Sequence[Source], how: Combination) -> Combined:
    """Load the base once, with all adapters; the combination, still without tensors of its own, is active.

    Raises:
        LoadError: the base cannot be loaded, or an adapter does not fit it.
    """
    facts, notes = combined_facts(sources)
    bare = load_bare(sources[0].folder, sources[0].facts)
    own: Any = dict(bare.model.named_parameters(remove_duplicate=False))
    names = {key for source in sources for key in source.whole}
    kept = {key: own.get(key.removeprefix(PREFIX)) for key in names if key.removeprefix(PREFIX) not in bare.missing}
    originals = {key: tensor.detach().cpu().clone() for key, tensor in kept.items() if tensor is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of here is settled: tensors that do not fit are errors
            model: Any = AdaptedModel(bare.model, combined_config(sources, how), _NAME)
            for number, source in enumerate(sources):
                model.add_adapter(_in_peft(number), source.config)
                _put(model, _in_peft(number), source.state)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise LoadError(f"the adapters cannot be put into {type(bare.model).__name__}: {error}") from error
    model.set_adapter(_NAME, inference_mode=True)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    facts = dataclasses.replace(facts, encoding=bare.runtime.settings, dtype=dtype if facts.dtype == "auto" else facts.dtype)
    loaded = dataclasses.replace(bare, facts=facts, model=model.to(bare.device).eval())
    return Combined(sources, loaded, originals, notes)


def _in_peft(number: int) -> str:
    return f"source_{number}"


def _put(model: Any, name: str, state: Tensors) -> None:
    """Give an adapter of a model its tensors, all of them and in their dtype."""
    for key, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            dtypes = {tensor.dtype for own, tensor in state.items() if own.startswith(f"{key}.")}
            module.modules_to_save[name].to(dtypes.pop() if len(dtypes) == 1 else next(module.parameters()).dtype)
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    unexpected = set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
    if wrong := sorted({*unexpected} | (wanted ^ state.keys())):
        raise LoadError(f"an adapter does not fit {type(model.get_base_model()).__name__}: {', '.join(wrong[:3])}")


def view_of(combined: Combined, source: Source) -> LoadedAdapter:
    """The model as one adapter's rows are read and encoded for it."""
    own = combined.loaded
    has_tokenizer = (source.folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(str(source.folder)) if has_tokenizer else own.runtime.tokenizer
    encoding = source.facts.encoding or own.runtime.settings
    encoding = dataclasses.replace(encoding, max_length=min(encoding.max_length, own.position_limit or sys.maxsize))
    return dataclasses.replace(own, facts=source.facts, runtime=own.task.runtime(tokenizer, encoding))


def save_combined(combined: Combined, output: Path, report: dict[str, Any], card: str) -> dict[str, Any]:
    """Write the combination as an adapter folder, once it gives the logits of the one in memory; returns its certificate.

    Args:
        combined: with the combination's tensors in place.
        output: the folder.
        report: kept beside the adapter, with the certificate.
        card: the model card.

    Raises:
        CertificateError: it does not; nothing is left behind.
    """
    loaded, first = combined.loaded, combined.sources[0].folder
    examples = probe_examples(loaded.runtime, loaded.task, loaded.position_limit or sys.maxsize)
    with combined.active(COMBINATION):
        reference = reference_logits(loaded.model, loaded.runtime, examples, loaded.facts.mixed_precision)
    kept = read_mapping(first / RENDERINGS).get("renderings", []) if (first / RENDERINGS).is_file() else []
    with new_folder(output) as folder:
        save_adapter(folder, loaded.model, loaded.runtime.tokenizer, loaded.facts, {}, kept)
        certificate = certify(folder, reference, loaded.facts, loaded.runtime, examples)
        write_json(folder / REPORT, report | {"certificate": certificate})
        write_text(folder / "README.md", card)
    return certificate
