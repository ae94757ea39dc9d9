"""`validate`, `init`, `methods`, `explain`, `schema`: what they print, what they refuse, and with which exit code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit import __version__
from peftkit.methods import METHODS
from peftkit.tasks import TASKS
from tests.conftest import FITTING, ROWS, Result, write_jsonl, write_starter_adapters

Cli = Callable[..., Result]
Write = Callable[..., Path]
NAMES = ", ".join(METHODS)


def test_a_valid_recipe_is_called_valid(cli: Cli, write_recipe: Write, recipe: dict[str, Any]) -> None:
    path = write_recipe(recipe)
    result = cli("validate", path)
    assert (result.code, result.out, result.err) == (0, f"{path}: valid\n", "")
    assert cli("validate", path, "--json").json == {"valid": True, "problems": []}


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["adapter.method=lroa"], 2, f"no method is called `lroa`; there are: {NAMES}; did you mean `lora`?"),
        (["adapter.lora_alpah=8"], 2, "adapter.lora_alpah: no such key; did you mean `lora_alpha`?"),
        (["lora_r=8"], 2, "lora_r: no such key; here it is adapter.r"),
        (["training.gradient_accumulation_steps=8"], 2, "training.batch_size over training.micro_batch_size"),
        (["training.seed"], 2, "an override is KEY=VALUE, such as `--set training.learning_rate=1e-4`"),
        (["data.train=gone.jsonl"], 3, "data.train.path: there is no file `gone.jsonl` (looked in "),
        (["model.name_or_path=./gone"], 7, "model.name_or_path: there is no folder `./gone` (looked in "),
        (["model.name_or_path=./bare"], 7, "bare` has no config.json: it is no model folder"),
        (["model.name_or_path=./gone", "data.train=gone.jsonl"], 3, "model.name_or_path: there is no folder `./gone`"),
        (["model.name_or_path=./gone", "training.seed=x"], 2, "model.name_or_path: there is no folder `./gone`"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_with_key_and_exit_code(
    cli: Cli, write_recipe: Write, recipe: dict[str, Any], overrides: list[str], code: int, words: str
) -> None:
    path = write_recipe(recipe)
    (path.parent / "bare").mkdir()
    arguments = [part for override in overrides for part in ("--set", override)]
    result = cli("validate", path, *arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"peftkit: error (exit {code}):\n--set ")
    assert words in result.err


def test_all_problems_are_printed_with_file_and_line(cli: Cli, write_recipe: Write, recipe: dict[str, Any]) -> None:
    recipe["adapter"] |= {"r": 0, "lora_alpah": 8}
    path = write_recipe(recipe | {"dataset": "x"})
    result = cli("validate", path)
    assert result.code == 2
    assert result.err.splitlines()[1:] == [
        f"{path}:6: adapter.r: 0 is not allowed; it takes a whole number above 0",
        f"{path}:7: adapter.lora_alpah: no such key; did you mean `lora_alpha`?",
        f"{path}:11: dataset: no such key; here it is data.train",
    ]


def test_problems_are_one_json_object_on_stdout(cli: Cli, write_recipe: Write, recipe: dict[str, Any]) -> None:
    recipe["adapter"]["r"] = 0
    path = write_recipe(recipe)
    result = cli("validate", path, "--set", "data.train=gone.jsonl", "--json")
    assert result.code == 2
    assert result.json["valid"] is False
    assert [(p["where"], p["key"]) for p in result.json["problems"]] == [
        (f"{path}:6", "adapter.r"), ("--set data.train=gone.jsonl", "data.train.path"),
    ]  # fmt: skip
    assert "0 is not allowed; it takes a whole number above 0" in result.json["problems"][0]["what"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\n", "recipe.yaml:2: not valid YAML: expected ',' or ']'"),
        (b"", "recipe.yaml: the recipe is empty; `peftkit init` writes one to start from"),
        (b"task: \xe9\n", "recipe.yaml:1: byte 6 (0xe9) is not UTF-8"),
        (b"task: 1\ntask: 2\n", "recipe.yaml:2: task: the key stands twice (first on line 1)"),
        (b"task: !!python/object/apply:os.system [ls]\n", "recipe.yaml:1: task: the tag !!python/object/apply:os.system"),
        (b"a: &a {<<: *a}\n", "recipe.yaml:1: expands to over 20,000 values or 50 levels"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused_without_a_traceback(cli: Cli, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    result = cli("validate", path)
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_missing_recipe_and_a_folder_are_refused(cli: Cli, tmp_path: Path) -> None:
    assert cli("validate", tmp_path).err == f"peftkit: error (exit 2):\n{tmp_path}: is a folder, not a recipe file\n"
    missing = cli("validate", tmp_path / "no.yaml")
    assert (missing.code, "no.yaml: cannot be read: No such file or directory" in missing.err) == (2, True)


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["validate"], ["validate", "a", "--nosuch"], ["train", "a", "--processes", "x"]]
)
def test_a_wrong_command_line_exits_with_2(cli: Cli, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: peftkit" in result.err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--processes", "0"], "--processes: 0 is not allowed"),
        (["--launch", "gone.yaml"], "--launch: there is no file `gone.yaml`"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_anything_loads(
    cli: Cli, write_recipe: Write, recipe: dict[str, Any], option: list[str], words: str
) -> None:
    result = cli("train", write_recipe(recipe), *option)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


@pytest.mark.parametrize(("task", "method"), FITTING)
def test_init_writes_a_recipe_that_is_valid_once_its_rows_are_there(cli: Cli, tmp_path: Path, task: str, method: str) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    written = cli("init", path, "--task", task.lower(), "--method", method.upper(), "--model", "owner/name")
    assert (written.code, str(path) in written.out) == (0, True)
    write_starter_adapters(path.parent)
    assert cli("validate", path).code == 3
    write_jsonl(path.parent / "train.jsonl", [ROWS[task]])
    assert cli("validate", path).code == 0


def test_init_refuses_to_overwrite_without_force(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    refused = cli("init", path)
    assert (refused.code, path.read_text()) == (2, "mine")
    assert "exists already; name another file, or add --force to replace it" in refused.err
    assert cli("init", path, "--force").code == 0
    assert path.read_text().startswith("# A peftkit recipe.")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--task", "NER"], f"--task: no task is called `NER`; there are: {', '.join(TASKS)}"),
        (["--method", "lorra"], f"--method: no method is called `lorra`; there are: {NAMES}; did you mean `lora`?"),
    ],
)
def test_init_refuses_what_there_is_not(cli: Cli, tmp_path: Path, option: list[str], words: str) -> None:
    result = cli("init", tmp_path / "r.yaml", *option)
    assert (result.code, (tmp_path / "r.yaml").exists()) == (2, False)
    assert words in result.err


def test_explain_tells_type_default_and_meaning(cli: Cli) -> None:
    assert cli("explain", "training.batch_size").out == (
        "training.batch_size\n  Sequences per optimizer step, over all processes together.\n"
        "  takes: a whole number above 0\n  default: 32\n"
    )
    assert "adapter.modules_to_save (method: head)" in cli("explain", "modules_to_save").out
    assert "required" in cli("explain", "data.train.path").out
    assert "default: null" in cli("explain", "max_steps").out
    assert "default: false" in cli("explain", "use_dora").out


def test_explain_as_json_lists_every_key_of_that_name(cli: Cli) -> None:
    found = cli("explain", "batch_size", "--json").json
    assert [(item["key"], item["default"]) for item in found] == [("training.batch_size", 32), ("evaluation.batch_size", 16)]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.batchsize", "no key is called `training.batchsize`; did you mean `training.batch_size`?"),
        ("lr_schedule_type", "did you mean `training.lr_scheduler_type`?"),
        ("zzz", "no key is called `zzz`; `peftkit schema` lists all of them"),
    ],
)
def test_explain_suggests_the_key_that_was_meant(cli: Cli, key: str, words: str) -> None:
    result = cli("explain", key)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_explain_answers_a_key_of_another_tool(cli: Cli) -> None:
    result = cli("explain", "per_device_train_batch_size")
    assert result.code == 2
    assert "here it is training.micro_batch_size" in result.err


def test_schema_prints_a_json_schema_of_every_section(cli: Cli) -> None:
    schema = cli("schema").json
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == [
        "name", "task", "model", "adapter", "data", "training", "evaluation", "embedding", "generation", "output",
    ]  # fmt: skip
    assert schema["additionalProperties"] is False


def test_version_and_help_are_printed(cli: Cli) -> None:
    assert (cli("--version").code, cli("--version").out) == (0, f"peftkit {__version__}\n")
    text = cli("--help").out
    commands = (
        "init", "validate", "plan", "params", "train", "evaluate", "infer", "merge", "convert", "methods", "explain", "schema",
    )  # fmt: skip
    assert all(re.search(rf"^ +{name} ", text, re.MULTILINE) for name in commands)


def test_a_bug_of_ours_exits_with_1_and_names_a_file_with_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(key: str, as_json: bool) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("peftkit.commands.reference.explain", broken)
    result = cli("explain", "r")
    path = Path(re.findall(r"The traceback is in (\S+);", result.err)[0])
    assert (result.code, result.out, "ZeroDivisionError: oh" in result.err) == (1, "", True)
    assert "in broken" in path.read_text()
    path.unlink()


def test_an_interrupted_command_exits_with_130() -> None:
    program = "import signal, sys, peftkit.cli as c, peftkit.recipe.explain as e, time\n"
    # A shell without job control starts background jobs, and all that these start, with SIGINT ignored.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "e.json_schema = lambda: (print('ready', file=sys.stderr, flush=True), time.sleep(60))\n"
    program += "sys.argv = ['peftkit', 'schema']; c.main()"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.stderr.read()


def test_output_into_a_closed_pipe_ends_in_silence() -> None:
    program = [sys.executable, "-m", "peftkit", "schema"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) in (0, 1)
