"""The stand-ins are where commands look for public models and data sets when there is no network."""

from __future__ import annotations

import os
from pathlib import Path

from tests.runs import run_cli
from tests.stand_ins import REAL_SIZE, put_stand_ins

MT0 = """
task: SEQ_2_SEQ_LM
model: {name_or_path: bigscience/mt0-large}
adapter: {method: lora, r: 8}
data:
  train:
    path: takala/financial_phrasebank
    config: sentences_allagree
    columns: {source: sentence, target: label}
  max_length: 128
"""


def test_a_recipe_of_hub_names_plans_and_counts_offline(tmp_path: Path) -> None:
    put_stand_ins(Path(os.environ["HF_HOME"]), ["bigscience/mt0-large"], ["takala/financial_phrasebank"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MT0, encoding="utf-8")
    assert run_cli("plan", recipe, "--json").json["rows"] == {"train": 24}
    assert run_cli("params", recipe, "--json").json["all_params"] < 1_000_000
    real = run_cli("params", recipe, "--json", "--set", f"model.revision={REAL_SIZE}").json
    assert (real["trainable_params"], real["all_params"]) == (2_359_296, 1_231_940_608)
