"""Packed, padded and length-grouped training give the same losses and gradients, to six digits, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.engine.packing import prove_packing
from tests.conftest import instruction_rows, write_jsonl
from tests.runs import curve, tiny_recipe, train

LAYOUTS = {
    "padded": ["--set", "data.packing=false", "--set", "training.fast_paths=false"],
    "by_length": ["--set", "data.packing=false", "--set", "training.group_by_length=true"],
    "end to end": [],
    "end to end, grouped": ["--set", "training.group_by_length=true"],
    "packed by mask": ["--set", "data.packing=true", "--set", "training.fast_paths=false"],
    "packed": ["--set", "data.packing=true"],
    "packed one at a time": ["--set", "data.packing=true", "--set", "training.micro_batch_size=1"],
    "packed and grouped": ["--set", "data.packing=true", "--set", "training.group_by_length=true"],
}


def chats(folder: Path) -> str:
    """Rows of one and of two rounds, some of whose answers count half or not at all."""
    rows = []
    for number, row in enumerate(instruction_rows(21)):
        answer = {"role": "assistant", "content": row["output"], **({"weight": 0.5} if number % 3 == 0 else {})}
        earlier = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "two", "train": False}]
        rows.append({"messages": [*earlier * (number % 2), {"role": "user", "content": row["instruction"]}, answer]})
    return str(write_jsonl(folder / "chats.jsonl", rows))


@pytest.fixture(scope="module", params=["instruction", "chat"])
def curves(request: Any, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and gradient norms of six steps under every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, training={"group_by_length": False}, data={"max_length": 120})
    rows = [] if request.param == "instruction" else ["--set", f"data.train={chats(folder)}"]
    found = {}
    for name, changes in LAYOUTS.items():
        train(recipe, folder / name, *changes, *rows)
        found[name] = curve(folder / name, "loss", "grad_norm")
    return found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "padded"])
def test_a_layout_gives_the_losses_and_gradients_of_padded_rows(curves: dict[str, Any], layout: str) -> None:
    assert len(curves["padded"]) == 6
    for padded, other in zip(curves["padded"], curves[layout], strict=True):
        assert other == pytest.approx(padded, rel=2e-6)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("CAUSAL_LM", ["adapter.method=prompt_tuning", "adapter.num_virtual_tokens=4"], "its virtual tokens come once"),
        ("CAUSAL_LM", ["model.attn_implementation=flex_attention"], "rows cannot be packed"),
        ("CAUSAL_LM", ["training.neftune_noise_alpha=5"], "rows cannot be packed: neftune_noise_alpha scales"),
        ("SEQ_CLS", [], "data.packing: has no effect for SEQ_CLS"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_loaded(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, changes: list[str], words: str
) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path)
    sets = [part for change in ["data.packing=true", *changes] for part in ("--set", change)]
    result = cli("validate", recipe, *sets)
    assert result.code == 2
    assert words in result.err


def test_a_model_that_lets_rows_see_each_other_is_refused_before_the_first_step(
    cli: Any, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"packing": True})

    def leaking(model: Any, rows: Any, forward: Any) -> float:
        def without_positions(model: Any, batch: Any) -> Any:
            return forward(model, {"input_ids": batch["input_ids"]})

        return prove_packing(model, rows, without_positions)

    monkeypatch.setattr("peftkit.engine.fast.prove_packing", leaking)
    result = cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 2
    assert "does not keep packed rows apart" in result.err
