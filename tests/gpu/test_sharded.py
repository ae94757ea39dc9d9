"""FSDP2 on a GPU: one process is enough to see that weights are divided, gathered, saved and proven there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gpu.processes import train_alone
from tests.runs import curve, tiny_recipe

CONFIG = Path(__file__).parents[2] / "configs/fsdp2.yaml"
LORA = {"method": "lora", "r": 4, "lora_alpha": 8}
NF4 = {"bits": 4, "quant_storage": "bfloat16"}


def launch_file(folder: Path, **settings: Any) -> Path:
    """The shipped one for a single process, with other settings of FSDP."""
    facts = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    facts |= {"num_processes": 1, "fsdp_config": facts["fsdp_config"] | settings}
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(facts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("sections", "settings", "tolerance"),
    [
        ({"model": {"dtype": "float32"}}, {}, 1e-4),
        ({"model": {"dtype": "float32"}, "adapter": {"method": "full"}, "training": {"learning_rate": 1e-3}}, {}, 1e-4),
        ({"model": {"dtype": "float32"}, "adapter": {"method": "adalora"}}, {}, 1e-4),
        ({"model": {"dtype": "bfloat16"}}, {}, 3e-2),
        ({"model": {"dtype": "bfloat16"}}, {"fsdp_offload_params": True}, 3e-2),
        ({"model": {"dtype": "bfloat16", "quantization": NF4}}, {}, 3e-2),
        ({"model": {"dtype": "bfloat16"}, "training": {"optim": "adamw_bnb_8bit"}}, {}, 3e-2),
    ],
)
def test_fsdp2_trains_like_a_process_alone(
    models_dir: Path, tmp_path: Path, sections: Any, settings: Any, tolerance: float
) -> None:
    sections = {"adapter": LORA, "data": {"validation": 0.25}} | sections
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, **sections)
    train_alone(recipe, tmp_path / "one")
    summary = train_alone(recipe, tmp_path / "run", "--launch", str(launch_file(tmp_path, **settings)))
    assert summary["certificate"]["passed"]
    for line, other in zip(curve(tmp_path / "run", "loss"), curve(tmp_path / "one", "loss"), strict=True):
        assert line == pytest.approx(other, rel=tolerance)


def test_a_large_model_is_shared_out(large_recipe: Any, tmp_path: Path) -> None:
    summary = train_alone(large_recipe(), tmp_path / "run", "--launch", str(launch_file(tmp_path)))
    assert summary["certificate"]["passed"]
    assert 0.7 < summary["predicted_memory_bytes"] / summary["peak_memory_bytes"] < 1.4
