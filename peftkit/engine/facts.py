"""What is kept beside an adapter: how it was trained, in peftkit.json, and its model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.adapters import CONFIG, FACTS, TENSORS, read_mapping
from peftkit.engine.adapter import read_tensors
from peftkit.engine.model import Base
from peftkit.errors import LoadError
from peftkit.methods import METHODS
from peftkit.plan import Plan
from peftkit.reading.columns import computed_columns
from peftkit.recipe.quantization import Quantization
from peftkit.run import write_text
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding


@dataclass(frozen=True)
class AdapterFacts:
    """What peftkit.json keeps beside the adapter, so that inference repeats what training did.

    Attributes:
        task: task type.
        method: adapter method.
        base: base model, as it was loaded.
        revision: its revision.
        dtype: dtype of the frozen weights.
        mixed_precision: autocast of the run.
        format: format of the training rows.
        columns: our column names -> those of the (first) training source.
        template: our column names -> Jinja text over its columns.
        encoding: how rows became token ids.
        system_prompt: system message for rows that have none.
        generation: settings of the recipe's generation section.
        trust_remote_code: as in the recipe.
        use_safetensors: as in the recipe.
        init: `random` where the base was built from its config with `seed`.
        seed: seed of the run.
        config_overrides: changed keys of the model's config.
        attn_implementation: attention kernel of the run.
        quantization: how the base's linear layers were quantised.
    """

    task: str
    method: str
    base: str
    revision: str | None = None
    dtype: str = "auto"
    mixed_precision: str = "no"
    format: str = "auto"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    template: dict[str, str] = dataclasses.field(default_factory=dict)
    encoding: Encoding | None = None
    system_prompt: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust_remote_code: bool = False
    use_safetensors: bool = True
    init: str = "pretrained"
    seed: int = 0
    config_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_implementation: str | None = None
    quantization: Quantization | None = None

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the columns that the training rows were renamed from, renamed alike."""
        return computed_columns(row, self.columns, self.template, partial=True)

    def base_model(self, folder: Path) -> Base:
        """The base model that the adapter in `folder` goes onto; for `full` the folder itself is the model."""
        method, base = METHODS.get(self.method), self.untrained_base
        if method is None or not method.stands_alone:
            return base
        return dataclasses.replace(base, path=str(folder), revision=None, init="pretrained", config_overrides={})

    @property
    def untrained_base(self) -> Base:
        """The base model as it was before training, whatever the method."""
        method = METHODS.get(self.method)
        return Base(
            path=self.base,
            task=TASKS[self.task],
            dtype=self.dtype,
            revision=self.revision,
            init=self.init,
            seed=self.seed,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            use_safetensors=self.use_safetensors,
            config_overrides=self.config_overrides,
            linear=method is not None and method.linear_only,
            quantization=self.quantization,
        )


def facts_of(plan: Plan, base: str, encoding: Encoding, data_format: str) -> AdapterFacts:
    """The facts of a run's adapter."""
    recipe = plan.recipe
    return AdapterFacts(
        task=recipe.task,
        method=plan.method.name,
        base=base,
        revision=recipe.model.revision,
        dtype=plan.dtype,
        mixed_precision=plan.mixed_precision,
        format=data_format,
        columns=dict(recipe.data.train[0].columns) if recipe.data else {},
        template=dict(recipe.data.train[0].template) if recipe.data else {},
        encoding=encoding,
        system_prompt=recipe.data.system_prompt if recipe.data else None,
        generation=recipe.generation.model_dump(mode="json") if plan.task.generates else {},
        trust_remote_code=recipe.model.trust_remote_code,
        use_safetensors=recipe.model.use_safetensors,
        init=recipe.model.init,
        seed=recipe.training.seed,
        config_overrides=dict(recipe.model.config_overrides),
        attn_implementation=recipe.model.attn_implementation,
        quantization=plan.quantization,
    )


def read_facts(folder: Path, base: str | None = None) -> AdapterFacts:
    """The facts of an adapter folder; of a plain PEFT adapter, as far as its config and tensors tell.

    Raises:
        LoadError: it is no adapter folder, or its base is not known.
    """
    if (folder / FACTS).is_file():
        data = read_mapping(folder / FACTS)
        try:
            read: dict[str, Any] = {"encoding": Encoding.from_json(data["encoding"])}
            if quantization := data.get("quantization"):
                read["quantization"] = Quantization.from_json(quantization)
            return AdapterFacts(**data | read | ({"base": base} if base else {}))
        except (KeyError, TypeError) as error:
            raise LoadError(f"{folder / FACTS} is damaged or of another version of peftkit: {error}") from error
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder} is no adapter: it has neither {FACTS} nor {CONFIG}")
    config = read_mapping(folder / CONFIG)
    found = base or config.get("base_model_name_or_path")
    if not found:
        raise LoadError(f"{folder} does not say its base model; name it with --base")
    if not config.get("task_type"):
        raise LoadError(f"{folder}/{CONFIG} has no task_type, so its model class cannot be told")
    task = TASKS.get(config["task_type"])
    labels = tuple(f"LABEL_{number}" for number in range(_num_labels(folder))) if task and task.has_labels else ()
    encoding = Encoding(max_length=4096, truncation="right", labels=labels)
    return AdapterFacts(config["task_type"], config["peft_type"].lower(), found, config.get("revision"), encoding=encoding)


def _num_labels(folder: Path) -> int:
    """Rows of the saved head's last matrix."""
    heads = ("classifier", "score", "out_proj", "logits_proj")
    state = read_tensors(folder / TENSORS)
    sizes = [tensor.shape[0] for name, tensor in state.items() if name.endswith(tuple(f"{head}.weight" for head in heads))]
    if not sizes:
        raise LoadError(f"{folder} has no classification head: its number of classes is not known")
    return int(sizes[-1])


def write_model_card(path: Path, facts: AdapterFacts, metrics: dict[str, Any], certificate: dict[str, Any]) -> None:
    """README.md of the adapter folder: base, task, method, metrics, certificate."""
    header = {
        "base_model": facts.base,
        "library_name": "transformers" if METHODS[facts.method].stands_alone else "peft",
        "tags": [facts.method],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {facts.method} for {facts.base}",
        "",
    ]
    lines += [f"Trained for {facts.task} with peftkit on rows in `{facts.format}` format.", ""]
    for split, values in metrics.items():
        lines.append(f"- {split}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    lines.append(f"- certificate: largest difference of logits after reload {certificate['max_abs_diff']:.3g}")
    write_text(path / "README.md", "\n".join(lines) + "\n")
