"""A recipe is read as a whole: every problem at once, each with its place, its key and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.plan import Hardware, make_plan
from peftkit.recipe import load_recipe
from peftkit.recipe.explain import all_keys, json_schema
from peftkit.recipe.foreign import FOREIGN_KEYS
from peftkit.recipe.starter import starter_recipe
from peftkit.recipe.yaml_file import read_yaml
from peftkit.resolved import resolved_yaml
from peftkit.tasks import TASKS
from tests.conftest import FITTING, ROWS, write_jsonl, write_starter_adapters
from tests.unit.conftest import Load, Problems

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
BROKEN = """\
task: CAUSAL_LM
model:
  name: owner/name
adapter:
  method: lora
  r: 0
  lora_alpa: 8
data:
  train:
    path: gone.jsonl
    formt: text
training:
  learning_rate: fast
"""
NAMES = ", ".join(METHODS)


def owners_of(field: str) -> str:
    """How a message names the methods that have a field."""
    names = [name for name, method in METHODS.items() if field in method.section.model_fields]
    return f"it belongs to `method: {' or '.join(names[:3])}`" + f" and {len(names) - 3} others" * (len(names) > 3)


def test_all_problems_of_a_recipe_come_at_once_in_the_order_of_the_file(problems: Problems) -> None:
    found = [(p.where, p.key, p.what.partition(";")[0].partition(" (")[0]) for p in problems(BROKEN)]
    assert found == [
        ("recipe.yaml:2", "model.name_or_path", "is missing: Hub id or local folder"),
        ("recipe.yaml:3", "model.name", "no such key here"),
        ("recipe.yaml:6", "adapter.r", "0 is not allowed"),
        ("recipe.yaml:7", "adapter.lora_alpa", "no such key"),
        ("recipe.yaml:11", "data.train.formt", "no such key"),
        ("recipe.yaml:13", "training.learning_rate", "`fast` is not allowed"),
        ("recipe.yaml:10", "data.train.path", "there is no file `gone.jsonl`"),
    ]


def test_the_message_has_file_line_key_and_what_is_allowed(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["adapter"]["r"] = -1
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert str(caught.value) == f"{tmp_path}/recipe.yaml:6: adapter.r: -1 is not allowed; it takes a whole number above 0"


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("adapter.lora_alpa=8", "adapter.lora_alpa", "no such key; did you mean `lora_alpha`?"),
        ("training.max_length=8", "training.max_length", "no such key here; did you mean `data.max_length`?"),
        ("trainin.seed=8", "trainin", "no such key; did you mean `training`?"),
        ("zzz=8", "zzz", "no such key; there are: name, task, model"),
        ("model.dict=8", "model.dict", "no such key; there are: name_or_path"),
        ("model.a(b=8", "model.a(b", "no such key; there are: name_or_path"),
        ("data.validation={path: train.jsonl, formt: x}", "data.validation.formt", "did you mean `format`?"),
        ("training.optim=adamw_torc", "training.optim", "did you mean `adamw_torch`?"),
        ("task=SEQCLS", "task", f"it takes {' | '.join(TASKS)}; did you mean `SEQ_CLS`?"),
        ("adapter.method=lroa", "adapter.method", f"`lroa`; there are: {NAMES}; did you mean `lora`?"),
        ("adapter.method=[lora]", "adapter.method", f"no method is called `['lora']`; there are: {NAMES}"),
        ("adapter=lora", "adapter", "`lora` is not allowed; it takes a section"),
        ("adapter={r: 8}", "adapter.method", f"is missing; it takes one of: {NAMES}"),
        ("adapter={method: full, lora_alpha: 8}", "adapter.lora_alpha", owners_of("lora_alpha")),
        ("adapter={method: full, modules_to_save: [a]}", "adapter.modules_to_save", owners_of("modules_to_save")),
        ("adapter.velora_config={groups: 8}", "adapter.velora_config.groups", "did you mean `num_groups`?"),
        ("adapter.r=true", "adapter.r", "true is not allowed; it takes a whole number above 0"),
        ("training.learning_rate=true", "training.learning_rate", "true is not allowed; it takes auto | a number above 0"),
        ("training.learning_rate=.inf", "training.learning_rate", "inf is not allowed"),
        ("training.learning_rate=null", "training.learning_rate", "null is not allowed"),
        ("training.seed=2147483648", "training.seed", "it takes a whole number at least 0 and below 2147483648"),
        ("training.batch_size=12:30", "training.batch_size", "`12:30` is not allowed; it takes a whole number above 0"),
        ("data.validation=1.5", "data.validation", "a number above 0.0 and below 1.0 | text | a section | a list of these"),
        ("data.train=5", "data.train", "5 is not allowed; it takes text | a section | a list of these; in quotes it is text"),
        ("data.train=[]", "data.train", "[] is not allowed; it takes text | a section | a list of these"),
        ("data.train=[train.jsonl, 5]", "data.train.1", "5 is not allowed; it takes text | a section | a list of these"),
        ("data.train={pth: x, path: train.jsonl}", "data.train.pth", "no such key; did you mean `path`?"),
        ("data.train=[train.jsonl, {path: train.jsonl, pth: x}]", "data.train.1.pth", "no such key; did you mean `path`?"),
        ("data.train=[{path: train.jsonl, dict: x}]", "data.train.0.dict", "no such key; there are: path, format"),
        ("data.test={}", "data.test.path", "is missing: File (jsonl, "),
        ("data.validation=[{}]", "data.validation.0.path", "is missing: File (jsonl, "),
        ("data.train={path: train.jsonl, columns: {a: 3}}", "data.train.columns.a", "it takes a mapping from text to text"),
        ("data.train={path: train.jsonl, template: 3}", "data.train.template", "it takes text | a mapping from text to text"),
        ("data.labels=[1, b]", "data.labels.0", "1 is not allowed; it takes a list of text | null; in quotes it is text"),
        ("adapter.rank_pattern={q: 0}", "adapter.rank_pattern.q", "it takes a mapping from text to a whole number above 0"),
        ("adapter.init_lora_weights=pissa_niter_x", "adapter.init_lora_weights", "gaussian | olora"),
        ("name=a b", "name", "it takes text | null matching"),
        ("evaluation=null", "evaluation", "null is not allowed; it takes a section"),
        ("training.seed=" + "9" * 5000, "training.seed", "is not allowed"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(
    problems: Problems, recipe: dict[str, Any], override: str, key: str, words: str
) -> None:
    (found,) = problems(recipe, override)
    assert (found.key, found.exit_code, found.where[:100]) == (key, 2, f"--set {override}"[:100])
    assert words in found.what


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", False), ("on", True), ("true", True), ("'off'", False)],
)
def test_yes_and_no_mean_what_they_say_where_a_boolean_is_wanted(
    load: Load, recipe: dict[str, Any], text: str, value: bool
) -> None:
    assert load(recipe, f"adapter.use_dora={text}").recipe.adapter.use_dora is value


def test_a_missing_section_is_reported_with_its_meaning(problems: Problems) -> None:
    found = [(p.where, p.key, p.what) for p in problems("name: x\n")]
    assert found == [
        ("recipe.yaml:1", "task", "is missing: Task type, by PEFT's name, in any case."),
        ("recipe.yaml:1", "model", "is missing: The base model."),
        ("recipe.yaml:1", "adapter", "is missing: The adapter method and its fields."),
    ]


def test_a_recipe_without_data_is_refused_unless_no_data_is_needed(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["data"]
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: data: is missing: name the rows to train on"):
        load(recipe)
    assert load_recipe(tmp_path / "recipe.yaml", needs_data=False).recipe.data is None


def test_every_key_of_another_tool_is_answered_with_ours(problems: Problems, recipe: dict[str, Any]) -> None:
    assert len(FOREIGN_KEYS) >= 40
    found = {p.key: p for p in problems(recipe | dict.fromkeys(FOREIGN_KEYS, 1))}
    lines = sum(len(value) + 1 if isinstance(value, dict) else 1 for value in recipe.values())
    for number, (name, ours) in enumerate(FOREIGN_KEYS.items(), lines + 1):
        assert (found[name].what, found[name].where) == (f"no such key; here it is {ours}", f"recipe.yaml:{number}")


def test_every_key_that_an_answer_names_exists() -> None:
    keys = {info.path for info in all_keys()}
    sections = "|".join(key for key in keys if any(other.startswith(f"{key}.") for other in keys) and "." not in key)
    for name, answer in FOREIGN_KEYS.items():
        named = [path.rstrip(".") for path in re.findall(rf"\b(?:{sections})\.[a-z_.]+", answer)]
        assert set(named) <= keys, name
        assert named or answer.partition(":")[0].split(" ")[0] in (*keys, "nothing", "the"), name


@pytest.mark.parametrize("task", ["CAUSAL_LM", "causal_lm", "Causal_Lm"])
@pytest.mark.parametrize("method", ["lora", "LoRA", "LORA"])
def test_task_and_method_are_taken_in_any_case(load: Load, recipe: dict[str, Any], task: str, method: str) -> None:
    loaded = load(recipe | {"task": task, "adapter": {"method": method, "r": 4}}).recipe
    assert (loaded.task, loaded.adapter.method, loaded.adapter.r) == ("CAUSAL_LM", "lora", 4)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["training.learning_rate=1e-4"], "training.learning_rate", 1e-4),
        (["training.seed=1", "training.seed=2"], "training.seed", 2),
        (["training.max_grad_norm=null"], "training.max_grad_norm", None),
        (["adapter.target_modules=[q, v]"], "adapter.target_modules", ["q", "v"]),
        (["name='1e4'"], "name", "1e4"),
        (["model.revision=a=b"], "model.revision", "a=b"),
        (["data.train=other.jsonl"], "data.train.0.path", "other.jsonl"),
        (["data.train.max_rows=3"], "data.train.0.path", "train.jsonl"),
        (["data.train.max_rows=3"], "data.train.0.max_rows", 3),
        (["data.validation.path=other.jsonl"], "data.validation.0.path", "other.jsonl"),
        (["data.train=[train.jsonl, other.jsonl]", "data.train.1.max_rows=3"], "data.train.1.path", "other.jsonl"),
        (["data.train=[train.jsonl, other.jsonl]", "data.train.1.max_rows=3"], "data.train.1.max_rows", 3),
        (["data.train=[train.jsonl, {path: train.jsonl}]", "data.train.1=other.jsonl"], "data.train.1.path", "other.jsonl"),
        (["data.train.template='{{ q }}'"], "data.train.0.template", {"text": "{{ q }}"}),
        (["adapter.method=full"], "adapter.method", "full"),
        (["adapter.method=LORA"], "adapter.r", 4),
        (["adapter.method=head", "adapter.modules_to_save=[pooler]"], "adapter.modules_to_save", ["pooler"]),
        (["generation.do_sample=true", "generation.top_p=0.9"], "generation.top_p", 0.9),
    ],
)  # fmt: skip
def test_an_override_replaces_a_key_of_the_file(
    load: Load, recipe: dict[str, Any], tmp_path: Path, overrides: list[str], key: str, value: Any
) -> None:
    write_jsonl(tmp_path / "other.jsonl", [ROWS["CAUSAL_LM"]])
    found: Any = load(recipe, *overrides).recipe
    for name in key.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed", "an override is KEY=VALUE, such as"),
        ("=3", "an override is KEY=VALUE, such as"),
        ("training..seed=3", "an override is KEY=VALUE, such as"),
        ("adapter.target_modules=[a", "not valid YAML: expected ',' or ']'"),
        ("training.seed=!!python/name:os.system", "the tag !!python/name:os.system is not allowed"),
        ("training.nosuch=3", "no such key"),
    ],
)
def test_a_bad_override_is_named_as_the_place(problems: Problems, recipe: dict[str, Any], override: str, words: str) -> None:
    (found,) = problems(recipe, override)
    assert found.where == f"--set {override}"
    assert words in found.what


def test_an_override_of_a_section_is_named_for_what_is_wrong_in_it(problems: Problems, recipe: dict[str, Any]) -> None:
    recipe["data"]["train"] = {"path": "train.jsonl"}
    (found,) = problems(recipe, "data.train=gone.jsonl")
    assert (found.where, found.key, found.exit_code) == ("--set data.train=gone.jsonl", "data.train.path", 3)


@pytest.mark.parametrize("override", ["data.train.path=x", "data.train.2.path=x", "data.train.x=x"])
def test_an_element_of_a_list_is_named_by_its_number(problems: Problems, recipe: dict[str, Any], override: str) -> None:
    recipe["data"]["train"] = ["train.jsonl", "train.jsonl"]
    (found,) = problems(recipe, override)
    assert (found.where, found.what) == (f"--set {override}", "is a list of 2: its elements are `data.train.0` and so on")


LISTED = """\
task: CAUSAL_LM
model: {name_or_path: owner/name}
adapter: {method: lora}
data:
  train:
    - train.jsonl
    - path: gone.jsonl
      formt: text
    - path: train.jsonl
      split: x
      max_rows: 0
  validation:
    path: gone.csv
