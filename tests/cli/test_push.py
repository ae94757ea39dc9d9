"""`peftkit push`: what travels to the hub and what never does, the card, one commit, refusals."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import Result, instruction_rows, label_rows
from tests.fake_hub import FakeHub, read_folder
from tests.runs import run_cli

Cli = Callable[..., Result]


@pytest.fixture
def signed_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, models_dir: Path) -> FakeHub:
    """The hub with both base models, and this process as its user `ann`."""
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    card = b"---\nlicense: mit\nlanguage: en\n---\n"
    for name in ("llama", "bert"):
        hub.add(f"org/{name}", read_folder(models_dir / name) | {"README.md": card})
    return hub


def pushed(hub: FakeHub, name: str = "ann/adapter") -> dict[str, bytes]:
    """The files of a repository."""
    return hub.repos[f"models/{name}"].branches["main"]


def copy_of(run: Path, folder: Path, **status: Any) -> Path:
    """A run directory with another status."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    known = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(known | status))
    return folder


def test_a_push_is_one_commit_of_what_the_dry_run_shows(signed_in: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path) -> None:
    base = ("--base", "org/bert")
    shown = cli("push", cls_run, "ann/adapter", *base, "--dry-run", tmp_path / "dry", "--json")
    assert shown.code == 0, shown.err
    assert signed_in.requests == []
    done = cli("push", cls_run, "ann/adapter", *base, "--json")
    assert done.code == 0, done.err
    assert pushed(signed_in) == read_folder(tmp_path / "dry")
    assert signed_in.repos["models/ann/adapter"].messages == ["Upload by peftkit push"]
    assert done.json["url"].startswith(f"{signed_in.url}/ann/adapter/commit/")
    assert set(done.json["files"]) == set(pushed(signed_in))


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_no_row_no_path_no_token_and_no_name_of_the_machine_travels(
    task: str, signed_in: FakeHub, cls_run: Path, lm_run: Path, cli: Cli, models_dir: Path
) -> None:
    run, base = (cls_run, "org/bert") if task == "SEQ_CLS" else (lm_run, "org/llama")
    assert cli("push", run, "ann/adapter", "--base", base).code == 0
    rows = (
        [row["text"] for row in label_rows(30)] if task == "SEQ_CLS" else [row["instruction"] for row in instruction_rows(30)]
    )
    secrets = [*rows, str(run), str(models_dir), str(Path.home()) + "/", "hf_ann", platform.node()]
    for name, content in pushed(signed_in).items():
        if name != "tokenizer.json":
            assert [secret for secret in secrets if len(secret) > 6 and secret.encode() in content] == [], name


