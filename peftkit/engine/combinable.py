"""Which adapters can be combined, found from their folders before a base model is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
from peft.utils.other import get_pattern_key

from peftkit.adapters import TENSORS, adapter_folder
from peftkit.combination import ON_FACTORS, Combination
from peftkit.engine.adapter import read_tensors
from peftkit.engine.combine import Tensors, Update
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.model import first_line
from peftkit.engine.store import HEAD
from peftkit.errors import LoadError, RecipeError
from peftkit.recipe.quantization import Quantization
from peftkit.run import Run
from peftkit.tasks import TASKS

PREFIX = "base_model.model."  # of every tensor that PEFT saves
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules")
_FACTORS = (".lora_A.weight", ".lora_embedding_A")
_VECTOR = ".ia3_l"
_FIELDS = [field.name for field in dataclasses.fields(AdapterFacts) if field.name not in ("base", "seed", "encoding")]
# Fields of PEFT's LoRA config under which an update is not scale * B A of one layer, or not for every token.
_UNFIT = {
    "use_dora": "is DoRA, whose magnitudes do not add up",
    "layer_replication": "stacks the base's layers anew",
    "alora_invocation_tokens": "acts only after its invocation tokens",
    "arrow_config": "is an Arrow router over other adapters; combine those",
    "target_parameters": "adapts parameters that are no layer",
    "trainable_token_indices": "trains embeddings of single tokens, which two adapters would each want for themselves",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "kasa_config": "has singular values between A and B (KaSA)",
    "monteclora_config": "has sampled matrices (MonteCLoRA)",
    "use_qalora": "pools its inputs (QA-LoRA)",
    "lora_bias": "has biases of its own",
}


@dataclass(frozen=True)
class Source:
    """One of the adapters.

    Attributes:
        name: what it is called in options and tables.
        folder: its adapter folder.
        facts: how it was trained.
        config: its PEFT config.
        state: its tensors, by PEFT's names.
    """

    name: str
    folder: Path
    facts: AdapterFacts
    config: Any
    state: Tensors

    @cached_property
    def updates(self) -> dict[str, Update]:
        """Layer (as the base model calls it, with the kind of its tensors) -> its LoRA update."""
        found = {}
        for key, tensor in self.state.items():
            if key.endswith(_FACTORS):
                layer = key.removesuffix(".weight").removesuffix("_A")
                other = self.state.get(f"{layer}_B{'.weight' if key.endswith('.weight') else ''}")
                if other is None:
                    raise LoadError(f"the adapter {self.folder} is damaged: {key} has no matrix B beside it")
                name = layer.removeprefix(PREFIX).rpartition(".")[0]
                found[layer] = Update(tensor.float(), other.float(), self._scale(name, tensor.shape[0]))
        return found

    def _scale(self, name: str, rank: int) -> float:
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), name), self.config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    @cached_property
    def vectors(self) -> Tensors:
        """IA3's vectors by PEFT's names."""
        return {key: tensor for key, tensor in self.state.items() if key.endswith(_VECTOR)}

    @cached_property
    def whole(self) -> Tensors:
        """Tensors of modules that were trained whole, by PEFT's names."""
        parts = tuple(f".{name}." for name in self.config.modules_to_save or ())
        kept = {key: tensor for key, tensor in self.state.items() if not key.endswith(_VECTOR) and ".lora_" not in key}
        return {key: tensor for key, tensor in kept.items() if any(part in f".{key}" for part in parts)}

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, as the base model calls them."""
        keys = [*self.updates, *self.vectors]
        return [key.removeprefix(PREFIX).rpartition(".")[0] for key in keys]

    @property
    def base_identity(self) -> str:
        """What the base is: the fingerprint of a run's, else its name."""
        fingerprints: dict[str, str] = Run(self.folder.parent).read_environment().get("fingerprints", {})
        return fingerprints.get("model", "")


def read_sources(named: Mapping[str, Path], base: str | None) -> list[Source]:
    """The adapters by their names, with their tensors; `base`: where the one that they name cannot be found.

    Raises:
        RecipeError: one is neither a LoRA nor an IA3 adapter.
        LoadError: a folder is no adapter, or damaged.
    """
    found = {name: (folder := adapter_folder(path), read_facts(folder, base)) for name, path in named.items()}
    problems = [line for name, (_, facts) in found.items() for line in _method_problem(name, facts)]
    if problems:
        raise RecipeError("\n".join(problems))
    return [_read(name, folder, facts) for name, (folder, facts) in found.items()]


