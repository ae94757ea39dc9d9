"""The walk up to the weights: `plan` shows it, `train` goes through it first, so nothing that it finds can fail later."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftkit.engine.blueprint import Blueprint, draw_blueprint
from peftkit.engine.data import Data, load_data
from peftkit.engine.fast import find_fast_paths
from peftkit.engine.forgetting import forgetting_texts
from peftkit.engine.guard import explain_exhaustion, memory_text
from peftkit.engine.hardware import detect_hardware, resident_bytes
from peftkit.engine.held_out import held_out_questions
from peftkit.engine.model import base_of, load_config, load_tokenizer, position_limit
from peftkit.engine.prepare import Model
from peftkit.engine.quantizing import settle_quantization
from peftkit.engine.questions import Question
from peftkit.errors import Problem, RecipeError
from peftkit.plan import Choice, Hardware, Plan, make_plan, num_steps
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.fit import model_kind
from peftkit.tasks.chat import freeze_date, is_default_template, says_date, template_variables


@dataclass(frozen=True)
class Survey:
    """Everything about a run that is known before a weight is loaded.

    Attributes:
        plan: the recipe, decided.
        tokenizer: the model's.
        data: the rows, encoded.
        blueprint: the model with its adapter, by shape.
        resident_bytes: what the process holds in the machine's memory by then.
        questions: prompts of each split that are answered in training.
    """

    plan: Plan
    tokenizer: Any
    data: Data
    blueprint: Blueprint
    resident_bytes: int = 0
    questions: Mapping[str, list[Question]] = field(default_factory=dict)


def _memory_text() -> str:
    return memory_text("before a weight was loaded", ["a machine with more memory", "`streaming: true` in the training source"])


@explain_exhaustion(_memory_text)
def survey(
    loaded: LoadedRecipe,
    *,
    date: str | None = None,
    on_row: Callable[[], None] = lambda: None,
    hardware: Hardware | None = None,
) -> Survey:
    """Decide, read and encode the rows, draw the model on the meta device.

    Args:
        loaded: the recipe.
        hardware: what to decide for; default: this machine.
        date: the day (ISO) that a chat template may write; default: today.
        on_row: told of every row that is encoded.

    Raises:
        RecipeError, DataError, LoadError: what would stop the run.
    """
    plan = make_plan(loaded, hardware or detect_hardware())
    model = find_model_facts(plan, date)
    plan = settle_quantization(plan)
    data = load_data(plan, model, on_row=on_row)
    questions = held_out_questions(plan, model, data)
    forgetting_texts(plan)  # what is wrong with them shows here
    if plan.task.uses_chat_template and is_default_template(model.tokenizer) and _has_conversations(data):
        reason = "the tokenizer has none: turns begin with `### User:` and the like; stored with the adapter"
        plan = dataclasses.replace(plan, choices=(*plan.choices, Choice("model.chat_template", "default", reason)))
    steps = num_steps(plan, data.train.num_rows)
    blueprint = draw_blueprint(plan, data.encoding.num_outputs, model.tokenizer, total_steps=steps)
    paths = find_fast_paths(plan, blueprint.model)
    plan = dataclasses.replace(plan, rows=paths.rows, choices=(*plan.choices, *paths.choices))
    return Survey(plan, model.tokenizer, data, blueprint, resident_bytes(), questions)


def _has_conversations(data: Data) -> bool:
    return any("text" in rendering for rendering in data.renderings)


def find_model_facts(plan: Plan, date: str | None = None) -> Model:
    """What rows must suit: the tokenizer, and what the model's config says.

    Raises:
        RecipeError: the chat template has no use for a variable that the recipe sets.
        LoadError: the tokenizer or config cannot be loaded.
    """
    tokenizer = load_tokenizer(plan)
    _check_template_kwargs(plan, tokenizer)
    config = load_config(base_of(plan))
    limit = position_limit(config, tokenizer, plan.method.virtual_tokens(plan.recipe.adapter))
    day = None
    if plan.task.uses_chat_template and says_date(tokenizer):
        day = date or datetime.date.today().isoformat()
        freeze_date(tokenizer, day)
    return Model(tokenizer, limit, model_kind(config.to_dict()), day)


def _check_template_kwargs(plan: Plan, tokenizer: Any) -> None:
    stated = plan.recipe.data.chat_template_kwargs if plan.recipe.data is not None else {}
    if not stated:
        return
    known = template_variables(tokenizer.get_chat_template())
    what = f"the chat template reads no such variable; it reads {', '.join(sorted(known))}"
    problems = [Problem("", f"data.chat_template_kwargs.{name}", what) for name in stated if name not in known]
    if problems:
        raise RecipeError(problems)
