"""`peftkit methods` and `peftkit explain`: reference, torch-free."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from peftkit import console
from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.methods.base import EVERY_KIND, EVERY_TASK, Method
from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.recipe.foreign import FOREIGN_KEYS
from peftkit.recipe.load import did_you_mean
from peftkit.tasks import TASKS


def list_methods(name: str | None, as_json: bool) -> None:
    """All methods, or the fields of one."""
    if name is not None and name.lower() not in METHODS:
        raise RecipeError(f"no method is called `{name}`; there are: {', '.join(METHODS)}" + did_you_mean(name, METHODS))
    chosen = list(METHODS) if name is None else [name.lower()]
    described = [_describe(method) for method in chosen]
    if as_json:
        console.print_json(described if name is None else described[0])
    elif name is None:
        rows = [
            (
                item["name"],
                item["summary"],
                f"{item['learning_rate']:g}",
                _yes(item["mergeable"]),
                _list(bits.removesuffix("bit") for bits in item["quantizations"]),
            )
            for item in described
        ]
        console.print_wide_table("", ["method", "what it is", "learning rate", "merges", "quantised"], rows)
    else:
        item = described[0]
        console.print_text(f"{item['name']}: {item['summary']}")
        for name_of_fact, text in _facts(METHODS[item["name"]]):
            console.print_text(f"{name_of_fact}: {text}")
        for text in _rates(METHODS[item["name"]]):
            console.print_text(text)
        fields = [
            (f["name"], f["type"], "" if f["required"] else _yaml(f["default"]), f["description"]) for f in item["fields"]
        ]
        console.print_wide_table("", ["field", "takes", "default", "meaning"], fields)
        if item["left_out"]:
            console.print_wide_table(
                "fields of PEFT that a recipe cannot state", ["field", "why"], list(item["left_out"].items())
            )


def _describe(name: str) -> dict[str, Any]:
    method = METHODS[name]
    fields = [info for info in all_keys() if info.method == name]
    return {
        "name": name,
        "summary": method.summary,
        "learning_rate": method.learning_rate,
        "learning_rates": {task: dict(zip(("value", "source"), method.learning_rate_for(task), strict=True)) for task in TASKS},
        "mergeable": not method.not_mergeable,
        "not_mergeable": method.not_mergeable,
        "peft_config": method.peft_config,
        "tasks": list(method.tasks),
        "model_kinds": list(method.model_kinds),
        "model_types": list(method.model_types),
        "why_not": method.why_not,
        "quantizations": list(method.quantizations),
        "trains_on": list(method.trains_on),
        "why_not_quantized": method.why_not_quantized,
        "several_adapters": method.several_adapters,
        "mixed_batches": method.mixed_batches,
        "fields": [_field(info) for info in fields],
        "left_out": dict(method.left_out),
    }


def _rates(method: Method) -> Iterator[str]:
    """The learning rates that `auto` stands for, with their sources."""
    yield f"learning rate: {method.learning_rate:g} ({method.learning_rate_source})"
    for task, (rate, source) in method.task_learning_rates.items():
        yield f"learning rate for {task}: {rate:g} ({source})"


def _facts(method: Method) -> Iterator[tuple[str, str]]:
    """What a method can do, in words."""
    limits = [] if method.tasks == EVERY_TASK else list(method.tasks)
    limits += [] if method.model_kinds == EVERY_KIND else [f"{kind} models" for kind in method.model_kinds]
    limits += method.model_types
    works = _list(limits) if limits else "every task and architecture"
    if method.without:
        works += ", but not " + _list([f"{task} on {kind} models" for task, kind in method.without])
    yield "works for", f"{works}: {method.why_not}" if method.why_not else works
    yield "merges into the base model", f"no: {method.not_mergeable}" if method.not_mergeable else "yes"
    quantised = _list(method.trains_on)
    yield "trains on quantised bases", f"{quantised}: {method.why_not_quantized}" if method.why_not_quantized else quantised
    yield "several adapters on one base", _yes(method.several_adapters) + ", even in one batch" * method.mixed_batches


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _list(values: Iterable[str]) -> str:
    return ", ".join(values) or "none"


def _field(info: KeyInfo) -> dict[str, Any]:
    return {
        "name": info.path.rpartition(".")[2],
        "type": info.type_text,
        "default": info.default,
        "required": info.required,
        "description": info.description,
    }


def _yaml(value: Any) -> str:
    """A default as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def explain(key: str, as_json: bool) -> None:
    """One key of the recipe: type, default, meaning."""
    keys = all_keys()
    found = [info for info in keys if info.path == key or info.path.endswith(f".{key}")]
    if not found:
        paths = {info.path: info.path for info in keys} | {info.path.rpartition(".")[2]: info.path for info in keys}
        close = difflib.get_close_matches(key, list(paths), n=1, cutoff=0.6)
        if key in FOREIGN_KEYS:
            raise RecipeError(f"no key is called `{key}`; here it is {FOREIGN_KEYS[key]}")
        hint = f"; did you mean `{paths[close[0]]}`?" if close else "; `peftkit schema` lists all of them"
        raise RecipeError(f"no key is called `{key}`{hint}")
    if as_json:
        console.print_json([{"key": info.path, "method": info.method} | _field(info) for info in found])
        return
    for info in found:
        default = "required" if info.required else f"default: {_yaml(info.default)}"
        of = f" (method: {info.method})" if info.method else ""
        console.print_text(f"{info.path}{of}\n  {info.description}\n  takes: {info.type_text}\n  {default}")