def _method_problem(name: str, facts: AdapterFacts) -> Iterator[str]:
    if facts.task not in TASKS:
        yield f"`{name}` is for the task {facts.task}; those known here are {', '.join(TASKS)}"
    if facts.method not in ("lora", "ia3"):
        learned = "; `method: adapter_fusion` learns to combine these" if facts.method == "bottleneck" else ""
        others = "; `peftkit convert` makes a LoRA of many others" if not learned else ""
        yield f"`{name}` is a {facts.method} adapter; only lora and ia3 can be combined{learned}{others}"


def _read(name: str, folder: Path, facts: AdapterFacts) -> Source:
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"the adapter {folder} cannot be loaded: {first_line(error)}") from error
    config.inference_mode = True
    return Source(name, folder, facts, config, read_tensors(folder / TENSORS))


def check_sources(sources: Sequence[Source], how: Combination) -> None:
    """Refuse adapters that cannot be combined in this way, with every reason.

    Raises:
        RecipeError: with a line for each.
    """
    problems = [line for source in sources for line in _own_problems(source)]
    problems += [line for other in sources[1:] for line in _differences(sources[0], other)]
    if not problems:
        problems = list(_shape_problems(sources)) or list(_rank_problems(sources, how))
    if problems:
        raise RecipeError("\n".join(problems))


def _own_problems(source: Source) -> Iterator[str]:
    if unfit := [(field, what) for field, what in _UNFIT.items() if getattr(source.config, field, None)]:
        yield from (f"`{source.name}` cannot be combined: it {what} (`{field}`)" for field, what in unfit)
        return
    if getattr(source.config, "bias", "none") != "none":
        yield f"`{source.name}` cannot be combined: it trains biases of the base (`bias: {source.config.bias}`)"
        return
    factors = tuple(ending.replace("_A", side) for ending in _FACTORS for side in ("_A", "_B"))
    known = {*source.whole, *source.vectors, *(key for key in source.state if key.endswith(factors))}
    strange = sorted(source.state.keys() - known) + [HEAD] * (source.folder / HEAD).is_file()
    if strange:
        yield f"`{source.name}` holds what is no part of LoRA or IA3 and would be lost: {', '.join(strange[:3])}"
    if odd := [key for key, tensor in source.state.items() if key.endswith(factors) and tensor.dim() != 2]:
        yield f"`{source.name}` adapts a layer that is no matrix: {odd[0].removeprefix(PREFIX)}"


def _differences(first: Source, other: Source) -> Iterator[str]:
    """Why two adapters do not go together."""
    pair, mine, theirs = f"`{first.name}` and `{other.name}`", first.facts, other.facts
    if first.folder.resolve() == other.folder.resolve():
        yield f"{pair} are the same adapter"
    if mine.method != theirs.method:
        yield f"{pair} are of two methods, {mine.method} and {theirs.method}; `peftkit convert` makes LoRAs of many methods"
    if mine.task != theirs.task:
        yield f"{pair} are for two tasks, {mine.task} and {theirs.task}; adapters of one task can be combined"
    elif mine.encoding and theirs.encoding and _head(mine) != _head(theirs):
        yield (
            f"{pair} have heads for different answers: {_head_text(mine)}, and {_head_text(theirs)}. Heads of the same classes "
            "in the same order can be combined: name all classes in the `data.labels` of both recipes"
        )
    yield from _base_differences(first, other)


def _head(facts: AdapterFacts) -> tuple[Any, ...]:
    """What the outputs of the task's head stand for."""
    encoding = facts.encoding
    assert encoding is not None
    return (encoding.labels, encoding.problem_type or "single_label_classification") if TASKS[facts.task].has_labels else ()


def _head_text(facts: AdapterFacts) -> str:
    labels = facts.encoding.labels if facts.encoding else ()
    shown = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
    return f"{len(labels)} classes ({shown})" if labels else "a number"


