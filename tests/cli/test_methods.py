"""`peftkit methods`: the table of all of them, and the facts of one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from peftkit.methods import METHODS
from peftkit.tasks import TASKS
from tests.conftest import Result

Cli = Callable[..., Result]


def test_methods_lists_every_method_unbroken_with_its_learning_rate(cli: Cli) -> None:
    lines = cli("methods").out.splitlines()
    cells = {parts[1].strip(): parts[3].strip() for line in lines if len(parts := line.split("│")) > 3 and parts[1].strip()}
    assert cells == {name: f"{method.learning_rate:g}" for name, method in METHODS.items()}


def test_methods_as_json_has_every_method_with_its_facts(cli: Cli) -> None:
    found = {item["name"]: item for item in cli("methods", "--json").json}
    assert list(found) == list(METHODS)
    assert [found[name]["learning_rate"] for name in ("lora", "full", "head")] == [2e-4, 5e-5, 1e-2]
    for name, method in METHODS.items():
        assert (found[name]["tasks"], found[name]["peft_config"]) == (list(method.tasks), method.peft_config)
        assert {task: rate["value"] for task, rate in found[name]["learning_rates"].items()} == {
            task: method.learning_rate_for(task)[0] for task in TASKS
        }
        assert found[name]["fields"][0]["name"] == "method"


def test_one_method_is_shown_with_fields_defaults_and_what_is_left_out(cli: Cli) -> None:
    found = cli("methods", "LoRA", "--json").json
    fields = {field["name"]: field for field in found["fields"]}
    assert (found["name"], found["peft_config"]) == ("lora", "LoraConfig")
    assert fields["r"] == {
        "name": "r", "type": "a whole number above 0", "default": 8, "required": False, "description": "Rank of the update.",
    }  # fmt: skip
    assert found["left_out"]["use_qalora"] == "works on GPTQ bases only and is ignored in silence on any other"
    text = cli("methods", "lora").out
    assert all(word in text for word in ("learning rate: 0.0002 (QLoRA", "learning rate for SEQ_CLS: 0.001 (", "use_qalora"))
    assert re.search(r"│ use_dora +│ true or false +│ false", text)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("lora", "works for: every task and architecture"),
        ("lora", "merges into the base model: yes"),
        ("lora", "trains on quantised bases: 4bit, 8bit"),
        ("lora", "several adapters on one base: yes, even in one batch"),
        ("cpt", "works for: CAUSAL_LM, decoder models: it learns from the examples in its context"),
        ("cpt", "merges into the base model: no: "),
        ("xlora", "works for: decoder models, encoder models: its gate reads one stack of hidden states"),
        ("xlora", "trains on quantised bases: none: PEFT's gate finds none"),
        ("xlora", "several adapters on one base: no"),
    ],
)
def test_one_method_is_shown_with_what_it_can_do(cli: Cli, method: str, line: str) -> None:
    assert any(found.startswith(line) for found in cli("methods", method).out.splitlines())


def test_a_method_that_there_is_not_is_refused(cli: Cli) -> None:
    result = cli("methods", "lorra")
    words = f"no method is called `lorra`; there are: {', '.join(METHODS)}; did you mean `lora`?"
    assert (result.code, result.err) == (2, f"peftkit: error (exit 2):\n{words}\n")
