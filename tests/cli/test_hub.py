"""Models, rows and adapters from the hub: what it refuses in one line each, its outages, its cache; tokens stay secret."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.conftest import Result, instruction_rows
from tests.fake_hub import FakeHub, forget, read_folder

Cli = Callable[..., Result]
Make = Callable[..., Path]
REFUSALS = {
    "gated": ("org/gated", "is gated: ask for access at http://127.0.0.1"),
    "private": ("org/private", "is not on the hub, or is private: check the name; private ones need `hf auth login`"),
    "missing": ("org/missing", "is not on the hub, or is private"),
    "other revision": ("org/tiny@v9", "has no revision `v9`"),
    "no config": ("org/noconfig", "has no file `config.json`"),
    "no tokenizer": ("org/notokenizer", "the tokenizer of `org/notokenizer` cannot be loaded"),
}


@pytest.fixture
def filled(hub: FakeHub, models_dir: Path) -> FakeHub:
    """The hub with the tiny Llama under several names, and rows."""
    files = read_folder(models_dir / "llama")
    hub.add("org/tiny", files).branches["v1"] = files | {"NOTE": b"older"}
    hub.add("org/gated", files, is_gated=True, access={"ann"})
    hub.add("org/private", files, is_private=True)
    hub.add("org/noconfig", {name: content for name, content in files.items() if name != "config.json"})
    hub.add("org/notokenizer", {name: content for name, content in files.items() if "token" not in name})
    hub.add(
        "org/pickled",
        {name: content for name, content in files.items() if "safetensors" not in name} | {"pytorch_model.bin": b""},
    )
    rows = "".join(json.dumps(row) + "\n" for row in instruction_rows(20)).encode()
    hub.add("org/rows", {"train.jsonl": rows}, "datasets")
    hub.add("org/gated-rows", {"train.jsonl": rows}, "datasets", is_gated=True)
    return hub


@pytest.fixture
def on_hub(lm_recipe: dict[str, Any], write_recipe: Make) -> Make:
    """Write the tiny recipe with a model of the hub: `on_hub("org/tiny@v1", data="org/rows")`."""

    def write(model: str, data: str | None = None) -> Path:
        name, _, revision = model.partition("@")
        lm_recipe["model"] = {"name_or_path": name} | ({"revision": revision} if revision else {})
        if data:
            lm_recipe["data"]["train"] = data
        return write_recipe(lm_recipe)

    return write


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_that_the_hub_refuses_is_one_clear_line(name: str, filled: FakeHub, on_hub: Make, cli: Cli) -> None:
    model, expected = REFUSALS[name]
    result = cli("data", on_hub(model)) if name != "no config" else cli("plan", on_hub(model))
    assert result.code == 7
    assert expected in result.err
    assert len(result.err.strip().splitlines()) == 2
    assert "Traceback" not in result.err


def test_a_model_with_pickled_weights_alone_is_refused_by_the_plan(filled: FakeHub, on_hub: Make, cli: Cli) -> None:
    result = cli("plan", on_hub("org/pickled"))
    assert result.code == 7
    assert "model.use_safetensors: false" in result.err


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("org/gated-rows", "is gated: ask"), ("org/no-rows", "the dataset `org/no-rows` is not on the hub, or is private")],
)
def test_rows_that_the_hub_refuses_are_one_clear_line(
    rows: str, expected: str, filled: FakeHub, on_hub: Make, cli: Cli
) -> None:
    result = cli("data", on_hub("org/tiny", rows))
    assert result.code == 3
    assert expected in result.err


def test_a_token_that_is_wrong_is_named_and_not_shown(
    filled: FakeHub, on_hub: Make, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrong")
    result = cli("data", on_hub("org/tiny"))
    assert result.code == 7
    assert "`hf auth login --force`" in result.err
    assert "hf_wrongwrong" not in result.err


def test_a_run_on_a_gated_model_keeps_the_token_out_of_everything(
    filled: FakeHub, on_hub: Make, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    filled.tokens["hf_planted0123456789"] = "ann"
    monkeypatch.setenv("HF_TOKEN", "hf_planted0123456789")
    result = cli("train", on_hub("org/gated", "org/rows"), "--output", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert "hf_planted" not in result.out + result.err
    written = read_folder(tmp_path / "run") | read_folder(tmp_path / "home")
    assert [name for name, content in written.items() if b"hf_planted" in content] == []


def test_the_revision_is_trained_on_recorded_and_loaded_again_without_a_network(
    filled: FakeHub, on_hub: Make, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = filled.repos["models/org/tiny"].files("v1")
    assert cli("train", on_hub("org/tiny@v1"), "--output", tmp_path / "run").code == 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found is not None
    assert environment["fingerprints"]["model"] == f"commit {found[0]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(filled.requests)
    assert cli("infer", "--adapter", tmp_path / "run", "--prompt", "the cat").code == 0
    assert len(filled.requests) == asked


def test_offline_what_is_not_in_the_cache_is_named_with_the_command_that_brings_it(
    filled: FakeHub, on_hub: Make, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = cli("data", on_hub("org/tiny@v1"))
    assert result.code == 7
    assert "HF_HUB_OFFLINE is set" in result.err
    assert "`hf download org/tiny --revision v1`" in result.err
    assert filled.requests == []


@pytest.mark.parametrize("outage", ["refused", "503"])
def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_used(
    outage: str, filled: FakeHub, on_hub: Make, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_hub("org/tiny", "org/rows")
    overrides = ("--set", "data.cache=false")
    assert cli("data", recipe, *overrides).code == 0
    forget()
    asked, start = len(filled.requests), time.perf_counter()
    if outage == "503":
        filled.failing = 503
    else:
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
        )
    result = cli("data", recipe, *overrides)
    assert result.code == 0, result.err
    assert len(filled.requests) - asked <= 1
    assert time.perf_counter() - start < 10  # a minute of retries, else


def test_a_hub_that_does_not_answer_and_an_empty_cache_end_it_at_once(filled: FakeHub, on_hub: Make, cli: Cli) -> None:
    filled.failing = 503
    start = time.perf_counter()
    result = cli("data", on_hub("org/tiny"))
    assert result.code == 7
    assert "is out of order (it answers 503), and the model `org/tiny` is not (or not whole) in the cache" in result.err
    assert time.perf_counter() - start < 5
    assert len(filled.requests) == 1


def test_an_adapter_answers_by_its_hub_id_and_revision(filled: FakeHub, lm_run: Path, models_dir: Path, cli: Cli) -> None:
    adapter = filled.add("org/adapter", lm_run / "adapter")
    adapter.branches["old"] = dict(adapter.branches["main"])
    here = cli("infer", "--adapter", lm_run, "--prompt", "the cat sat", "--json").json
    for name in ("org/adapter", "org/adapter@old"):
        assert cli("infer", "--adapter", name, "--prompt", "the cat sat", "--json").json == here
    refused = cli("infer", "--adapter", "org/adapter@new", "--prompt", "hi")
    assert refused.code == 7
    assert "has no revision `new`" in refused.err


def test_what_is_no_adapter_is_refused_before_its_weights_are_downloaded(filled: FakeHub, cli: Cli) -> None:
    result = cli("infer", "--adapter", "org/tiny", "--prompt", "hi")
    assert result.code == 7
    assert "is no adapter" in result.err
    assert not [request for request in filled.requests if "safetensors" in request]


def test_an_adapter_of_the_hub_runs_no_code_of_its_base(filled: FakeHub, lm_run: Path, cli: Cli) -> None:
    files = read_folder(lm_run / "adapter")
    facts = json.loads(files["peftkit.json"]) | {"trust_remote_code": True}
    filled.add("org/adapter", files | {"peftkit.json": json.dumps(facts).encode()})
    result = cli("infer", "--adapter", "org/adapter", "--prompt", "hi")
    assert result.code == 7
    assert "trust_remote_code" in result.err


def test_a_mistyped_run_is_not_looked_for_on_the_hub(
    filled: FakeHub, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    result = cli("merge", "--adapter", "runs/nothing", "--output", "merged")
    assert result.code == 7
    assert result.err.endswith("there is no run directory or adapter folder `runs/nothing`\n")
    assert filled.requests == []
