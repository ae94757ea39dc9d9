"""The walk up to the weights: `plan` shows it, `train` goes through it first, so nothing that it finds can fail later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.engine.blueprint import Blueprint, draw_blueprint
from peftkit.engine.data import Data, load_data
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.model import base_of, load_config, load_tokenizer, position_limit
from peftkit.plan import Plan, make_plan
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.fit import model_kind


@dataclass(frozen=True)
class Survey:
    """Everything about a run that is known before a weight is loaded."""

    plan: Plan
    tokenizer: Any
    data: Data
    blueprint: Blueprint


def survey(loaded: LoadedRecipe) -> Survey:
    """Decide, read and encode the rows, draw the model on the meta device.

    Raises:
        RecipeError, DataError, LoadError: what would stop the run.
    """
    plan = make_plan(loaded, detect_hardware())
    tokenizer = load_tokenizer(plan)
    config = load_config(base_of(plan))
    limit = position_limit(config, tokenizer, plan.method.virtual_tokens(plan.recipe.adapter))
    data = load_data(plan, tokenizer, limit, model_kind(config.to_dict()))
    return Survey(plan, tokenizer, data, draw_blueprint(plan, data.encoding.num_outputs, tokenizer))
