"""`peftkit migrate` as a user runs it: a configuration of another tool and its rows become a trained, certified adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Result, instruction_rows, write_jsonl
from tests.runs import run_cli

Cli = Callable[..., Result]
LLAMAFACTORY = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "dataset": "faq,talks",
    "dataset_dir": "data", "template": "llama3", "cutoff_len": 128, "max_samples": 20,
    "output_dir": "saves/llama3", "bf16": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "num_train_epochs": 2.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 2,
    "report_to": "none", "plot_loss": True,
}  # fmt: skip
INFO = {
    "faq": {"file_name": "faq.json", "columns": {"prompt": "question", "response": "reply"}},
    "talks": {"file_name": "talks.jsonl", "formatting": "sharegpt"},
}
AXOLOTL = {
    "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "sequence_len": 240,
    "sample_packing": True,
    "datasets": [{"path": "data/rows.jsonl", "type": "alpaca"}, {"path": "data/talks.jsonl", "type": "sharegpt"}],
    "val_set_size": 0.1, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2,
    "optimizer": "adamw_torch_fused", "lr_scheduler": "cosine", "learning_rate": 1e-3, "bf16": "auto", "wandb_project": None,
    "output_dir": "out", "logging_steps": 1,
}  # fmt: skip
TRL = """\
#!/bin/bash
MODEL={model}
trl sft --model_name_or_path $MODEL --dataset_name data/rows.jsonl --use_peft --lora_r 4 \\
    --lora_target_modules q_proj v_proj --bf16 false --max_length 128 --packing --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 2 --learning_rate 1e-3 --num_train_epochs 2 --eos_token '<|im_end|>' --output_dir out
"""


def _talks() -> list[dict[str, Any]]:
    rows = instruction_rows(20)
    return [
        {"conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]}
        for row in rows
    ]


@pytest.fixture(scope="module")
def theirs(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a configuration of each tool."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "data").mkdir()
    rows = instruction_rows(20)
    write_jsonl(folder / "data/rows.jsonl", [row | {"input": ""} for row in rows])
    write_jsonl(folder / "data/talks.jsonl", _talks())
    faq = [{"question": row["instruction"], "reply": row["output"]} for row in rows]
    (folder / "data/faq.json").write_text(json.dumps(faq))
    (folder / "data/dataset_info.json").write_text(json.dumps(INFO))
    model = str(models_dir / "llama")
    (folder / "llamafactory.yaml").write_text(yaml.safe_dump(LLAMAFACTORY | {"model_name_or_path": model}))
    (folder / "axolotl.yml").write_text(yaml.safe_dump(AXOLOTL | {"base_model": model}))
    (folder / "trl.sh").write_text(TRL.format(model=model))
    (folder / "recipes").mkdir()
    return folder


@pytest.mark.parametrize("config", ["llamafactory.yaml", "axolotl.yml", "trl.sh"])
def test_a_configuration_becomes_a_certified_adapter(theirs: Path, config: str, tmp_path: Path) -> None:
    recipe = theirs / f"recipes/{Path(config).stem}.yaml"
    moved = run_cli("migrate", theirs / config, "--output", recipe, "--json")
    assert (moved.code, moved.json["valid"], moved.json["tool"]) == (0, True, Path(config).stem)
    assert run_cli("validate", recipe).code == 0
    assert run_cli("data", recipe, "--json").code == 0
    trained = run_cli("train", recipe, "--output", tmp_path / "run", "--set", "training.max_steps=2", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["certificate"]["passed"]


def test_the_table_names_what_became_of_each_key(theirs: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("migrate", theirs / "llamafactory.yaml", "--output", theirs / "recipes/table.yaml")
    assert result.code == 0
    for text in ("changed in meaning", "cutoff_len", "without an equal here", "left out on purpose (--json says why): "):
        assert text in result.out
    named = cli("migrate", theirs / "llamafactory.yaml", "--output", theirs / "recipes/table.yaml", "--force", "--json").json[
        "keys"
    ]
    stated = yaml.safe_load((theirs / "llamafactory.yaml").read_text())
    assert {key["key"] for key in named if key["outcome"] != "added"} == {*stated}


def test_a_recipe_whose_rows_are_missing_is_written_and_told(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text("base_model: owner/name\nadapter: lora\ndatasets: [{path: gone.jsonl, type: alpaca}]\n")
    result = cli("migrate", config, "--output", tmp_path / "r.yaml")
    assert result.code == 3
    assert "there is no file `gone.jsonl`" in result.err
    assert cli("validate", tmp_path / "r.yaml").code == 3


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "c.yaml",
            "base_model: a\nlora_rank: 8\n",
            "has keys of several tools (LLaMA-Factory: lora_rank; axolotl: base_model)",
        ),
        ("c.yaml", "hello: world\n", "may be none of theirs"),
        ("c.yaml", "task: CAUSAL_LM\nmodel: {}\nadapter: {}\n", "is a recipe of peftkit already"),
        ("c.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "is a launch file of accelerate"),
        ("c.yaml", "a: !!python/object/apply:os.system [ls]\n", "the tag !!python/object/apply:os.system is not allowed"),
        ("c.yaml", "a: [1\n", "not valid YAML"),
        ("c.yaml", "- 1\n", "a configuration is a mapping"),
        ("c.yaml", "", "the configuration is empty"),
        ("c.json", '{"a": ', "not valid JSON"),
        ("c.json", "[1]", "a configuration is a mapping"),
        ("c.toml", "a = 1", "files that end in `.toml` are not read"),
        ("gone.yaml", None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, cli: Cli, name: str, content: str | None, what: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    result = cli("migrate", tmp_path / name, "--output", tmp_path / "r.yaml")
    assert (result.code, what in result.err) == (2, True), result.err
    assert not (tmp_path / "r.yaml").exists()


def test_a_recipe_that_exists_stays_unless_it_is_forced(theirs: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "r.yaml").write_text("mine")
    result = cli("migrate", theirs / "trl.sh", "--output", tmp_path / "r.yaml", "--json")
    assert result.code == 2
    assert "exists already" in result.json["problems"][0]["what"]
    assert (tmp_path / "r.yaml").read_text() == "mine"
    assert cli("migrate", theirs / "trl.sh", "--output", tmp_path / "r.yaml", "--force").code == 0


def test_the_tool_can_be_named(theirs: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("migrate", theirs / "axolotl.yml", "--from", "axolotle", "--output", tmp_path / "r.yaml")
    assert "--from: no tool is called `axolotle`; there are: llamafactory, axolotl, trl; did you mean `axolotl`?" in result.err
    assert cli("migrate", theirs / "axolotl.yml", "--from", "axolotl", "--output", tmp_path / "r.yaml").code == 0


def test_moving_over_loads_nothing_heavy(theirs: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from peftkit.commands.migrate import migrate
migrate(Path({str(theirs / "llamafactory.yaml")!r}), None, Path({str(tmp_path / "r.yaml")!r}), False)
print(*sorted({{"torch", "transformers", "datasets", "numpy", "peft"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