def test_the_card_tells_the_hub_what_the_run_came_to(signed_in: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("push", cls_run, "ann/adapter", "--base", "org/bert", "--dry-run", tmp_path / "dry").code == 0
    data = ModelCard.load(tmp_path / "dry" / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/bert", "peft", "text-classification")
    assert {"peftkit", "lora"} <= set(data.tags)
    summary = json.loads((cls_run / "status.json").read_text())["summary"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == summary["metrics_by_split"]["test"]
    assert data.eval_results[0].dataset_split == "test"


def test_the_python_of_the_card_gives_the_logits_of_the_run(signed_in: FakeHub, cls_run: Path, cli: Cli) -> None:
    from peftkit.engine.loaded import load_adapter

    assert cli("push", cls_run, "ann/adapter", "--base", "org/bert").code == 0
    (code,) = re.findall(r"```python\n(.*?)```", pushed(signed_in)["README.md"].decode(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = names["tokenizer"]("a good film", return_tensors="pt")
    ours = load_adapter(cls_run)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](**batch).logits, ours.model(**batch).logits)


def test_what_was_pushed_answers_by_its_hub_id_and_checks_its_tokens(signed_in: FakeHub, lm_run: Path, cli: Cli) -> None:
    assert cli("push", lm_run, "ann/adapter", "--base", "org/llama", "--private").code == 0
    assert signed_in.repos["models/ann/adapter"].is_private
    here = cli("infer", "--adapter", lm_run, "--prompt", "the cat sat", "--json").json
    assert cli("infer", "--adapter", "ann/adapter", "--prompt", "the cat sat", "--json").json == here
    kept = json.loads(pushed(signed_in)["renderings.json"])["renderings"]
    assert len(kept) == 4  # the fixed rows, not the five of training
    assert json.loads(pushed(signed_in)["peftkit.json"])["base"] == "org/llama"
    assert json.loads(pushed(signed_in)["adapter_config.json"])["base_model_name_or_path"] == "org/llama"


def test_the_license_is_that_of_the_base_or_unknown(signed_in: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path) -> None:
    known = copy_of(cls_run, tmp_path / "run")
    facts = json.loads((known / "adapter" / "peftkit.json").read_text())
    base = shutil.copytree(facts["base"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    (known / "adapter" / "peftkit.json").write_text(json.dumps(facts | {"base": str(base)}))
    found = []
    for number, run in enumerate((cls_run, known)):
        assert cli("push", run, "ann/adapter", "--base", "org/bert", "--dry-run", tmp_path / f"dry{number}").code == 0
        data = ModelCard.load(tmp_path / f"dry{number}" / "README.md").data
        found.append((data.license, data.language))
    assert found == [("unknown", None), ("mit", "en")]


def test_a_merged_model_travels_with_its_own_proof(signed_in: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("merge", "--adapter", cls_run, "--output", tmp_path / "merged").code == 0
    assert cli("push", tmp_path / "merged", "ann/model").code == 0
    files = pushed(signed_in, "ann/model")
    assert "model.safetensors" in files
    assert not {"merge.json", "renderings.json"} & set(files)
    card = files["README.md"].decode()
    assert "library_name: transformers" in card
    assert "Merged: the logits of the model as written (float32) differ" in card
    assert "PeftModel" not in card


def test_a_base_that_is_a_folder_needs_its_hub_id(hub: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path) -> None:
    refused = cli("push", cls_run, "ann/adapter", "--dry-run", tmp_path / "dry")
    assert refused.code == 2
    assert "name its hub id with --base" in refused.err
    assert not (tmp_path / "dry").exists()


def test_an_unfinished_run_and_one_without_certificate_are_refused(
    hub: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path
) -> None:
    training = copy_of(cls_run, tmp_path / "training", state="training")
    failed = copy_of(cls_run, tmp_path / "failed", state="failed", exit_code=6, summary={})
    options = ("ann/adapter", "--base", "org/bert", "--dry-run", tmp_path / "dry")
    for forced in ((), ("--force",)):
        assert cli("push", training, *options, *forced).code == 7
    assert cli("push", failed, *options).code == 6
    assert cli("push", failed, *options, "--force").code == 0
    assert "**No certificate**" in (tmp_path / "dry" / "README.md").read_text()


REFUSALS = {
    "no token": (None, "ann/adapter", 7, "`hf auth login`"),
    "a wrong token": ("hf_nobody", "ann/adapter", 7, "does not accept the token"),
    "the name of another": ("hf_ann", "bob/adapter", 7, "may not write to bob/adapter"),
    "no owner": ("hf_ann", "adapter", 2, "write it as owner/adapter"),
    "no name": ("hf_ann", "ann/a b", 2, "is no name on the hub"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_would_refuse_is_one_line(
    name: str, hub: FakeHub, cls_run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, repo_id, code, expected = REFUSALS[name]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    result = cli("push", cls_run, repo_id, "--base", "org/bert")
    assert result.code == code
    assert expected in result.err
    assert len(result.err.strip().splitlines()) == 2
    assert "hf_nobody" not in result.err


def test_a_push_without_a_network_ends_at_once(
    signed_in: FakeHub, cls_run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    result = cli("push", cls_run, "ann/adapter", "--base", "org/bert")
    assert result.code == 7
    assert "http://127.0.0.1:9 cannot be reached" in result.err
    assert "nothing was uploaded" in result.err


def test_a_path_of_this_machine_in_the_recipe_is_cut(signed_in: FakeHub, cls_run: Path) -> None:
    assert run_cli("push", cls_run, "ann/adapter", "--base", "org/bert").code == 0
    recipe = pushed(signed_in)["README.md"].decode().partition("```yaml\n")[2]
    assert "train: rows.jsonl" in recipe
    assert "name_or_path: bert" in recipe


def test_what_was_set_on_the_command_line_stands_below_the_recipe(
    hub: FakeHub, cls_run: Path, cli: Cli, tmp_path: Path
) -> None:
    run = copy_of(cls_run, tmp_path / "run")
    environment = json.loads((run / "environment.json").read_text())
    argv = ["peftkit", "train", "r.yaml", "--set", "training.seed=1", "--set=data.test=/home/me/secret/t.jsonl"]
    (run / "environment.json").write_text(json.dumps(environment | {"argv": argv}))
    assert cli("push", run, "ann/adapter", "--base", "org/bert", "--dry-run", tmp_path / "dry").code == 0
    card = (tmp_path / "dry" / "README.md").read_text()
    assert "with `--set training.seed=1`, `--set data.test=t.jsonl`." in card
