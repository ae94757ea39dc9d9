"""docs/architectures.md: LoRA with automatic targets on many architectures, each trained, reloaded and merged here."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from peftkit.engine.blueprint import Blueprint, draw_blueprint
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.modules import is_tied
from peftkit.engine.targets import fused_experts
from peftkit.plan import make_plan
from peftkit.recipe import load_recipe
from peftkit.tasks import TASKS
from tests.conftest import ROWS, write_jsonl
from tests.contracts.published import PUBLISHED
from tests.contracts.test_architectures import MODELS, trained
from tests.contracts.test_methods_table import SHORT
from tests.contracts.tiny_models import DECODERS, SIZES, save_tiny_model
from tests.runs import run_cli

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
LORA = {"method": "lora"}
FUSED = ("query_key_value", "Wqkv", "c_attn", "in_proj", "qkv_proj")
HEAD = """# Architectures

On each of these families LoRA needs no `target_modules`: peftkit finds them. `tests/contracts` trains a tiny model of each row
on each of its tasks through the command line: `train` (the certificate: a reload into a fresh base gives the same logits),
`infer`, `merge` (the merged model, loaded alone, gives the adapter's logits; exit 6 otherwise). It writes this file, and a row
that does not hold fails the suite.

- **tasks**: LM: CAUSAL_LM, S2S: SEQ_2_SEQ_LM, CLS: SEQ_CLS, TOK: TOKEN_CLS, QA: QUESTION_ANS, EMB: FEATURE_EXTRACTION. Others
  may work too; where transformers has no class for a task, `plan` says so.
- **targets**: the layers that the adapter goes to, and how many of each name. `PEFT`: by PEFT's own table; else found by
  inspection: query and value projections, or the one layer that is query, key and value, or every linear layer of the backbone.
- **trained**, **all**: parameters of a LoRA with r=8 on these targets, and of the base (encoders without a head), counted on
  the meta device at the dimensions of the checkpoint. For {checked} checkpoints the second is compared with what is published.

"""
TAIL = """
Routers, poolers, heads and towers that see or hear are left out unless they are named; `target_modules: all-linear` takes every
other linear layer. Experts that share one parameter are no linear layers: LoRA reaches them by `target_parameters`, as the
table has them (trained, reloaded and merged for each of these rows). What is merged into GPT-2 is Conv1D again, and tied
embeddings stay tied.

Mixtures such as DeepSeek-V3 and GLM-4.5 have dense layers called `gate_proj`, `up_proj` and `down_proj` beside their experts.
PEFT (0.21) takes these names for the experts, which were called so before transformers 5: it would adapt those, with twice the
rank, instead of the layers. So `all-linear` leaves them out there, and naming them is an error.

ChatGLM, ChatGLM2 and ChatGLM3 come with code of their own on the hub (`model: {trust_remote_code: true}`) and were not tried;
`glm-4-9b-chat-hf` and GLM-4-0414 are in transformers.

`peftkit plan` shows targets and counts of any other model from its config.json, without weights.
"""


def tasks_of(model_type: str) -> list[str]:
    """The tasks that a type is tried on: writing, else all that transformers has a class for; classes also of decoders."""
    if CONFIG_MAPPING[model_type]().is_encoder_decoder:
        return ["SEQ_2_SEQ_LM"]
    others = ["SEQ_CLS"] if model_type in DECODERS else ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
    known = [task for task in others if has_class(model_type, task)]
    return ["CAUSAL_LM", *known] if model_type in DECODERS else known


def has_class(model_type: str, task: str) -> bool:
    """Whether transformers has a model of the type for the task."""
    return CONFIG_MAPPING[model_type] in getattr(transformers, TASKS[task].auto_class)._model_mapping


def tried(model_type: str) -> list[str]:
    """All tasks of a type that are tried, here and in `test_architectures`."""
    here = tasks_of(model_type)
    return here + [task for task, names in MODELS.items() if model_type in names and task not in here]


CELLS = [(name, task) for name in PUBLISHED for task in tasks_of(name) if name not in MODELS.get(task, ())]


@pytest.mark.parametrize(("model_type", "task"), CELLS, ids="-".join)
def test_lora_with_automatic_targets_trains_answers_and_merges(tmp_path: Path, model_type: str, task: str) -> None:
    run = trained(tmp_path, task, save_tiny_model(model_type, tmp_path / "model"), LORA)
    assert run.summary["certificate"]["passed"]
    adapter, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    answers = run_cli("infer", "--adapter", adapter, "--input", rows, "--output", tmp_path / "answers.jsonl")
    assert answers.code == 0, answers.err
    merged = run_cli("merge", "--adapter", adapter, "--output", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff_saved"] < 1e-4


VARIANTS: dict[str, dict[str, Any]] = {
    "deberta": {},  # writes into what its layers give
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "gpt_neox": {"use_parallel_residual": False},
    "llama": {"tie_word_embeddings": True},
    "llama4_text": {},  # writes into what its router gives
    "mt5": {"feed_forward_proj": "relu"},
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "t5": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("model_type", VARIANTS)
def test_every_linear_layer_of_other_checkpoints_of_a_family_trains_and_merges(tmp_path: Path, model_type: str) -> None:
    model = save_tiny_model(model_type, tmp_path / "model", **VARIANTS[model_type])
    trained(tmp_path, tasks_of(model_type)[0], model, {"method": "lora", "target_modules": "all-linear"})
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Blueprint]:
    """The blueprint of LoRA on the published checkpoint of a type."""
    root = tmp_path_factory.mktemp("published")

    @functools.cache
    def draw(model_type: str) -> Blueprint:
        task = tasks_of(model_type)[0] if model_type in DECODERS else tasks_of(model_type)[-1]
        folder = root / model_type
        folder.mkdir()
        config = {"model_type": model_type} | PUBLISHED[model_type].config
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        rows = write_jsonl(folder / "rows.jsonl", [ROWS[task]])
        recipe = {"task": task, "model": {"name_or_path": str(folder)}, "adapter": LORA, "data": {"train": str(rows)}}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return draw_blueprint(make_plan(load_recipe(path), detect_hardware()))

    return draw


def notes(blueprint: Blueprint) -> str:
    """What is special about a model."""
    model: Any = blueprint.model
    base = model.get_base_model()
    found = ["query, key, value in one"] if set(blueprint.targets) & set(FUSED) else []
    found += ["Conv1D"] if any(isinstance(module, Conv1D) for module in base.modules()) else []
    found += ["tied embeddings"] if is_tied(base) else []
    if experts := fused_experts(base):
        found.append(f"experts: `target_parameters: [{', '.join(experts)}]`")
    return "; ".join(found)


def row(model_type: str, blueprint: Blueprint) -> str:
    """A line of the table."""
    known = PUBLISHED[model_type]
    names = ", ".join(f"`{name}`" for name in blueprint.targets)
    counts = sorted(set(blueprint.targets.values()))
    reason = ", PEFT" if "PEFT's table" in blueprint.targets_reason else ""
    cells = [
        known.family, f"`{model_type}`", " ".join(SHORT[task] for task in tried(model_type)),
        f"{names} (x{'-'.join(map(str, counts))}{reason})", notes(blueprint), known.checkpoint,
        f"{blueprint.trainable_params:,}", f"{blueprint.all_params - blueprint.trainable_params:,}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def test_the_table_in_the_docs_is_the_one_that_is_tried(drawn: Callable[[str], Blueprint]) -> None:
    titles = ["family", "`model_type`", "tasks", "targets", "notes", "counted for", "trained", "all"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += [row(name, drawn(name)) for name in sorted(PUBLISHED, key=lambda name: PUBLISHED[name].family.lower())]
    checked = sum(known.num_parameters is not None for known in PUBLISHED.values())
    document = HEAD.format(checked=checked) + "\n".join(lines) + "\n" + TAIL
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(document, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == document, "run it with UPDATE_DOCS=1 to write the table anew"


def test_bases_are_as_large_as_their_checkpoints(drawn: Callable[[str], Blueprint]) -> None:
    expected = {name: known.num_parameters for name, known in PUBLISHED.items() if known.num_parameters is not None}
    assert {name: drawn(name).all_params - drawn(name).trainable_params for name in expected} == expected


def test_every_architecture_of_the_table_has_a_tiny_model() -> None:
    assert set(PUBLISHED) == set(SIZES)
