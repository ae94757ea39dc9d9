"""`peftkit export`: folders that other engines read, or nothing."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from peftkit.exports.llama_cpp import find_client, find_go
from tests.runs import tiny_recipe, train

NODE, WHY_NOT_NODE = find_client(None)


@pytest.fixture(scope="session")
def plain_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run whose layers have different ranks and scales, by rsLoRA's rule."""
    folder = tmp_path_factory.mktemp("plain")
    adapter = {
        "method": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3}, "target_modules": "all-linear",
    }  # fmt: skip
    train(tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=adapter), folder / "run")
    return folder / "run"


def export(cli: Any, run: Path, target: str, *arguments: Any) -> Any:
    """The records of an export that must succeed."""
    result = cli("export", "--adapter", run, "--target", target, "--json", *arguments)
    assert result.code == 0, result.err
    return result.json["exports"]


def test_servers_get_one_rank_one_scale_and_the_same_logits(cli: Any, plain_run: Path) -> None:
    for record in export(cli, plain_run, "vllm,sglang"):
        assert record["check"]["passed"], record["check"]
        folder = plain_run / "exports" / record["target"]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (4, False, {}, {})
        state = load_file(folder / "adapter_model.safetensors")
        assert {tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name} == {4}
        assert record["launch"] in (folder / "serve.sh").read_text()


