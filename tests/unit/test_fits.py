"""Settings that a layer cannot take by its size, told from the sizes alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from peftkit.methods import METHODS
from peftkit.methods.targeting import divisors_text

WIDE = (64, 32)  # inputs, outputs
REFUSED: list[tuple[str, dict[str, Any], tuple[int, int], str, str]] = [
    ("adamss", {"r": 33}, WIDE, "r", "more than the smaller side, 32"),
    ("adamss", {"r": 8, "num_subspaces": 33}, WIDE, "num_subspaces", "only 32 rows"),
    ("adamss", {"r": 8, "num_subspaces": 10, "subspace_rank": 4}, WIDE, "subspace_rank", "at most 3"),
    ("adamss", {"r": 2, "num_subspaces": 1, "subspace_rank": 3}, WIDE, "subspace_rank", "at most 2"),
    ("boft", {"boft_block_size": 24}, WIDE, "boft_block_size", "is 24, which does not divide the inputs; 64, 32, 16, 8 would"),
    ("boft", {"boft_block_size": 0, "boft_block_num": 64}, WIDE, "boft_block_num", "32, 16, 8, 4 would"),
    ("c3a", {}, WIDE, "block_size", "is 256, which does not divide the inputs and the outputs; 32, 16, 8, 4 would"),
    ("deft", {"r": 33}, WIDE, "r", "at most 32"),
    ("fourierft", {"n_frequency": 2049}, WIDE, "n_frequency", "at most 2048"),
    ("frod", {"sparse_rate": 0.0002}, WIDE, "sparse_rate", "PEFT would train one all the same; at least 0.00024, or 0"),
    ("gralora", {"gralora_k": 3, "r": 3}, WIDE, "gralora_k", "8, 4, 2, 1 would"),
    ("hra", {"r": 66, "apply_GS": True, "init_weights": False}, WIDE, "r", "at most 64"),
    ("lokr", {"decompose_factor": 48}, WIDE, "decompose_factor", "32, 16, 8, 4 would"),
    ("lora", {"init_lora_weights": "lora_ga", "r": 17}, WIDE, "r", "at most 16"),
    ("lora", {"init_lora_weights": "corda", "r": 33}, WIDE, "r", "at most 32"),
    ("miss", {"r": 65}, WIDE, "r", "at most 64"),
    ("miss", {"r": 64, "init_weights": "bat"}, WIDE, "r", "32, 16, 8, 4 would"),
    ("miss", {"r": 8, "init_weights": "mini", "mini_r": 5}, WIDE, "mini_r", "8, 4, 2 would"),
    ("oft", {"oft_block_size": 48}, WIDE, "oft_block_size", "64, 32, 16, 8 would"),
    ("oft", {"oft_block_size": 0, "r": 5}, WIDE, "r", "16, 8, 4, 2 would"),
    ("osf", {"effective_rank": 32}, WIDE, "effective_rank", "trains none; at most 31"),
    ("osf", {"effective_rank": 0.01}, WIDE, "effective_rank", "keeps none of 32"),
    ("poly", {"n_splits": 5}, WIDE, "n_splits", "8, 4, 2 would"),
    ("psoft", {"r": 33}, WIDE, "r", "at most 32"),
    ("road", {}, WIDE, "group_size", "is 64, which does not divide the outputs; 32, 16, 8, 4 would"),
    ("road", {}, (64, 33), "group_size", "none would"),
    ("shira", {}, WIDE, "r", "is 32, for which the weight has too few entries; at most 21"),
    ("supertuning", {"sparsity": 0.9999}, WIDE, "sparsity", "none of 2048 entries"),
    ("tinylora", {"r": 33}, WIDE, "r", "at most 32"),
    ("vblora", {"vector_length": 12}, WIDE, "vector_length", "32, 16, 8, 4 would"),
    ("waveft", {"n_frequency": 2049}, WIDE, "n_frequency", "at most 2048"),
]
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("adamss", {"r": 32, "num_subspaces": 8, "subspace_rank": 4}),
    ("adamss", {"r": 32, "num_subspaces": 8, "subspace_rank": 9, "use_dynamic_rank": True}),
    ("boft", {"boft_block_size": 64}),
    ("boft", {"boft_block_size": 0, "boft_block_num": 32}),
    ("c3a", {"block_size": 32}),
    ("deft", {"r": 32}),
    ("fourierft", {"n_frequency": 2048}),
    ("frod", {"sparse_rate": 0}),
    ("hra", {"r": 66}),
    ("lokr", {}),
    ("lora", {"init_lora_weights": "lora_ga", "r": 16}),
    ("lora", {"r": 99}),
    ("miss", {"r": 60}),
    ("miss", {"r": 32, "init_weights": "bat"}),
    ("oft", {"oft_block_size": 64}),
    ("osf", {"effective_rank": 31}),
    ("osf", {}),
    ("psoft", {"r": 32}),
    ("road", {"group_size": 32}),
    ("shira", {"r": 21}),
    ("supertuning", {"sparsity": 0.999}),
    ("tinylora", {"r": 32}),
    ("vblora", {"vector_length": 32}),
    ("waveft", {"n_frequency": 2049, "proportional_parameters": True}),
]
DIVISORS: list[tuple[int, int, dict[str, int], str]] = [
    (4096, 100, {}, "256, 128, 64, 32"),
    (64, 256, {}, "64, 32, 16, 8"),
    (64, 256, {"limit": 2}, "64, 32"),
    (12, 5, {"least": 4}, "12, 6, 4"),
    (12, 5, {"most": 4, "step": 2}, "4, 2"),
    (7, 2, {"step": 2}, "none"),
]


def complaints(method: str, fields: dict[str, Any], inputs: int, outputs: int) -> dict[str, str]:
    section = METHODS[method].section(method=method, **fields)  # type: ignore[call-arg]
    return dict(METHODS[method].fits(section, inputs, outputs))


@pytest.mark.parametrize(("method", "fields", "sizes", "field", "words"), REFUSED)
def test_a_setting_that_a_layer_cannot_take_is_named_with_what_would_fit(
    method: str, fields: dict[str, Any], sizes: tuple[int, int], field: str, words: str
) -> None:
    found = complaints(method, fields, *sizes)
    assert list(found) == [field]
    assert words in found[field]


@pytest.mark.parametrize(("method", "fields"), TAKEN)
def test_a_setting_at_its_bound_is_taken(method: str, fields: dict[str, Any]) -> None:
    assert complaints(method, fields, *WIDE) == {}


@pytest.mark.parametrize("sizes", [(768, 768), (768, 3072), (4096, 1024), (14336, 4096)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_fit_the_layers_of_usual_models(method: str, sizes: tuple[int, int]) -> None:
    assert complaints(method, {}, *sizes) == {}


@pytest.mark.parametrize(("number", "near", "bounds", "text"), DIVISORS)
def test_the_divisors_nearest_to_the_value_are_shown(number: int, near: int, bounds: dict[str, int], text: str) -> None:
    assert divisors_text(number, near, **bounds) == text


def test_sizes_are_compared_without_torch() -> None:
    code = (
        "import sys; from peftkit.methods import METHODS\n"
        "for method in METHODS.values(): list(method.fits(method.section(method=method.name), 60, 7))\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
