"""Several named adapters on one base, whose weights are held once; each adapter answers as if it were alone.

A model without adapter is copied module by module while all copies share its tensors, and every adapter goes onto a copy of
its own: so any methods go together, heads of different sizes too. LoRA, GLoRA and RoAd adapters of language models share a
copy, where the rows of one batch can be for different ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from peftkit.adapters import CONFIG, adapter_folder
from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.hardware import process_device
from peftkit.engine.loaded import LoadedAdapter, is_switchable, load_adapter
from peftkit.engine.model import Base, load_base_model
from peftkit.engine.store import load_beside
from peftkit.errors import LoadError, RecipeError
from peftkit.methods import METHODS
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding

BASE = "base"  # the name of the model without adapter
_NO_ADAPTER = "__base__"  # PEFT's word for it among the adapters of a batch
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Fields beside which PEFT takes one adapter for all rows of a batch (0.21), apart from those that it marks as LoRA variants.
_FOR_ALL_ROWS = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")


@dataclass(eq=False)
class Host:
    """A model that holds one adapter or, where it `mixes`, several of which every row of a batch can choose its own."""

    model: Any
    mixes: bool
    keys: set[str] = dataclasses.field(default_factory=set)

    @contextlib.contextmanager
    def using(self, keys: Sequence[str], **inputs: Any) -> Iterator[None]:
        """Answer the rows of a batch with these adapters, by their names in this model.

        Args:
            keys: one for each row; without `mixes` all are the same.
            inputs: of the batch, what adapters read besides the tokens; see `AdaptedModel.answering`.
        """
        with contextlib.ExitStack() as stack:
            if len({*keys}) > 1:
                inputs["adapter_names"] = list(keys)
            elif keys[0] == _NO_ADAPTER:
                stack.enter_context(self.model.disable_adapter())
            elif self.mixes and self.model.active_adapter != keys[0]:
                self.model.set_adapter(keys[0], inference_mode=True)
            if isinstance(self.model, AdaptedModel):
                stack.enter_context(self.model.answering(**inputs))
            yield


@dataclass(frozen=True, eq=False)
class Named:
    """An adapter under its name, or the base.

    Attributes:
        name: as the user calls it.
        loaded: what `engine.generate` works with, in the context of `chosen`.
        host: the model that holds it.
        key: its name there.
    """

    name: str
    loaded: LoadedAdapter
    host: Host
    key: str

    @contextlib.contextmanager
    def chosen(self) -> Iterator[LoadedAdapter]:
        """The adapter, which alone answers meanwhile."""
        with self.host.using([self.key]):
            yield self.loaded


class Several:
    """The adapters by name, in the order in which they came.

    Args:
        base: base model, where the one that the adapters name cannot be found.
        device: where the models shall be; None: on this machine's device.
    """

    def __init__(self, base: str | None = None, device: torch.device | None = None) -> None:
        self._base, self._device = base, device or process_device()
        self._bare: dict[str, tuple[nn.Module, set[str]]] = {}  # models without adapter, whose tensors are shared
        self._mixing: dict[str, Host] = {}
        self._named: dict[str, Named] = {}
        self._bare_base: Named | None = None
        self._count = 0

    @property
    def names(self) -> list[str]:
        """The adapters' names and, where it can answer, `base`."""
        return [*self._named, *([BASE] if self._first_with_base else [])]

    def __getitem__(self, name: str) -> Named:
        """An adapter, or the base.

        Raises:
            KeyError: there is none of this name.
        """
        return self._named[name] if name != BASE else self._without_adapter()

    def load(self, name: str, path: Path) -> Named:
        """Load an adapter; it takes the place of one that had this name, which whoever holds it can go on using.

        Raises:
            RecipeError: the name cannot be one.
            LoadError: it does not load, or is for another base.
        """
        require_name(name)
        folder = adapter_folder(path)
        facts = read_facts(folder, self._base)
        require_one_base({other: named.loaded.facts for other, named in self._named.items()} | {f"{name} (new)": facts})
        self._count += 1
        key = f"adapter{self._count}"
        place = repr((facts.method, _unseeded(facts.base_model(folder)))) if is_mixable(folder, facts) else ""
        host = self._mixing.get(place)
        if host is not None:
            loaded = self._load_beside(host, path, key)
        else:
            loaded, key = load_adapter(path, self._base, self._device, load_base=self._bare_copy), "default"
            host = Host(loaded.model, mixes=bool(place))
            if place:
                self._mixing[place] = host
        host.keys.add(key)
        before = self._named.get(name)
        self._named[name] = Named(name, loaded, host, key)
        self._bare_base = self._bare_base if before is None else None
        return self._named[name]

    def remove(self, name: str) -> Named:
        """Take an adapter's name away; whoever holds it can go on using it, until it is let go by `release`.

        Raises:
            KeyError: there is none of this name.
        """
        self._bare_base = None
        return self._named.pop(name)

    def release(self, named: Named) -> None:
        """Free the memory of an adapter that nobody uses."""
        host = named.host
        host.keys.discard(named.key)
        if not host.keys:
            self._mixing = {place: other for place, other in self._mixing.items() if other is not host}
        elif host.mixes:
            if host.model.active_adapter == named.key:
                host.model.set_adapter(min(host.keys), inference_mode=True)
            host.model.delete_adapter(named.key)

    def description(self) -> list[str]:
        """Who is there, and which adapters share a model."""
        lines = []
        for name, named in self._named.items():
            facts = named.loaded.facts
            beside = [other for other, item in self._named.items() if item.host is named.host and other != name]
            mixed = f"; answers in one batch with {', '.join(beside)}" if beside else ""
            stands_alone = named.loaded.method is not None and named.loaded.method.stands_alone
            own = "; holds a base of its own" if stands_alone or (named.loaded.is_quantized and not beside) else ""
            beams = "; without beams, which its recipe asks for" if facts.generation.get("num_beams", 1) > 1 else ""
            lines.append(f"{name}: {facts.method}, {facts.task}{mixed}{own}{beams}")
        return [*lines, *([f"{BASE}: {next(iter(self._named.values())).loaded.facts.base}"] if BASE in self.names else [])]

    def _load_beside(self, host: Host, path: Path, key: str) -> LoadedAdapter:
        def add(model: Any, folder: Path, method: str, missing: set[str]) -> nn.Module:
            load_beside(model, folder, key)
            return model

        return load_adapter(
            path, self._base, self._device, load_base=lambda source, encoding: (host.model, set()), put_onto=add
        )

    def _bare_copy(self, source: Base, encoding: Encoding) -> tuple[Any, set[str]]:
        """A model without adapter that shares its tensors with all others that are equal to it; quantised ones are apart."""
        settings = (encoding.labels, encoding.num_outputs, encoding.problem_type) if source.task.has_head else ()
        place = repr((_unseeded(source), settings))
        if place not in self._bare:
            model, missing = load_base_model(source, encoding)
            if getattr(model, "hf_quantizer", None) is not None or source.quantization is not None:
                return model, missing
            model = model.to(self._device)
            for other, _ in self._bare.values():
                _share_equal(model, other)
            self._bare[place] = model, missing
        model, missing = self._bare[place]
        return with_shared_tensors(model), missing

    @property
    def _first_with_base(self) -> Named | None:
        """The first adapter without which its model could answer: not one whose head the base lacks."""
        return next((named for named in self._named.values() if not named.loaded.missing), None)

    def _without_adapter(self) -> Named:
        first = self._first_with_base
        if first is None:
            raise KeyError(BASE)
        facts = dataclasses.replace(first.loaded.facts, method=BASE)
        if is_switchable(first.loaded):
            return Named(BASE, dataclasses.replace(first.loaded, facts=facts), first.host, _NO_ADAPTER)
        if self._bare_base is None:
            model, missing = self._bare_copy(first.loaded.facts.untrained_base, first.loaded.runtime.settings)
            if missing:
                raise KeyError(BASE)
            loaded = dataclasses.replace(first.loaded, facts=facts, model=model.to(self._device).eval())
            self._bare_base = Named(BASE, loaded, Host(loaded.model, mixes=False), "default")
        return self._bare_base


