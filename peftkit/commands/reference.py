"""`peftkit methods` and `peftkit explain`: reference, torch-free."""

from __future__ import annotations

import difflib
import json
from typing import Any

from peftkit import console
from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.recipe.foreign import FOREIGN_KEYS
from peftkit.tasks import TASKS


def list_methods(name: str | None, as_json: bool) -> None:
    """All methods, or the fields of one."""
    if name is not None and name.lower() not in METHODS:
        raise RecipeError(f"no method is called `{name}`; there are: {', '.join(METHODS)}")
    chosen = list(METHODS) if name is None else [name.lower()]
    described = [_describe(method) for method in chosen]
    if as_json:
        console.print_json(described if name is None else described[0])
    elif name is None:
        rows = [(item["name"], item["summary"], f"{item['learning_rate']:g}") for item in described]
        console.print_wide_table("", ["method", "what it is", "learning rate"], rows)
    else:
        item = described[0]
        console.print_text(f"{item['name']}: {item['summary']}")
        for task, rate in item["learning_rates"].items():
            console.print_text(f"learning rate for {task}: {rate['value']:g} ({rate['source']})")
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
        "peft_config": method.peft_config,
        "tasks": list(TASKS),
        "fields": [_field(info) for info in fields],
        "left_out": dict(method.left_out),
    }


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
