"""A plan as a recipe in which nothing is left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftkit.plan import Plan
from peftkit.recipe.paths import absolute_path
from peftkit.recipe.yaml_file import parse_scalar
from peftkit.tasks import keys_of_others


def resolved_yaml(plan: Plan) -> str:
    """The recipe with every value that has an effect, paths absolute, `auto` decided: a valid recipe again."""
    data = plan.recipe.model_dump(mode="json")
    data["model"]["dtype"] = plan.dtype
    data["model"]["quantization"] = _resolved_quantization(plan)
    data["training"] |= {
        "mixed_precision": plan.mixed_precision,
        "micro_batch_size": plan.micro_batch_size,
        "learning_rate": plan.learning_rate,
    }
    if data["training"]["max_steps"] is not None:
        del data["training"]["num_train_epochs"]
    if not plan.task.generates:
        del data["generation"]
    if plan.recipe.data is not None:
        if not plan.task.train_on:
            del data["data"]["train_on"]
        if "max_length" not in plan.recipe.data.model_fields_set:
            del data["data"]["max_length"]  # the default bows to what the model can take
        if data["data"]["validation"] is None and data["data"]["test"] is None:
            evaluation = data.pop("evaluation")
            if evaluation["forgetting"]:
                data["evaluation"] = {name: evaluation[name] for name in ("batch_size", "forgetting")}
    for key in keys_of_others(plan.task):
        section, _, name = key.rpartition(".")
        (data.get(section) or {} if section else data).pop(name, None)
    _make_absolute(data, plan.recipe_dir)
    return yaml.dump(data, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


def _resolved_quantization(plan: Plan) -> dict[str, Any] | None:
    section, found = plan.recipe.model.quantization, plan.quantization
    if section is None or found is None:
        return None
    # Defaults of the schema need not be what a checkpoint has that is quantised already.
    stated = section.model_dump(mode="json", include=section.model_fields_set if found.is_stored else None)
    return stated | ({"compute_dtype": found.compute_dtype} if found.computes_in or not found.is_stored else {})


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes what our reader takes for a number, such as `1e4`, which YAML 1.1 takes for text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_RecipeDumper.add_representer(str, _represent_text)


def _make_absolute(data: dict[str, Any], recipe_dir: Path) -> None:
    rows = data["data"] or {}
    splits = {name: rows[name] for name in ("train", "validation", "test") if isinstance(rows.get(name), list)}
    # A single source is written as the section that it is.
    rows |= {name: sources[0] for name, sources in splits.items() if len(sources) == 1}
    sources = [source for sources in splits.values() for source in sources]
    names = [(data["model"], key) for key in ("name_or_path", "tokenizer_name_or_path", "chat_template")]
    names += [(data["evaluation"], "forgetting")] if "evaluation" in data else []
    for section, key in [*names, *((source, "path") for source in sources)]:
        if section[key] is not None and (path := absolute_path(section[key], recipe_dir)) is not None:
            section[key] = str(path)