def parse_names(texts: Sequence[str]) -> dict[str, Path]:
    """Adapters by name, of arguments like `name=DIR`.

    Raises:
        RecipeError: one has another form, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise RecipeError(f"--adapter {text}: several adapters need names: --adapter name=DIR --adapter other=DIR")
        require_name(name)
        if name in found:
            raise RecipeError(f"--adapter {text}: the name `{name}` is given twice")
        found[name] = Path(path)
    return found


def name_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """The same; an adapter that is alone needs no name, and gets that of its run directory."""
    if len(texts) > 1 or not is_path(texts[0]):
        return parse_names(texts)
    path = Path(texts[0])
    name = path.absolute().parent.name if path.name == "adapter" else path.absolute().name
    return {name if _NAME.fullmatch(name) and name != BASE else "adapter": path}


def is_path(text: str) -> bool:
    """Whether an argument is a folder without a name in front."""
    return "=" not in text or Path(text).is_dir()


def require_name(name: str) -> None:
    """Raise RecipeError for what cannot be an adapter's name."""
    if name == BASE or not _NAME.fullmatch(name):
        taken = " `base` is the model without adapter." if name == BASE else ""
        raise RecipeError(
            f"`{name}` cannot name an adapter:{taken} a name has 1 to 64 letters, digits, `_`, `-` and `.`, and begins with a "
            "letter or a digit"
        )


