"""What goes with what: methods with tasks and with architectures, known from the recipe and the model's config.json alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftkit.methods import METHODS
from peftkit.methods.base import EVERY_TASK, Method, ModelKind
from peftkit.recipe.paths import find_model
from peftkit.recipe.schema import Recipe

# Model types that read text in both directions: those of transformers' masked language models (5.23), checked by a test.
ENCODERS = frozenset(
    """
albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm esmc
eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer luke megatron-bert mobilebert
modernbert modernvbert mpnet mra neomme nomic_bert nystromformer perceiver reformer rembert roberta
roberta-prelayernorm roc_bert roformer squeezebert tapas ultrabert ultravbert xlm xlm-roberta xlm-roberta-xl
xmod yoso
""".split()  # noqa: SIM905 - a list of them would be one name a line
)
# Model types with an encoder and a decoder for text, whose config.json may leave that out (the same).
ENCODER_DECODERS = frozenset(
    """
bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5
""".split()  # noqa: SIM905 - a list of them would be one name a line
)
_KINDS = {"decoder": "decoders", "encoder": "encoders", "encoder-decoder": "encoders with a decoder"}


def read_config(recipe: Recipe, recipe_dir: Path) -> Mapping[str, Any]:
    """The model's config.json where it is a local folder with a sound one, with the recipe's overrides; else empty."""
    config = config_of(recipe.model.name_or_path, recipe_dir)
    return config | recipe.model.config_overrides if config else {}


def config_of(model: str, recipe_dir: Path) -> dict[str, Any]:
    """The config.json of a model that is a local folder with a sound one; else empty."""
    folder = find_model(model, recipe_dir)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}  # another rule says what is wrong with it
    return config if isinstance(config, dict) and isinstance(config.get("model_type"), str) else {}


def model_kind(config: Mapping[str, Any]) -> ModelKind | None:
    """What a config.json describes; None where it does not say."""
    if not config.get("model_type"):
        return None
    if config.get("is_encoder_decoder", config["model_type"] in ENCODER_DECODERS):
        return "encoder-decoder"
    if config["model_type"] in ENCODERS and not config.get("is_decoder"):
        return "encoder"
    return "decoder"


def check_fit(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Findings (key, sentence, exit code): what the method, the task and the model cannot do together."""
    method = METHODS[recipe.adapter.method]
    if wrong := why_not_task(recipe.task, config):
        yield "task", wrong, 2
        return
    if reason := why_not(method, recipe.task, config):
        yield "adapter.method", f"{reason}. These do: {', '.join(methods_for(recipe.task, config))}", 2
    elif recipe.task not in (able := method.tasks_with(recipe.adapter)):
        yield "adapter", f"these settings do not work for {recipe.task}; they do for {', '.join(able)}", 2
    if method.trains_nothing(recipe.adapter) and "training" in recipe.model_fields_set:
        yield "training", "has no effect: these settings put together adapters that are trained already", 2
    for package in method.requires:
        if importlib.util.find_spec(package) is None:
            yield "adapter.method", f"`{method.name}` needs {package}; `pip install {package}` adds it", 2
    if recipe.training.gradient_checkpointing and (why := method.why_not_recomputed):
        yield "training.gradient_checkpointing", f"cannot be used with `{method.name}`: {why}", 2
    if recipe.training.torch_compile and (why := method.why_not_compiled):
        yield "training.torch_compile", f"cannot be used with `{method.name}`: {why}", 2


def why_not_task(task: str, config: Mapping[str, Any]) -> str:
    """Why a model cannot do a task; empty where it can, or where its config does not tell."""
    kind = model_kind(config)
    if kind is None or not (what := _task_needs(task, kind)):
        return ""
    others = ", ".join(other for other in EVERY_TASK if not _task_needs(other, kind))
    return f"{task} {what}; `{config['model_type']}` models are {_KINDS[kind]}, good for {others}"


def _task_needs(task: str, kind: ModelKind) -> str:
    if task == "SEQ_2_SEQ_LM" and kind != "encoder-decoder":
        return "needs a model with encoder and decoder"
    if task == "CAUSAL_LM" and kind != "decoder":
        return "needs a model that reads from left to right"
    return ""


def why_not(method: Method, task: str, config: Mapping[str, Any]) -> str:
    """Why a method does not work for a task on a model; empty where it does, or where the config does not tell."""
    kind, model_type = model_kind(config), config.get("model_type")
    wrong_task = task not in method.tasks
    wrong_kind = kind is not None and kind not in method.model_kinds
    wrong_pair = (task, kind) in method.without
    wrong_type = bool(method.model_types) and model_type is not None and model_type not in method.model_types
    if wrong_task:
        return f"`{method.name}` does not work for {task}: {method.why_not}"
    if wrong_pair:
        return f"`{method.name}` does not work for {task} on `{model_type}`: {method.why_not}"
    if wrong_kind or wrong_type:
        return f"`{method.name}` does not work on `{model_type}`: {method.why_not}"
    lacks = method.lacks(config)
    return f"`{method.name}` does not work on `{model_type}`: {lacks}" if lacks else ""


def methods_for(task: str, config: Mapping[str, Any]) -> list[str]:
    """Methods that work for a task on a model."""
    return [name for name, method in METHODS.items() if not why_not(method, task, config)]
