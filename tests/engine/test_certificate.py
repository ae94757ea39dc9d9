"""The certificate: every way to train can be saved and reloaded exactly, and what is not what was trained is found out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peftkit.engine import certify as certify_module
from peftkit.engine.certify import certify, kept_positions, reference_logits
from peftkit.engine.loaded import load_adapter
from peftkit.errors import CertificateError
from tests.conftest import tiny_tokenizer
from tests.runs import tiny_recipe, train

SHORT = {"max_steps": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def more_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, a Mixtral and a Qwen 3 with experts."""
    root = tmp_path_factory.mktemp("more")
    torch.manual_seed(0)
    sizes = SIZES | TOKENS | {"num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    models = {
        "tied": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)),
        "mixtral": transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4)),
        "qwen3_moe": transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


def assert_certified(summary: dict[str, Any]) -> None:
    assert summary["certificate"]["passed"]
    assert summary["certificate"]["num_rows"] == 8
    assert summary["certificate"]["max_abs_diff"] <= 1e-5


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with rslora and patterns": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3.0},
    },
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 32.0}},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms saved whole": {"modules_to_save": ["input_layernorm"]},
    "embedding adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "velora": {"velora_config": {"num_groups": 4}},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "regular expression": {"target_modules": r".*layers\.1.*_proj"},
}


@pytest.mark.parametrize("fields", LORA.values(), ids=LORA)
def test_every_lora_is_saved_as_it_was_trained(models_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8} | fields
    assert_certified(train(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter, training=SHORT), tmp_path / "run"))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize(("task", "model", "names"), [("SEQ_CLS", "bert", ["query"]), ("CAUSAL_LM", "gpt2", ["c_attn"])])
def test_trained_biases_are_saved(models_dir: Path, tmp_path: Path, task: str, model: str, names: list[str], bias: str) -> None:
    adapter = {"method": "lora", "r": 4, "bias": bias, "target_modules": names}
    source = {"name_or_path": str(models_dir / model)}
    recipe = tiny_recipe(task, models_dir, tmp_path, model=source, adapter=adapter, training=SHORT)
    assert_certified(train(recipe, tmp_path / "run"))
    saved = [name for name in load_file(tmp_path / "run/adapter/adapter_model.safetensors") if name.endswith(".bias")]
    assert len([name for name in saved if f"{names[0]}." in name]) == 2
    assert bias == "lora_only" or len(saved) > 10


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize(
    ("task", "model"), [("SEQ_CLS", "bert"), ("SEQ_CLS", "gpt2"), ("SEQ_CLS", "llama"), ("SEQ_2_SEQ_LM", "t5")]
)
def test_classifiers_and_encoder_decoders_are_saved_with_their_heads(
    models_dir: Path, tmp_path: Path, task: str, model: str, fields: dict[str, Any]
) -> None:
    adapter = {"method": "lora", "r": 4} | fields
    source = {"name_or_path": str(models_dir / model)}
    recipe = tiny_recipe(task, models_dir, tmp_path, model=source, adapter=adapter, training=SHORT)
    assert_certified(train(recipe, tmp_path / "run"))


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=["experts", "experts and attention", "all-linear"],
)
def test_adapted_experts_are_saved(
    models_dir: Path, more_models: Path, tmp_path: Path, model: str, fields: dict[str, Any]
) -> None:
    adapter = {"method": "lora", "r": 4} | fields
    source = {"name_or_path": str(more_models / model)}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model=source, adapter=adapter, training=SHORT)
    assert_certified(train(recipe, tmp_path / "run"))


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "full"},
        {"method": "head"},
        {"method": "lora", "r": 4, "modules_to_save": ["lm_head"]},
        {"method": "lora", "r": 4, "modules_to_save": ["embed_tokens"]},
        {"method": "lora", "r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"method": "lora", "r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"method": "lora", "r": 4, "trainable_token_indices": [5, 6]},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_tied_embeddings_are_saved_as_they_were_trained(
    models_dir: Path, more_models: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    source = {"name_or_path": str(more_models / "tied")}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model=source, adapter=adapter, training=SHORT)
    assert_certified(train(recipe, tmp_path / "run"))


