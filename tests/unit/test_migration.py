"""`peftkit migrate`: no key of another tool is dropped in silence, and what becomes of those that matter."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.migration import TOOLS, trl_data
from peftkit.migration.axolotl_data import LEFT_OUT_OF_DATASET, READ_OF_DATASET
from peftkit.migration.base import Config, Draft
from peftkit.migration.convert import convert, recognise
from peftkit.migration.read import read_config
from peftkit.migration.write import recipe_text
from peftkit.recipe.explain import all_keys
from peftkit.recipe.yaml_file import parse_yaml
from tests.conftest import write_jsonl
from tests.foreign_keys import STORED

KEYS: dict[str, list[str]] = json.loads(STORED.read_text(encoding="utf-8"))
GROUPS = {
    "llamafactory": ("transformers", "llamafactory"),
    "axolotl": ("axolotl", "axolotl_integrations"),
    "trl": ("transformers", "trl", "trl_script"),
}
SMALLEST: dict[str, dict[str, Any]] = {
    "llamafactory": {"model_name_or_path": "owner/name", "dataset": "rows", "dataset_dir": "ONLINE"},
    "axolotl": {"base_model": "owner/name", "datasets": [{"path": "owner/rows", "type": "alpaca"}]},
    "trl": {"model_name_or_path": "owner/name", "dataset_name": "owner/rows", "use_peft": True},
}
each_tool = pytest.mark.parametrize("name", TOOLS)


def drafted(name: str, folder: Path = Path(), **values: Any) -> Draft:
    """The smallest configuration of a tool with further keys, moved over into a folder."""
    return convert(Config(folder / "config.yaml", SMALLEST[name] | values), TOOLS[name], folder)


def moved(name: str, folder: Path = Path(), **values: Any) -> dict[str, Any]:
    """Our dotted key -> value."""
    return {key: entry.value for key, entry in drafted(name, folder, **values).entries.items()}


@each_tool
def test_every_key_of_a_tool_is_in_one_table(name: str) -> None:
    tool = TOOLS[name]
    assert {key for group in GROUPS[name] for key in KEYS[group]} - tool.keys == set()
    tables = [tool.moves, tool.read, tool.no_equal, tool.ignored, tool.refused]
    assert [set(one) & set(other) for one, other in itertools.combinations(tables, 2) if set(one) & set(other)] == []


def test_every_key_of_a_data_set_is_known() -> None:
    assert {*KEYS["axolotl_dataset"]} - {*READ_OF_DATASET, *LEFT_OUT_OF_DATASET} == set()
    assert {*KEYS["trl_dataset"]} - {*trl_data.READ_OF_DATASET} == set()


@each_tool
@pytest.mark.parametrize("value", [True, False, 4, "text", None, ["a"], {"a": 1}], ids=str)
def test_every_stated_key_gets_a_note_or_is_refused_by_name(name: str, value: Any) -> None:
    silent = []
    for key in TOOLS[name].keys - SMALLEST[name].keys():
        try:
            told = key in drafted(name, **{key: value}).notes
        except RecipeError as error:
            told = any(key in problem.key for problem in error.problems)
        silent += [] if told else [key]
    assert silent == []


@each_tool
def test_keys_lead_to_keys_that_recipes_have(name: str) -> None:
    known = {info.path for info in all_keys()} | {"--launch"}
    sources = ("path", "max_rows", "weight", "streaming", "config", "split", "columns")
    known |= {f"data.{part}.{key}" for part in ("train", "validation") for key in sources}
    leads = [move.ours.partition(":")[0] for move in (*TOOLS[name].moves.values(), *TOOLS[name].read.values())]
    assert {ours for ours in leads if ours and ours not in known} == set()


@each_tool
def test_a_tool_is_recognised_by_its_keys(name: str) -> None:
    further = {"llamafactory": {"lora_rank": 8}, "trl": {"lora_r": 8, "use_peft": True}}.get(name, {})
    assert recognise(Config(Path("c.yaml"), SMALLEST[name] | further)) is TOOLS[name]


def test_rows_of_a_step_are_those_of_a_device_times_accumulation_times_devices(tmp_path: Path) -> None:
    for name, micro in (("llamafactory", "per_device_train_batch_size"), ("axolotl", "micro_batch_size")):
        found = moved(name, **{micro: 2, "gradient_accumulation_steps": 8})
        assert (found["training.batch_size"], found["training.micro_batch_size"]) == (16, 2)
    assert moved("trl", per_device_train_batch_size=2, num_processes=4)["training.batch_size"] == 8


def test_defaults_that_are_others_here_are_written_out() -> None:
    ours = (
        "adapter.lora_alpha",
        "training.learning_rate",
        "data.max_length",
        "training.gradient_checkpointing",
        "training.seed",
    )
    found = moved("llamafactory", lora_rank=16)
    assert [found[key] for key in ours] == [32, 5e-5, 2048, True, 42]
    found = moved("trl")
    assert [found.get(key) for key in ("adapter.r", *ours)] == [16, 32, 2e-5, None, True, 42]  # 1024 is the default here too
    assert moved("axolotl", adapter="lora")["training.lr_scheduler_type"] == "cosine"


def test_what_is_the_default_here_is_told_and_left_out() -> None:
    draft = drafted("llamafactory", weight_decay=0.0, logging_steps=10)
    assert {draft.notes[key].outcome for key in ("weight_decay", "logging_steps")} == {"default"}
    assert not {"training.weight_decay", "training.logging_steps"} & draft.entries.keys()


def test_schedules_lose_what_would_have_no_effect() -> None:
    draft = drafted("llamafactory", lr_scheduler_type="constant", warmup_ratio=0.1, eval_steps=10, loraplus_lr_embedding=1e-5)
    assert {draft.notes[key].outcome for key in ("warmup_ratio", "eval_steps", "loraplus_lr_embedding")} == {"ignored"}
    found = moved("axolotl", lr_scheduler="cosine", cosine_min_lr_ratio=0.1, optimizer="lion_32bit")
    assert found["training.lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert "training.optim" not in found


def test_quantised_bases_keep_what_the_tool_does() -> None:
    assert moved("llamafactory", quantization_bit=4, double_quantization=False)["model.quantization"] == {
        "bits": 4,
        "double_quant": False,
    }
    assert moved("axolotl", adapter="qlora", load_in_4bit=True)["model.quantization"] == {"bits": 4}
    assert moved("trl", load_in_4bit=True)["model.quantization"] == {"bits": 4, "double_quant": False}


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ("examples/deepspeed/ds_z2_config.json", "zero2"),
        ("zero3_bf16.json", "zero3"),
        ({"zero_optimization": {"stage": 2}}, "zero2"),
    ],
)
def test_deepspeed_becomes_a_launch_file(config: Any, file: str) -> None:
    assert drafted("llamafactory", deepspeed=config).launch == f"configs/deepspeed_{file}.yaml"


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("llamafactory", {"stage": "dpo"}, "DPO .* cannot be trained here; peftkit trains on answers"),
        ("llamafactory", {"finetuning_type": "freeze"}, "which no method here does"),
        ("llamafactory", {"export_dir": "out"}, "peftkit merge"),
        ("llamafactory", {"dataset": None}, "peftkit infer"),
        ("llamafactory", {"model": "m", "peft_config": {"name": "lora"}}, "model, peft_config: the layout of .* v1"),
        ("axolotl", {"rl": "grpo"}, "`grpo`: preference and reinforcement learning cannot be had here"),
        ("axolotl", {"reward_model": True}, "reward models cannot be trained"),
        ("axolotl", {"adapter": "llama-adapter"}, "`llama-adapter` does not go over"),
        ("trl", {"num_generations": 8, "beta": 0.1}, "num_generations, beta: belongs to preference"),
    ],
)
def test_trainings_that_cannot_be_had_are_refused_in_one_line(name: str, values: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        drafted(name, **values)
    assert len(caught.value.problems) == 1


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder `data` as LLaMA-Factory has it, beside the folder of configurations."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "faq.jsonl", [{"q": "Who left?", "a": "Ada."}])
    info = {
        "faq": {"file_name": "faq.jsonl", "columns": {"prompt": "q", "response": "a"}},
        "talks": {"hf_hub_url": "owner/talks", "formatting": "sharegpt", "columns": {"messages": "turns"}, "num_samples": 50},
        "odd": {"file_name": "faq.jsonl", "formatting": "sharegpt", "tags": {"user_tag": "customer"}},
        "seen": {"file_name": "faq.jsonl", "columns": {"prompt": "q", "images": "pictures"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "configs").mkdir()
    return tmp_path / "configs"


def test_names_of_data_sets_are_looked_up(rows: Path) -> None:
    first, second = moved("llamafactory", rows, dataset="faq, talks", dataset_dir="data")["data.train"]
    assert first == {"path": "../data/faq.jsonl", "format": "instruction", "columns": {"instruction": "q", "output": "a"}}
    assert second == {"path": "owner/talks", "format": "chat", "columns": {"messages": "turns"}, "max_rows": 50}


@pytest.mark.parametrize(
    ("name", "what"),
    [("faqs", "did you mean `faq`"), ("odd", "user_tag: customer.*rename them"), ("seen", "`seen` has images")],
)
def test_data_sets_that_cannot_be_read_are_refused(rows: Path, name: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        drafted("llamafactory", rows, dataset=name, dataset_dir="data")


def test_shares_of_data_sets_become_weights(rows: Path) -> None:
    mixed = {"dataset": "faq,talks", "dataset_dir": "data", "mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"}
    found = moved("llamafactory", rows, **mixed)
    assert [source["weight"] for source in found["data.train"]] == [0.7, 0.3]
    assert found["data.stopping_strategy"] == "first_exhausted"


@pytest.mark.parametrize(
    ("item", "source"),
    [
        ({"type": "chat_template", "field_messages": "turns"}, {"format": "chat", "columns": {"messages": "turns"}}),
        ({"type": "sharegpt"}, {"format": "chat"}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        ({"type": "completion", "split": "train[:50]"}, {"format": "text", "split": "train", "max_rows": 50}),
        ({"type": "input_output"}, {"format": "prompt_completion"}),
        ({"type": "tales.of_my_own"}, {}),
    ],
)  # fmt: skip
def test_types_of_axolotl_become_formats(item: dict[str, Any], source: dict[str, Any]) -> None:
    assert moved("axolotl", datasets=[{"path": "owner/rows"} | item])["data.train"] == {"path": "owner/rows"} | source


@pytest.mark.parametrize(
    ("kind", "row", "prompt"),
    [
        ("alpaca:chat", {"instruction": "Add.", "input": "2, 3"}, "USER: Add.\n2, 3\nASSISTANT:"),
        ("alpaca", {"instruction": "Add."}, "### Instruction:\nAdd.\n\n### Response:\n"),
        ({"field_instruction": "q", "format": "[Q]{instruction}[A]", "system_prompt": "S "}, {"q": "Who?"}, "S [Q]Who?[A]"),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_of_axolotl_keep_their_text(kind: Any, row: dict[str, str], prompt: str) -> None:
    from peftkit.recipe.templates import compile_template

    template = moved("axolotl", datasets=[{"path": "owner/rows", "type": kind}])["data.train"]["template"]
    assert compile_template(template["prompt"]).render(row).endswith(prompt)


def test_keys_of_a_data_set_that_nothing_reads_are_told() -> None:
    draft = drafted(
        "axolotl", datasets=[{"path": "owner/rows", "type": "chat_template", "roles_to_train": ["gpt"], "field_mesages": "x"}]
    )
    assert draft.notes["datasets.roles_to_train"].outcome == "no_equal"
    assert draft.notes["datasets.field_mesages"].why == "did you mean `field_messages`?"


def test_mixtures_of_trl_become_lists_of_sources() -> None:
    items = [{"path": "owner/one", "name": "small", "columns": ["text"]}, {"path": "owner/two", "spilt": "test"}]
    draft = drafted("trl", datasets=items, test_split_size=0.1)
    assert draft.value("data.train") == [{"path": "owner/one", "config": "small"}, {"path": "owner/two"}]
    assert draft.value("data.validation") == 0.1
    assert draft.notes["datasets.spilt"].why == "did you mean `split`?"


def test_a_mistyped_key_is_told_and_those_of_other_tools_too() -> None:
    draft = drafted("axolotl", context_parapllel_size=2, cutoff_len=5)
    assert draft.notes["context_parapllel_size"].why == "did you mean `context_parallel_size`?"
    assert draft.notes["cutoff_len"].why == "a key of LLaMA-Factory"


def shell(tmp_path: Path, text: str) -> Config:
    """A script as it is read."""
    (tmp_path / "run.sh").write_text(text)
    return read_config(tmp_path / "run.sh")


def test_a_command_in_a_script_is_read(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-4\nlora_r: 8\n")
    text = "# trl sft --no\nMODEL=owner/name\naccelerate launch --num_processes 8 trl/scripts/sft.py \\\n"
    config = shell(
        tmp_path, text + "  --config base.yaml --model_name_or_path $MODEL --use_peft --lora_r=4 --no_gradient_checkpointing\n"
    )
    assert config.command == "sft"
    assert config.values == {
        **{"learning_rate": 1e-4, "lora_r": 4, "num_processes": 8, "model_name_or_path": "owner/name", "use_peft": True},
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("echo hello", "has no `trl sft"),
        ("trl sft --a 1\ntrl sft --a 2", "has 2 TRL commands"),
        ("trl sft --model_name_or_path $MODEL", "sets no such variable .*model_name_or_path"),
        ("trl sft --output_dir 'a", "run.sh:1: is no shell command"),
        ("trl sft --config none.yaml", "there is no file `none.yaml`"),
    ],
)
def test_scripts_that_cannot_be_read_say_why(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        shell(tmp_path, text)


def test_values_of_theirs_cannot_end_a_comment() -> None:
    draft = drafted("axolotl", optimizer="x\nname: other", datasets=[{"path": "owner/rows", "type": "a\u2028name: other"}])
    assert "name" not in parse_yaml(recipe_text(draft, "train").encode(), "r.yaml")[0]


def test_the_recipe_says_where_its_values_are_from_and_parses_back() -> None:
    draft = drafted("llamafactory", lora_rank=4, use_galore=True, cutoff_len=64, default_system="Say: yes\n- no #1")
    text = recipe_text(draft, "peftkit train r.yaml")
    assert "  r: 4    # lora_rank\n" in text
    assert "# - use_galore: is no optimizer here" in text
    parsed = parse_yaml(text.encode(), "r.yaml")[0]
    assert parsed["data"]["system_prompt"] == "Say: yes\n- no #1"
    assert {f"{section}.{key}" for section, inner in parsed.items() if isinstance(inner, dict) for key in inner} <= {
        *draft.entries
    }


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1e-4",
        "a: b",
        "# x",
        " a",
        "x ",
        "a\nb\n",
        "a\n b",
        "é\nü",
        "- a",
        "*",
        "{{ a }}",
        "0010",
        "~",
        "",
        "a\x85b\x07",
        "\u2028\x7f😀",
    ],
)
def test_texts_of_any_kind_are_written_so_that_they_are_read_again(value: str) -> None:
    draft = drafted("llamafactory", default_system=value)
    assert yaml.safe_load(recipe_text(draft, "x"))["data"].get("system_prompt") == value
    assert parse_yaml(recipe_text(draft, "x").encode(), "r")[0]["data"]["system_prompt"] == value