def test_an_exported_adapter_answers_as_the_run_does(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    export(cli, plain_run, "vllm", "--output", tmp_path / "out")
    answers = [cli("infer", "--adapter", path, "--prompt", "the cat", "--json").json for path in (plain_run, tmp_path / "out")]
    assert answers[0] == answers[1]


def test_a_merged_model_goes_to_every_folder_with_its_record(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    records = export(cli, plain_run, "safetensors,vllm", "--set", "form=merged", "--set", "dtype=float16", "--output", tmp_path)
    assert [(record["target"], record["form"], record["check"]["passed"]) for record in records] == [
        ("safetensors", "merged", True),
        ("vllm", "merged", True),
    ]
    saved = json.loads((tmp_path / "vllm" / "export.json").read_text())
    assert saved["adapter"]["sha256"] == records[0]["adapter"]["sha256"]
    assert load_file(tmp_path / "safetensors" / "model.safetensors")["model.norm.weight"].dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_checkpoints_are_read_back(kind: str, cli: Any, plain_run: Path, tmp_path: Path) -> None:
    (record,) = export(cli, plain_run, "safetensors", "--set", f"quantization={kind}", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit" if kind == "nf4" else "load_in_8bit"]
    assert record["check"]["numbers"]["max_abs_diff"] < 1e-4 < record["check"]["numbers"]["max_abs_diff_of_rounding"]


def test_a_gguf_lora_holds_what_each_layer_adds(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    export(cli, plain_run, "gguf", "--set", "form=adapter", "--set", "client=none", "--output", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    a, b = (tensors[f"blk.1.ffn_down.weight.lora_{part}"] for part in "ab")
    state = load_file(plain_run / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    expected = state[name.format("B")] @ state[name.format("A")] * 3 / 4**0.5  # alpha_pattern, rsLoRA
    torch.testing.assert_close(alpha / a.shape[0] * (b @ a), expected)


def test_a_check_without_a_client_says_so(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    (record,) = export(cli, plain_run, "gguf", "--set", "client=none", "--output", tmp_path / "out")
    assert record["check"]["passed"] is None
    assert record["check"]["detail"].startswith("not checked here:")
    assert record["files"].keys() == {"model.gguf"}


def test_a_client_that_is_named_must_be_there(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    refused = cli("export", "--adapter", plain_run, "--target", "ollama", "--set", f"client={tmp_path}", "--set", "go=no_go")
    assert refused.code == 2
    assert "no program no_go" in refused.err
    assert "node" in refused.err


def test_an_export_is_replaced_and_other_folders_are_not(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    arguments = ("export", "--adapter", plain_run, "--target", "vllm", "--output", tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    refused = cli(*arguments)
    assert (refused.code, "no export of ours" in refused.err) == (2, True)
    (tmp_path / "mine.txt").unlink()
    assert [cli(*arguments).code, cli(*arguments).code] == [0, 0]


def test_lint_answers_without_torch_and_writes_nothing(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    taken = cli("export", "--adapter", plain_run, "--target", "sglang", "--lint", "--json", "--output", tmp_path / "out")
    assert taken.code == 0
    assert "rewritten" in taken.json["targets"][0]["findings"][0]["what"]
    assert not (tmp_path / "out").exists()


def test_lint_exits_2_and_says_what_to_do(cli: Any, lm_run: Path) -> None:
    refused = cli("export", "--adapter", lm_run, "--target", "sglang", "--lint")
    assert refused.code == 2
    assert "trained whole (lm_head); export a merged model (`--merged`)" in refused.err
    assert "sglang (adapter): would refuse it" in refused.out


def test_a_task_that_a_target_does_not_take_is_refused(cli: Any, cls_run: Path) -> None:
    refused = cli("export", "--adapter", cls_run, "--target", "gguf", "--lint")
    assert (refused.code, "gguf takes CAUSAL_LM; this adapter is for SEQ_CLS" in refused.err) == (2, True)


def test_a_classifier_is_exported_merged(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    records = export(cli, cls_run, "safetensors,vllm", "--set", "vllm.form=merged", "--output", tmp_path)
    assert all(record["check"]["passed"] for record in records)
    assert "--convert classify" in records[1]["launch"]


def fake_llama_cpp(folder: Path) -> Path:
    """A folder with a converter and a quantizer that write down how they were called."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text(' '.join(sys.argv[1:]))\n"
    )
    quantizer = folder / "llama-quantize"
    quantizer.write_text('#!/bin/sh\necho "$3" > "$2"\n')
    quantizer.chmod(quantizer.stat().st_mode | stat.S_IXUSR)
    return folder


def test_other_types_go_through_the_users_llama_cpp(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    tools = fake_llama_cpp(tmp_path / "llama.cpp")
    asked = ("--set", f"llama_cpp={tools}", "--set", "client=none", "--set")
    export(cli, plain_run, "gguf", *asked, "dtype=q4_k_m", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_text() == "Q4_K_M\n"
    refused = cli("export", "--adapter", plain_run, "--target", "gguf", *asked, "dtype=f16", "--lint")
    assert (refused.code, "llama_cpp has no effect" in refused.err) == (2, True)


def test_other_models_go_through_the_users_llama_cpp(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"name_or_path": str(models_dir / "gpt2")})
    train(recipe, tmp_path / "run", "--set", "training.max_steps=1")
    tools = fake_llama_cpp(tmp_path / "llama.cpp")
    asked = ("--set", f"llama_cpp={tools}", "--set", "client=none", "--set", "dtype=f16", "--output")
    export(cli, tmp_path / "run", "gguf", *asked, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_text().endswith("--outtype f16")
    (tools / "convert_hf_to_gguf.py").write_text("import sys\nsys.exit('no such pre-tokenizer')\n")
    failed = cli("export", "--adapter", tmp_path / "run", "--target", "gguf", *asked, tmp_path / "other")
    assert (failed.code, "no such pre-tokenizer" in failed.err, (tmp_path / "other").exists()) == (7, True, False)


@pytest.mark.parametrize("settings", [("merged", "q8_0"), ("adapter", "auto")], ids=["q8_0", "lora"])
@pytest.mark.export
@pytest.mark.skipif(NODE is None, reason=WHY_NOT_NODE)
def test_llama_cpp_reads_what_was_exported(settings: tuple[str, str], cli: Any, plain_run: Path, tmp_path: Path) -> None:
    form, kind = settings
    (record,) = export(cli, plain_run, "gguf", "--set", f"form={form}", "--set", f"dtype={kind}", "--output", tmp_path / "out")
    assert record["check"]["passed"], record["check"]
    assert record["check"]["numbers"]["same_tokens"] > 50


def test_an_ollama_modelfile_has_template_ends_and_sampling(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    export(cli, plain_run, "ollama", "--set", "client=none", "--set", "go=none", "--output", tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in text
    assert {"PARAMETER temperature 0", "PARAMETER num_ctx 256", 'PARAMETER stop "<|im_end|>"'} <= {*text.splitlines()}


@pytest.mark.export
@pytest.mark.skipif(find_go(None) is None, reason="there is no `go` on the path")
def test_go_renders_the_modelfile_as_in_training(cli: Any, plain_run: Path, tmp_path: Path) -> None:
    (record,) = export(cli, plain_run, "ollama", "--set", "client=none", "--output", tmp_path / "out")
    assert "text/template" in record["check"]["client"]
    assert "gives 5 prompts of training" in record["check"]["detail"]