"""


def test_problems_in_a_list_of_sources_have_their_number_and_line(problems: Problems, recipe: dict[str, Any]) -> None:
    found = [(p.where, p.key, p.exit_code) for p in problems(LISTED)]
    assert found == [
        ("recipe.yaml:8", "data.train.1.formt", 2),
        ("recipe.yaml:11", "data.train.2.max_rows", 2),
        ("recipe.yaml:7", "data.train.1.path", 3),
        ("recipe.yaml:13", "data.validation.path", 3),
    ]


def test_rules_name_sources_as_the_recipe_has_them(problems: Problems, recipe: dict[str, Any]) -> None:
    text = LISTED.replace("      formt: text\n", "").replace("max_rows: 0", "max_rows: 1")
    found = [(p.where, p.key, p.exit_code) for p in problems(text)]
    assert found == [
        ("recipe.yaml:7", "data.train.1.path", 3),
        ("recipe.yaml:9", "data.train.2.split", 2),
        ("recipe.yaml:12", "data.validation.path", 3),
    ]


def test_a_list_of_one_source_keeps_its_number(problems: Problems, recipe: dict[str, Any]) -> None:
    (found,) = problems(recipe, "data.train=[gone.jsonl]")
    assert found.key == "data.train.0.path"


@pytest.mark.parametrize("change", ["task=X", "adapter.method=X", "training.seed=X", "data.train.formt=X", "data.labels=[1]"])
def test_missing_files_are_reported_beside_wrong_keys(problems: Problems, recipe: dict[str, Any], change: str) -> None:
    recipe["model"]["name_or_path"] = "./gone"
    found = {p.key: p.exit_code for p in problems(recipe, "data.train.path=gone.jsonl", change)}
    assert (found["model.name_or_path"], found["data.train.path"], len(found)) == (7, 3, 3)


def test_the_name_of_a_run_is_that_of_the_file_in_safe_letters(
    load: Load, recipe: dict[str, Any], write_recipe: Any, tmp_path: Path
) -> None:
    assert load(recipe).recipe.name == "recipe"
    assert load_recipe(write_recipe(recipe, "my recipe (v2).yaml")).recipe.name == "my-recipe-v2-"


def test_the_loaded_recipe_keeps_its_text_and_is_frozen(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(recipe, "training.seed=3")
    assert (loaded.text, loaded.overrides) == ((tmp_path / "recipe.yaml").read_text(), ("training.seed=3",))
    with pytest.raises(ValueError, match="frozen"):
        loaded.recipe.training.seed = 4


def descriptions(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every key of a JSON Schema with its description, or that of the section it leads to."""
    sections = schema["$defs"]
    for name, section in {"": schema, **sections}.items():
        for key, value in section.get("properties", {}).items():
            target = sections.get(value.get("$ref", "").rpartition("/")[2], {})
            yield f"{name}.{key}", value.get("description") or target.get("description", "")