@pytest.mark.parametrize("method", ["full", "head"])
@pytest.mark.parametrize(
    ("task", "model"), [("CAUSAL_LM", "llama"), ("SEQ_CLS", "bert"), ("SEQ_2_SEQ_LM", "t5"), ("CAUSAL_LM", "gpt2")]
)
def test_full_and_head_are_saved_as_they_were_trained(
    models_dir: Path, tmp_path: Path, method: str, task: str, model: str
) -> None:
    source = {"name_or_path": str(models_dir / model)}
    recipe = tiny_recipe(task, models_dir, tmp_path, model=source, adapter={"method": method}, training=SHORT)
    summary = train(recipe, tmp_path / "run")
    assert_certified(summary)
    assert summary["trainable_params"] > 0


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "head"},
        {"method": "lora", "bias": "all"},
        {"method": "lora", "modules_to_save": ["word_embeddings", "pooler"]},
    ],
    ids=["head", "biases", "embeddings"],
)
def test_what_is_trained_beside_lora_is_kept_in_float32_on_a_bfloat16_base(
    models_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"dtype": "bfloat16"}, adapter=adapter, training=SHORT)
    summary = train(recipe, tmp_path / "run")
    assert summary["certificate"]["passed"]
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    linear = [
        name for name in tensors if not any(part in name for part in ("LayerNorm", "embeddings"))
    ]  # see _train_in_float32
    assert {tensors[name].dtype for name in linear} == {torch.float32}
    assert any("classifier" in name for name in linear)


@pytest.fixture(scope="module")
def certified(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The adapter folder of a task and method, trained once."""
    folders: dict[tuple[str, str], Path] = {}

    def get(task: str, method: str) -> Path:
        if (task, method) not in folders:
            folder = tmp_path_factory.mktemp(f"{task}-{method}")
            train(tiny_recipe(task, models_dir, folder, adapter={"method": method}), folder / "run")
            folders[task, method] = folder / "run/adapter"
        return folders[task, method]

    return get


def certify_copy(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, Any]:
    """Certify a changed copy of an adapter folder against the logits of the unchanged one."""
    loaded = load_adapter(folder)
    row = {"text": "the cat sat on a mat", "label": "pos", "prompt": "the cat sat", "completion": "on a mat"}
    keys = ("text", "label") if loaded.task.has_labels else ("prompt", "completion")
    (example,) = loaded.runtime.encode({key: row[key] for key in keys}, "rows:1")
    reference = reference_logits(loaded.model, loaded.runtime, [example])
    shutil.copytree(folder, copy)
    (tensors,) = copy.glob("*.safetensors")
    state = load_file(tensors)
    change(state)
    save_file(state, tensors, metadata={"format": "pt"})
    return certify(copy, reference, loaded.facts, loaded.runtime, [example])


def set_first(name_part: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Replace (or remove) the first tensor whose name has this part."""

    def change(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(state) if name_part in name)
        if value is None:
            del state[name]
        elif value.numel() == 1:
            state[name].view(-1)[0] = float(value)
        else:
            state[name] = value

    return change


KINDS = [("SEQ_CLS", "lora"), ("SEQ_CLS", "head"), ("CAUSAL_LM", "lora"), ("CAUSAL_LM", "full")]


@pytest.mark.parametrize(("task", "method"), KINDS)
def test_an_unchanged_folder_passes(certified: Any, tmp_path: Path, task: str, method: str) -> None:
    result = certify_copy(certified(task, method), tmp_path / "copy", lambda state: None)
    assert result["passed"]
    assert result["max_abs_diff"] <= 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_first("classifier.weight", None), "(lacks .*|weights for )classifier.weight"),
        (set_first("classifier.weight", torch.zeros(0, 32)), "holds an empty tensor: .*classifier.weight"),
        (set_first("classifier.bias", torch.tensor(float("nan"))), "holds NaN or infinity in .*classifier.bias"),
        (set_first("classifier.bias", torch.tensor(0.5)), "reloaded logits differ by up to"),
        (set_first("classifier.weight", torch.zeros(3, 32)), "(size|shape)"),
    ],
    ids=["removed", "empty", "nan", "changed", "shape"],
)
@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_head_that_is_not_the_trained_one_is_found_out(
    certified: Any, tmp_path: Path, method: str, change: Any, words: str
) -> None:
    with pytest.raises(CertificateError, match=f"(?s)certificate failed.*{words}") as caught:
        certify_copy(certified("SEQ_CLS", method), tmp_path / "copy", change)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("method", "part"),
    [("lora", "lora_B"), ("lora", "lora_A"), ("full", "mlp.up_proj.weight")],
    ids=["lora_B", "lora_A", "full"],
)
@pytest.mark.parametrize("value", [None, torch.tensor(float("inf")), torch.tensor(9.0)], ids=["removed", "infinite", "changed"])
def test_a_language_adapter_that_is_not_the_trained_one_is_found_out(
    certified: Any, tmp_path: Path, method: str, part: str, value: torch.Tensor | None
) -> None:
    with pytest.raises(CertificateError, match="certificate failed"):
        certify_copy(certified("CAUSAL_LM", method), tmp_path / "copy", set_first(part, value))


