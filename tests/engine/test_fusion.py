"""Learned combinations of trained adapters: AdapterFusion and X-LoRA leave their adapters as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftkit.engine.loaded import load_adapter
from peftkit.methods.adapter_fusion import AdapterFusionSection
from peftkit.methods.adapter_fusion_torch import Fusion, penalty
from peftkit.methods.bottleneck import BottleneckSection
from peftkit.methods.bottleneck_torch import Bottleneck
from tests.runs import run_cli, tiny_recipe, train

SECTION = AdapterFusionSection(adapters=["a", "b"], temperature=0.5)
TRAINING = {"learning_rate": 0.02, "max_steps": 3}


@pytest.fixture(scope="module")
def runs(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained adapters of the tiny BERT: bottleneck adapters of three tasks and two styles, and two LoRAs."""
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "one": ("SEQ_CLS", {"method": "bottleneck"}),
        "two": ("TOKEN_CLS", {"method": "bottleneck", "reduction_factor": 8, "dropout": 0.5}),
        "three": ("FEATURE_EXTRACTION", {"method": "bottleneck"}),
        "houlsby": ("SEQ_CLS", {"method": "bottleneck", "style": "houlsby"}),
        "lora": ("SEQ_CLS", {"method": "lora", "r": 2}),
        "lora_two": ("SEQ_CLS", {"method": "lora", "r": 4, "target_modules": "all-linear"}),
    }
    found = {}
    for seed, (name, (task, adapter)) in enumerate(made.items()):
        folder = tmp_path_factory.mktemp(name)
        train(tiny_recipe(task, models_dir, folder, adapter=adapter, training=TRAINING | {"seed": seed}), folder / name)
        found[name] = folder / name
    return found


def fused(models_dir: Path, folder: Path, *adapters: Path, method: str = "adapter_fusion") -> Path:
    """A recipe over trained adapters."""
    adapter = {"method": method, "adapters": [str(path) for path in adapters]}
    return tiny_recipe("SEQ_CLS", models_dir, folder, adapter=adapter, training=TRAINING)


def experts(number: int) -> list[Bottleneck]:
    torch.manual_seed(0)
    return [Bottleneck(6, 3, BottleneckSection(init_weights="bert"), torch.zeros(1)) for _ in range(number)]


def test_attention_over_adapters_is_that_of_the_paper() -> None:
    fusion, x = Fusion(experts(3), SECTION), torch.randn(2, 5, 6)
    nn.init.normal_(fusion.value.weight)
    z = [expert(x) for expert in fusion.experts]
    scores = torch.stack([(fusion.query(x) * fusion.key(one)).sum(-1) for one in z])
    expected = sum(
        share[..., None] * (one @ fusion.value.weight.T) for share, one in zip((2 * scores).softmax(0), z, strict=True)
    )
    torch.testing.assert_close(fusion(x), expected)


def test_it_starts_as_a_mean_of_the_adapters_and_values_are_kept_near_that() -> None:
    one = experts(1)[0]
    fusion, x = Fusion([one, one], SECTION), torch.randn(4, 6)
    torch.testing.assert_close(fusion(x), one(x))
    model: Any = nn.ModuleList([fusion])
    model.adapter_settings = SECTION.model_dump()
    assert penalty(model) == 0
    with torch.no_grad():
        fusion.value.weight[0, 1] += 2
    assert penalty(model).item() == pytest.approx(0.01 * 4)


def test_adapters_of_other_tasks_are_fused_stay_as_they_are_and_are_kept_along(
    runs: dict[str, Path], models_dir: Path, tmp_path: Path
) -> None:
    chosen = [runs[name] for name in ("one", "two", "three")]
    summary = train(fused(models_dir, tmp_path, *chosen), tmp_path / "run")
    assert summary["certificate"]["passed"]
    model = load_adapter(tmp_path / "run").model
    places = [name for name, module in model.named_modules() if isinstance(module, Fusion)]
    assert len(places) == 2
    for number, source in enumerate(chosen):
        trained = load_file(source / "adapter" / "adapter_model.safetensors")
        assert load_file(tmp_path / "run/adapter/experts" / str(number) / "adapter_model.safetensors").keys() == trained.keys()
        for place in places:
            layer = place.removesuffix(".adapter_fusion").removeprefix("bert.")  # FEATURE_EXTRACTION's names are without
            up = next(tensor for name, tensor in trained.items() if name.endswith(f"{layer}.bottleneck.up.weight"))
            torch.testing.assert_close(model.get_submodule(place).experts[number].up.weight, up)
    hidden = 32
    assert summary["trainable_params"] == 2 * (3 * hidden * hidden + 2 * hidden) + 2 * hidden + 2  # Q, K, V and the head


def test_adapters_in_different_places_are_refused_before_weights_are_loaded(
    runs: dict[str, Path], models_dir: Path, tmp_path: Path
) -> None:
    result = run_cli("plan", fused(models_dir, tmp_path, runs["one"], runs["houlsby"]))
    assert (result.code, "are in different places of the layers: train both with one `style`" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["one"], "must name at least 2 bottleneck adapters to attend to, it names 1"),
        (["one", "one"], "names an adapter twice"),
        (["one", "lora"], "is no BOTTLENECK adapter"),
    ],
)
def test_what_cannot_be_fused_is_refused(
    runs: dict[str, Path], models_dir: Path, tmp_path: Path, names: list[str], words: str
) -> None:
    result = run_cli("validate", fused(models_dir, tmp_path, *(runs[name] for name in names)))
    assert (result.code in (2, 7), words in result.err) == (True, True)


def test_x_lora_leaves_its_experts_as_they_are(runs: dict[str, Path], models_dir: Path, tmp_path: Path) -> None:
    chosen = [runs["lora"], runs["lora_two"]]
    assert train(fused(models_dir, tmp_path, *chosen, method="xlora"), tmp_path / "run")["certificate"]["passed"]
    model: Any = load_adapter(tmp_path / "run").model
    own = dict(model.base_model.named_parameters())
    for number, source in enumerate(chosen):
        for name, tensor in load_file(source / "adapter" / "adapter_model.safetensors").items():
            if ".lora_" in name:
                layer = name.removeprefix("base_model.").removesuffix(".weight")
                torch.testing.assert_close(own[f"lora_model.{layer}.{number}.weight"], tensor)
