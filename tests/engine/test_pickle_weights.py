"""Models whose weights are pickle files, as those of older repositories are: refused unless the recipe takes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Result


@pytest.fixture
def pickled(models_dir: Path, tmp_path: Path) -> Path:
    """The tiny BERT with its weights as a pickle file."""
    folder = tmp_path / "pickled"
    shutil.copytree(models_dir / "bert", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickle_weights_are_refused_and_the_key_that_takes_them_named(
    cls_recipe: dict[str, Any], pickled: Path, write_recipe: Callable[..., Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    recipe = write_recipe(cls_recipe | {"model": {"name_or_path": str(pickled)}})
    result = cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 7
    assert "`model.use_safetensors: false` takes pickle weights, which can run code" in " ".join(result.err.split())


def test_a_base_of_pickle_weights_is_certified_and_asked_as_it_was_trained(
    cls_recipe: dict[str, Any], pickled: Path, write_recipe: Callable[..., Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    recipe = write_recipe(cls_recipe | {"model": {"name_or_path": str(pickled), "use_safetensors": False}})
    trained = cli("train", recipe, "--output", tmp_path / "run", "--json", "--set", "training.max_steps=1")
    assert trained.json["certificate"]["passed"]
    assert cli("infer", "--adapter", tmp_path / "run", "--prompt", "good film").code == 0
