"""`peftkit runs` on a run that was really trained and interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Result
from tests.runs import tiny_recipe


def test_the_proposed_command_takes_up_a_run_that_was_killed(
    cli: Callable[..., Result], models_dir: Path, tmp_path: Path
) -> None:
    recipe, run = (
        tiny_recipe("SEQ_CLS", models_dir, tmp_path, training={"save_steps": 2, "max_seconds": 1e-3}),
        tmp_path / "run",
    )
    assert cli("train", recipe, "--output", run).code == 75
    (run / "status.json").write_text(json.dumps({"state": "training", "step": 0}))
    (found,) = cli("runs", run, "--json").json
    program, *arguments = found["go_on"].split()
    assert program == "peftkit"
    assert cli(*arguments, "--set", "training.max_seconds=1000", "--force").code == 0
    assert cli("runs", run, "--json").json[0]["state"] == "finished"