def test_a_folder_without_weights_and_a_damaged_one_are_found_out(certified: Any, tmp_path: Path) -> None:
    folder = certified("CAUSAL_LM", "lora")
    loaded = load_adapter(folder)
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CertificateError, match="cannot be read"):
        certify(tmp_path / "copy", [], loaded.facts, loaded.runtime, [])
    file.unlink()
    with pytest.raises(CertificateError, match="has no weights"):
        certify(tmp_path / "copy", [], loaded.facts, loaded.runtime, [])


def test_a_base_that_has_changed_is_found_out(certified: Any, models_dir: Path, tmp_path: Path) -> None:
    folder = certified("CAUSAL_LM", "lora")
    loaded = load_adapter(folder)
    (example,) = loaded.runtime.encode({"prompt": "the cat", "completion": "sat"}, "rows:1")
    reference = reference_logits(loaded.model, loaded.runtime, [example])
    other = dataclasses.replace(loaded.facts, base=str(changed_base(models_dir / "llama", tmp_path / "other")))
    with pytest.raises(CertificateError, match=r"or the base `.*other` has changed"):
        certify(folder, reference, other, loaded.runtime, [example])


def changed_base(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    state["model.norm.weight"] *= 2
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_run_keeps_its_certificate(certified: Any) -> None:
    folder = certified("CAUSAL_LM", "lora")
    summary = json.loads((folder.parent / "status.json").read_text())["summary"]
    assert set(summary["certificate"]) == {"max_abs_diff", "tolerance", "num_rows", "passed"}
    assert "certificate: largest difference of logits after reload" in (folder / "README.md").read_text()


def test_of_long_rows_some_positions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_positions(5, 300) == [0, 1, 2, 3, 4]
    assert kept_positions(1, 2**30) == [0]
    monkeypatch.setattr(certify_module, "_LOGITS_KEPT", 1200)
    assert kept_positions(10, 300) == [0, 3, 6, 9]
    assert kept_positions(10, 10_000) == [0, 9]


def test_a_certificate_from_some_positions_finds_what_is_wrong(
    certified: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify_module, "_LOGITS_KEPT", 600)
    folder = certified("CAUSAL_LM", "lora")
    assert certify_copy(folder, tmp_path / "same", lambda state: None)["passed"]
    with pytest.raises(CertificateError, match="reloaded logits differ"):
        certify_copy(folder, tmp_path / "other", set_first("lora_B", torch.tensor(9.0)))