def _base_differences(first: Source, other: Source) -> Iterator[str]:
    mine, theirs = first.facts, other.facts
    prints = (first.base_identity, other.base_identity)
    same = prints[0] == prints[1] if all(prints) else mine.base == theirs.base
    if not same:
        yield (
            f"`{first.name}` and `{other.name}` are for different bases, {mine.base} and {theirs.base}: what one has learned "
            "means nothing to the other" + ("" if all(prints) else "; where both are one model, name it with --base")
        )
    for field in ("revision", "init", "config_overrides", "quantization", *(("seed",) if mine.init == "random" else ())):
        old, new = getattr(mine, field), getattr(theirs, field)
        if old != new and not (field == "revision" and all(prints)):
            shown = [f"{value.bits} bits" if isinstance(value, Quantization) else value for value in (old, new)]
            yield f"`{first.name}` and `{other.name}` are for different bases: their `{field}` is {shown[0]} and {shown[1]}"


def _shape_problems(sources: Sequence[Source]) -> Iterator[str]:
    """Layers whose inputs or outputs differ, as those of two models do."""
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for source in sources:
        sizes: dict[str, tuple[int, ...]] = {}
        sizes |= {layer: (update.a.shape[1], update.b.shape[0]) for layer, update in source.updates.items()}
        sizes |= {key: tuple(tensor.shape) for key, tensor in (source.vectors | source.whole).items()}
        for key, size in sizes.items():
            name, known = seen.setdefault(key, (source.name, size))
            if known != size:
                yield f"`{name}` and `{source.name}` do not fit one model: {key.removeprefix(PREFIX)} has {known} and {size}"
                return


def _rank_problems(sources: Sequence[Source], how: Combination) -> Iterator[str]:
    """Different ranks for a method that mixes lora_A with lora_A and lora_B with lora_B; a rank that nothing would fill."""
    method, exact = how.method, rank_of(sources, dataclasses.replace(how, method="cat"))
    if method == "svd" and exact and (how.svd_rank or 0) > exact:
        yield f"--svd-rank: {how.svd_rank} is more than the ranks add up to: the result is exact at {exact}"
    if sources[0].facts.method == "ia3" and method != "linear":
        yield f"--method {method}: IA3 has no matrices to do this with; it takes `linear`"
    if sources[0].facts.method == "ia3" or method not in ON_FACTORS:
        return
    ranks: dict[str, tuple[str, int]] = {}
    for source in sources:
        for layer, update in source.updates.items():
            name, rank = ranks.setdefault(layer, (source.name, update.a.shape[0]))
            if rank != update.a.shape[0]:
                instead = "svd" if method == "linear" else f"{method}_svd"
                yield (
                    f"--method {method}: needs equal ranks, and `{name}` has {rank} where `{source.name}` has "
                    f"{update.a.shape[0]}; `cat` (exact) and `{instead}` take any"
                )
                return


def rank_of(sources: Sequence[Source], how: Combination) -> int:
    """Rank of the combination in every layer; 0 for IA3."""
    layers = {layer for source in sources for layer in source.updates}
    ranks = [[source.updates[layer].a.shape[0] for source in sources if layer in source.updates] for layer in layers]
    if how.method == "cat":
        return max(map(sum, ranks), default=0)
    return (how.svd_rank if how.by_svd else None) or max((rank for found in ranks for rank in found), default=0)


def combined_facts(sources: Sequence[Source]) -> tuple[AdapterFacts, list[str]]:
    """The facts of the combination, which are the first adapter's, and what of them the others have otherwise.

    How rows are read (format, columns, template) is left open where it differs, so that the rows of all can be read.
    """
    first, notes = sources[0].facts, []
    found = first
    for other in sources[1:]:
        differing = [name for name in _FIELDS if getattr(first, name) != getattr(other.facts, name)]
        opened: dict[str, Any] = {
            name: "auto" if name == "format" else {} for name in differing if name in ("format", "columns", "template")
        }
        found = dataclasses.replace(found, **opened)
        mine, theirs = (dataclasses.asdict(facts.encoding) if facts.encoding else {} for facts in (first, other.facts))
        kept = [*(name for name in differing if name not in opened), *(name for name in mine if mine[name] != theirs.get(name))]
        if kept:
            names = ", ".join(f"`{name}`" for name in kept)
            notes.append(f"as `{sources[0].name}` was trained, and `{other.name}` otherwise: {names}")
    return found, notes
