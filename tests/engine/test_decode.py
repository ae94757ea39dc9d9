"""Generating in batches: the tokens of each row alone, no work for rows that have ended, and no copies of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig, set_seed
from transformers.cache_utils import DynamicLayer

from peftkit.engine.decode import Decoder, RoomyLayer, make_roomy
from tests.contracts.tiny_models import tiny_config
from tests.runs import run_cli, tiny_recipe, train

LENGTHS = (3, 11, 7, 2, 9, 5)
ENDS = [2, *range(8, 300, 8)]  # every eighth token, so that answers are of many lengths


def model_of(model_type: str, **changes: Any) -> Any:
    """A model that says different things to different prompts."""
    set_seed(3)
    config = tiny_config(model_type, **changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            parameter.data *= 4  # likelier to end, and less to repeat itself
    return model


def prompts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(5, 300, (length,), generator=drawn).tolist() for length in LENGTHS]


def answers(
    model: Any, rows: list[list[int]], decoder: Decoder | None, *, sample: bool = False, **settings: Any
) -> list[list[int]]:
    """New tokens of each row up to its end, by our loop or (None) by transformers'."""
    width, side = max(map(len, rows)), model.config.is_encoder_decoder
    padded = [[*row, *[0] * (width - len(row))] if side else [*[0] * (width - len(row)), *row] for row in rows]
    ids = torch.tensor(padded)
    config = GenerationConfig(max_new_tokens=24, do_sample=sample, eos_token_id=ENDS, pad_token_id=0, **settings)
    if side:
        config.decoder_start_token_id = model.config.decoder_start_token_id
    own = {} if decoder is None else {"custom_generate": decoder}
    output = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), generation_config=config, **own)
    return [until_end(row[0 if side else width :].tolist(), ENDS) for row in output]


def until_end(tokens: list[int], end: list[int]) -> list[int]:
    place = next((number for number, token in enumerate(tokens) if token in end), len(tokens))
    return tokens[: place + 1]


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gemma2", "gpt2", "llama", "mixtral", "opt", "t5"])
def test_a_batch_gives_the_tokens_of_each_row_alone(model_type: str) -> None:
    model = model_of(model_type)
    rows = prompts()
    alone = [answers(model, [row], None)[0] for row in rows]
    assert answers(model, rows, Decoder()) == alone
    assert len(set(map(len, alone))) > 1  # they end at different places
    assert answers(model, rows, Decoder(interval=4)) == alone


def test_sliding_windows_are_kept_by_row_too() -> None:
    model = model_of("gemma2", sliding_window=8)
    rows = prompts()
    assert answers(model, rows, Decoder()) == [answers(model, [row], None)[0] for row in rows]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3}], ids=str)
def test_settings_that_look_at_earlier_tokens_hold_by_row(settings: dict[str, Any]) -> None:
    model = model_of("llama")
    rows = prompts()
    assert answers(model, rows, Decoder(), **settings) == [answers(model, [row], None, **settings)[0] for row in rows]


def batch_sizes(model: Any, decoder: Decoder) -> list[int]:
    """Rows of each forward pass."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    answers(model, prompts(), decoder)
    handle.remove()
    return sizes


def test_rows_that_have_ended_cost_nothing_more() -> None:
    model = model_of("llama")
    lengths = [len(answers(model, [row], None)[0]) for row in prompts()]
    expected = [sum(length > number for length in lengths) for number in range(max(lengths))]
    assert batch_sizes(model, Decoder()) == expected
    assert batch_sizes(model, Decoder(drops=False)) == [len(LENGTHS)] * max(lengths)


def test_sampling_takes_the_tokens_that_transformers_would_draw() -> None:
    model = model_of("llama")
    rows, settings = prompts(), {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    found = []
    for decoder in (Decoder(drops=False), None):
        torch.manual_seed(0)
        found.append(answers(model, rows, decoder, sample=True, **settings))
    assert found[0] == found[1]


def test_a_static_cache_gives_the_same_answers() -> None:
    model = model_of("llama")
    rows = prompts()
    assert answers(model, rows, None, cache_implementation="static") == answers(model, rows, Decoder())


def test_keys_and_values_grow_without_being_copied_at_every_token() -> None:
    drawn = torch.randn(2, 3, 200, 4)
    roomy, plain = RoomyLayer(), DynamicLayer()
    places = set()
    for start, end in [(0, 30), *((number, number + 1) for number in range(30, 200))]:
        new = drawn[:, :, start:end]
        ours, theirs = roomy.update(new, new + 1), plain.update(new, new + 1)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        places.add(ours[0].data_ptr())
    assert roomy.get_seq_length() == 200
    assert len(places) <= 4


def test_a_cache_with_room_gives_up_rows() -> None:
    roomy, new = RoomyLayer(), torch.randn(4, 1, 5, 2)
    roomy.update(new, new)
    roomy.batch_select_indices(torch.tensor([2, 0]))
    more = torch.randn(2, 1, 1, 2)
    keys, _ = roomy.update(more, more)
    assert torch.equal(keys, torch.cat([new[[2, 0]], more], dim=2))


def test_layers_of_another_kind_stay_as_they_are() -> None:
    cache = DynamicCache(config=tiny_config("gemma2"))
    kinds = [type(layer).__name__ for layer in cache.layers]
    make_roomy(cache)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "RoomyLayer" if kind == "DynamicLayer" else kind for kind in kinds
    ]
    assert len(set(kinds)) == 2


def test_a_recipe_can_ask_for_a_static_cache(models_dir: Path, tmp_path: Path) -> None:
    recipe, found = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, generation={"max_new_tokens": 8}), []
    for kind in ("dynamic", "static"):
        train(recipe, tmp_path / kind, "--set", f"generation.cache_implementation={kind}")
        arguments = ("--adapter", tmp_path / kind, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / f"{kind}.jsonl")
        assert run_cli("infer", *arguments).code == 0
        found.append((tmp_path / f"{kind}.jsonl").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_have_no_place_in_a_static_cache(models_dir: Path, tmp_path: Path, method: str) -> None:
    adapter = {"method": method, "num_virtual_tokens": 4}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter, generation={"cache_implementation": "static"})
    result = run_cli("validate", recipe)
    assert result.code == 2
    assert f"generation.cache_implementation: `static` cannot be used with `{method}`" in result.err