def test_every_key_of_the_json_schema_says_what_it_means() -> None:
    found = dict(descriptions(json.loads(json.dumps(json_schema()))))
    assert len(found) > 80
    assert [key for key, text in found.items() if not text] == []


def test_every_key_is_listed_with_a_type_and_a_meaning() -> None:
    keys = {(info.path, info.method): info for info in all_keys()}
    assert len(keys) == len(all_keys())
    assert all(info.description and info.type_text for info in keys.values())
    assert keys["adapter.r", "lora"].type_text == "a whole number above 0"
    assert keys["data.validation.path", ""].required
    assert keys["data.train", ""].type_text == "text | a section | a list of these"
    assert keys["data.train.template", ""].type_text == "text | a mapping from text to text"


@pytest.fixture(scope="module")
def by_schema() -> Any:
    """What validates by our JSON Schema, which is a schema itself."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_a_shipped_recipe_validates_against_the_json_schema(path: Path, by_schema: Any) -> None:
    by_schema.validate(read_yaml(path)[0])


@pytest.mark.parametrize(("task", "method"), FITTING)
def test_the_starter_recipe_of_every_task_and_method_is_valid(load: Load, tmp_path: Path, task: str, method: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROWS[task]])
    write_starter_adapters(tmp_path)
    loaded = load(starter_recipe(TASKS[task], METHODS[method], "owner/name")).recipe
    assert (loaded.task, loaded.adapter.method, loaded.model.name_or_path) == (task, method, "owner/name")


def test_the_starter_recipe_states_defaults_and_few_other_values(load: Load, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROWS["CAUSAL_LM"]])
    loaded = load(starter_recipe(TASKS["CAUSAL_LM"], METHODS["lora"], None)).recipe
    stated = loaded.model_dump(exclude_defaults=True, exclude={"name", "task", "model"})
    assert stated == {
        "adapter": {"lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": ({"path": "train.jsonl"},), "validation": 0.1, "max_length": 512},
    }


SOURCES = [
    "rows.jsonl",
    {"path": "s3://bucket/rows.csv", "template": "{{ text }}"},
    ["a.jsonl", {"path": "b.jsonl", "weight": 2}],
    [{"path": "https://host/rows.json"}],
]


@pytest.mark.parametrize("train", SOURCES, ids=str)
def test_the_json_schema_takes_a_path_a_section_and_a_list_of_them(recipe: dict[str, Any], train: Any, by_schema: Any) -> None:
    recipe["data"] = {"train": train, "validation": train, "test": train}
    by_schema.validate(recipe)


@pytest.mark.parametrize("train", [5, [5], {"pth": "x"}, [{"path": "x", "weight": 0}]], ids=str)
def test_the_json_schema_refuses_what_is_no_source(recipe: dict[str, Any], train: Any, by_schema: Any) -> None:
    recipe["data"]["train"] = train
    assert not by_schema.is_valid(recipe)


def test_the_resolved_recipe_has_absolute_paths_in_lists_and_is_valid(
    load: Load, recipe: dict[str, Any], tmp_path: Path, write_recipe: Any
) -> None:
    write_jsonl(tmp_path / "other.jsonl", [ROWS["CAUSAL_LM"]])
    url = "hf://datasets/owner/name/rows.jsonl"
    recipe["data"] = {"train": ["train.jsonl", "*.jsonl", url, "owner/name"], "validation": ["other.jsonl"]}
    text = resolved_yaml(make_plan(load(recipe), Hardware("cpu", "the CPU", True, 2**30)))
    data = load_recipe(write_recipe(text, "resolved.yaml")).recipe.data
    assert data is not None
    assert [source.path for source in data.train] == [f"{tmp_path}/train.jsonl", f"{tmp_path}/*.jsonl", url, "owner/name"]
    assert yaml.safe_load(text)["data"]["validation"]["path"] == f"{tmp_path}/other.jsonl"


def test_a_configuration_of_another_tool_is_told_the_command_that_turns_it_into_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("model_name_or_path: x/y\nfinetuning_type: lora\ndataset: identity\n")
    with pytest.raises(RecipeError, match=r"`peftkit migrate .*sft\.yaml` makes a recipe of it"):
        load_recipe(tmp_path / "sft.yaml")


def test_held_out_rows_that_are_a_path_are_laid_out_as_the_training_rows(load: Load, recipe: dict[str, Any]) -> None:
    layout = {"format": "instruction", "columns": {"output": "label"}}
    path = recipe["data"]["train"]
    recipe["data"] |= {"train": {"path": path} | layout, "validation": path, "test": {"path": path}}
    data = load(recipe).recipe.data
    assert data is not None
    assert isinstance(data.validation, tuple)
    assert (data.validation[0].format, data.validation[0].columns) == ("instruction", {"output": "label"})
    assert data.test is not None
    assert (data.test[0].format, data.test[0].columns) == ("auto", {})