def survey(adapters: Mapping[str, Path], base: str | None) -> dict[str, AdapterFacts]:
    """The facts of adapters, which are on one base, before anything is loaded.

    Raises:
        LoadError: one is missing, or they are on different bases.
    """
    facts = {name: read_facts(adapter_folder(path), base) for name, path in adapters.items()}
    require_one_base(facts)
    return facts


def require_one_base(facts: Mapping[str, AdapterFacts]) -> None:
    """Raise LoadError where adapters are on different bases, with their names."""
    groups: dict[str, list[str]] = {}
    for name, item in facts.items():
        path = str(Path(item.base).resolve()) if Path(item.base).is_dir() else item.base
        groups.setdefault(f"{path}@{item.revision}" if item.revision else path, []).append(name)
    if len(groups) > 1:
        found = "; ".join(f"{', '.join(names)}: {base}" for base, names in groups.items())
        raise LoadError(
            f"these adapters are on different bases: {found}. One process holds one base: start another for the others "
            "or, where it is one base in two places, name it with --base"
        )


def is_mixable(folder: Path, facts: AdapterFacts) -> bool:
    """Whether rows of one batch can be for this adapter and for others of its method: PEFT ignores it in silence elsewhere."""
    method = METHODS.get(facts.method)
    if method is None or not method.mixed_batches or not TASKS[facts.task].generates or not (folder / CONFIG).is_file():
        return False
    config = peft.PeftConfig.from_pretrained(str(folder))
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    alone = any(getattr(config, name, None) for name in (*variants, *_FOR_ALL_ROWS))
    return not alone and getattr(config, "bias", "none") == "none" and getattr(config, "init_lora_weights", None) != "mica"


def with_shared_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model, around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _unseeded(base: Base) -> Base:
    """The base without the seed of its new head, which adapters bring."""
    return base if base.init == "random" else dataclasses.replace(base, seed=0)


def _share_equal(model: nn.Module, other: nn.Module) -> None:
    """Let a model have the tensors of another one that are equal to its own: the backbone under another head, or task."""
    theirs = {_in_backbone(other, name): parameter for name, parameter in other.named_parameters()}
    for name, own in list(model.named_parameters(remove_duplicate=False)):
        found = theirs.get(_in_backbone(model, name))
        if found is not None and found.dtype == own.dtype and found.device == own.device and torch.equal(found, own):
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, found)


def _in_backbone(model: Any, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")
