"""Our fields are PEFT's: names, defaults, and a reason for each that a recipe cannot state."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest

from peftkit.methods import METHODS
from peftkit.methods.base import Method

INJECTED = [method for method in METHODS.values() if method.in_peft]
# Bookkeeping of PeftConfigMixin: set by PEFT or from other parts of the recipe.
BOOKKEEPING = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
# Config classes that do not build without these; the engine fills them in.
NEEDS: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}, "cpt": {"task_type": "CAUSAL_LM"}}
each_method = pytest.mark.parametrize("method", INJECTED, ids=[method.name for method in INJECTED])


def defaults(method: Method) -> dict[str, Any]:
    """The fields of a method's PEFT config class and their defaults."""
    fields = dataclasses.fields(getattr(peft, method.peft_config))
    factories = {field.name: field.default_factory for field in fields if field.default_factory is not dataclasses.MISSING}
    return {field.name: factories[field.name]() if field.name in factories else field.default for field in fields}


def declared(method: Method) -> set[str]:
    """The fields of PEFT that a recipe can state."""
    return set(method.section.model_fields) - {"method"} - set(method.own_fields)


def test_every_type_of_peft_is_a_method_here() -> None:
    assert {kind.value.lower() for kind in peft.PeftType} == {method.name for method in INJECTED}


@each_method
def test_the_config_class_is_the_one_that_peft_has_for_the_type(method: Method) -> None:
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.name.upper())] is getattr(peft, method.peft_config)


@each_method
def test_own_fields_are_in_the_section_and_not_in_peft(method: Method) -> None:
    assert set(method.own_fields) <= set(method.section.model_fields)
    assert not set(method.own_fields) & defaults(method).keys()
    assert all(method.own_fields.values())


@each_method
def test_every_field_of_a_recipe_is_one_of_peft(method: Method) -> None:
    assert declared(method) <= defaults(method).keys()


@each_method
def test_every_default_is_that_of_peft_unless_a_reason_is_given(method: Method) -> None:
    ours = {name: method.section.model_fields[name].get_default(call_default_factory=True) for name in declared(method)}
    theirs = defaults(method)
    assert {name for name, value in ours.items() if value != theirs[name]} == set(method.other_defaults)
    assert all(method.other_defaults.values())


@each_method
def test_every_field_of_peft_is_declared_or_left_out_with_a_reason(method: Method) -> None:
    assert declared(method) | set(method.left_out) == defaults(method).keys() - BOOKKEEPING
    assert declared(method) & set(method.left_out) == set()
    assert all(method.left_out.values())


@each_method
def test_the_defaults_of_a_recipe_make_a_config_of_peft(method: Method) -> None:
    fields = {name: value for name, value in method.peft_fields(method.section()).items() if name not in method.other_defaults}
    if method.name in NEEDS:
        fields |= NEEDS[method.name]
    plain = getattr(peft, method.peft_config)(**NEEDS.get(method.name, {}))
    assert getattr(peft, method.peft_config)(**fields).to_dict() == plain.to_dict()


@pytest.mark.parametrize("name", ["gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica", True, False])
def test_peft_takes_every_initialisation_that_a_recipe_may_name(name: bool | str) -> None:
    section = METHODS["lora"].section.model_validate({"init_lora_weights": name})
    assert peft.LoraConfig(**METHODS["lora"].peft_fields(section)).init_lora_weights == name
