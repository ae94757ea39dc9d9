"""TOKEN_CLS: a tag per word, learned and read at the word's first token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from peftkit.errors import LoadError
from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Example, Runtime, TooLong
from peftkit.tasks.token_cls import has_spans
from tests.conftest import bert_like_tokenizer, tag_rows, tiny_tokenizer, write_jsonl
from tests.runs import curve, run_cli, tiny_recipe, train

TAGS = ("B-WHO", "I-WHO", "O")
ROW = {"tokens": ["seven", "small", "dogs", "ran"], "tags": ["O", "O", "B-WHO", "O"]}


def runtime_of(tokenizer: Any = None, labels: tuple[str, ...] = TAGS, **settings: Any) -> Runtime:
    return TASKS["TOKEN_CLS"].runtime(
        tokenizer or bert_like_tokenizer(), Encoding(**{"max_length": 48, "labels": labels} | settings)
    )


def encoded(runtime: Runtime, row: dict[str, Any], *, target: bool = True) -> Example:
    (example,) = runtime.encode(row, "rows:1", target=target)
    return example


def word_starts(runtime: Runtime, words: list[str]) -> list[str]:
    """The first token of every word, as the words alone are tokenised."""
    return [runtime.tokenizer.tokenize(word)[0] for word in words]


@pytest.mark.parametrize("tokenizer", [bert_like_tokenizer, tiny_tokenizer], ids=["special tokens", "byte level"])
def test_a_word_is_labelled_at_its_first_token_only(tokenizer: Any) -> None:
    runtime = runtime_of(tokenizer())
    example = encoded(runtime, ROW)
    tokens = runtime.tokenizer.convert_ids_to_tokens(example.inputs["input_ids"])
    places = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    assert [tokens[place].strip("Ġ") for place in places] == word_starts(runtime, ROW["tokens"])
    assert [TAGS[example.labels[place]] for place in places] == ROW["tags"]
    assert example.num_targets == 4
    assert len(tokens) > 6  # words of several tokens are among them


def test_the_model_sees_the_text_that_it_knows() -> None:
    runtime = runtime_of(tiny_tokenizer())
    assert encoded(runtime, ROW).inputs["input_ids"] == runtime.tokenizer("seven small dogs ran")["input_ids"]


def letters_only(tokenizer: Any) -> Any:
    """The tokenizer, passing over everything but ASCII letters."""
    from tokenizers import Regex, normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^a-z ]"), "")
    return tokenizer


def test_a_word_that_the_tokenizer_passes_over_is_read_as_unknown() -> None:
    row = {"tokens": ["cat", "\u200d", "sat"], "tags": ["O", "B-WHO", "O"]}
    runtime = runtime_of(letters_only(bert_like_tokenizer()))
    example = encoded(runtime, row)
    unknown = example.inputs["input_ids"].index(runtime.tokenizer.unk_token_id)
    assert (example.labels[unknown], example.num_targets) == (0, 3)
    with pytest.raises(RowError, match=r"word 2 .* has no token of its own"):
        runtime_of(letters_only(tiny_tokenizer())).encode(row, "rows:1")


@pytest.mark.parametrize(("side", "kept"), [("right", [0, 1]), ("left", [2, 3])])
def test_cut_words_are_counted_and_special_tokens_stay(side: str, kept: list[int]) -> None:
    whole = encoded(runtime_of(), ROW)
    firsts = [place for place, label in enumerate(whole.labels) if label != IGNORE_INDEX]
    room = firsts[2] - 1 if side == "right" else len(whole.labels) - 1 - firsts[2]
    runtime = runtime_of(max_length=room + 2, truncation=side)
    example = encoded(runtime, ROW)
    ends = [example.inputs["input_ids"][0], example.inputs["input_ids"][-1]]
    assert runtime.tokenizer.convert_ids_to_tokens(ends) == ["[CLS]", "[SEP]"]
    assert example.details["words"] == [ROW["tokens"][word] for word in kept]
    assert (example.num_targets, example.details["num_words_cut"]) == (2, 2)
    assert len(example.inputs["input_ids"]) == runtime.settings.max_length


def test_long_rows_are_refused_where_nothing_may_be_cut() -> None:
    with pytest.raises(TooLong):
        runtime_of(max_length=6).encode(ROW, "rows:1")


@pytest.mark.parametrize("max_length", [3, 4, 7, 12, 100])
def test_every_word_is_tagged_at_inference_whatever_its_length(max_length: int) -> None:
    words = [word for row in tag_rows(6) for word in row["tokens"]]
    runtime = runtime_of(max_length=max_length)
    example = encoded(runtime, {"tokens": words}, target=False)
    assert all(len(ids) <= max_length for ids in example.inputs["input_ids"])
    found = [example.inputs["input_ids"][window][place] for window, place in example.details["places"]]
    assert runtime.tokenizer.convert_ids_to_tokens(found) == word_starts(runtime, words)
    (result,) = runtime.score(torch.zeros(len(example.sequences), example.length, 3), runtime.collate([example]), [example])
    assert len(result["prediction"]) == len(words)
    assert result["label"] is None


def test_the_loss_is_a_sum_over_labelled_words() -> None:
    logits = torch.tensor([[[9.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0]]])
    labels = torch.tensor([[IGNORE_INDEX, 0, 2]])
    expected = math.log(1 + 2 * math.exp(-2)) + math.log(2 + math.e)
    assert float(runtime_of().loss_sum(logits, labels)) == pytest.approx(expected, rel=1e-6)


def result_of(label: list[str], prediction: list[str]) -> dict[str, Any]:
    return {"label": label, "prediction": prediction, "loss_sum": 2.0, "num_words_cut": 0}


def test_metrics_of_spans_are_those_worked_out_by_hand() -> None:
    # Spans: WHO(0-1) and WHO(3) in truth; WHO(0-1), found whole, and WHO(2-3), too long, in the guess.
    found = runtime_of().summarise(
        [
            result_of(["B-WHO", "I-WHO", "O", "B-WHO", "O"], ["B-WHO", "I-WHO", "B-WHO", "I-WHO", "O"]),
            result_of(["O"], ["B-WHO"]),
        ]
    )
    assert found["loss"] == pytest.approx(4 / 6)
    assert found["token_accuracy"] == pytest.approx(3 / 6)
    assert (found["precision"], found["recall"], found["f1"]) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 2),
        pytest.approx(0.4),
    )
    assert found["by_class"]["WHO"]["num_rows"] == 2


def test_without_any_span_f1_is_zero() -> None:
    assert runtime_of().summarise([result_of(["O", "O"], ["O", "O"])])["f1"] == 0.0


def test_plain_tags_have_the_f1_of_single_tags() -> None:
    found = runtime_of(labels=("DET", "NOUN")).summarise([result_of(["DET", "NOUN", "NOUN"], ["DET", "NOUN", "DET"])])
    # DET: precision 1/2, recall 1, F1 2/3; NOUN: precision 1, recall 1/2, F1 2/3.
    assert (found["f1"], found["f1_macro"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert "precision" not in found


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (("O", "B-PER", "I-PER"), True),
        (("O", "S-X", "B-X", "E-X"), True),
        (("DET", "NOUN"), False),
        (("0", "1"), False),
        (("O",), False),
        (("O", "B-"), False),
    ],
)
def test_spans_are_recognised_by_their_tags(tags: tuple[str, ...], spans: bool) -> None:
    assert has_spans(tags) is spans


def test_spans_are_given_with_their_words() -> None:
    words = ["the", "two", "red", "birds"]
    answer = runtime_of().answer({"prediction": ["O", "B-WHO", "I-WHO", "O"], "_words": words})
    assert answer["entities"] == [{"type": "WHO", "text": "two red", "start": 1, "end": 3}]


def test_numbers_stand_for_the_tags_that_the_recipe_names() -> None:
    runtime = runtime_of(labels=("O", "B-WHO", "I-WHO"), numbered=True)
    example = encoded(runtime, {"tokens": ["cat", "sat"], "tags": [1, 0]})
    assert example.details["classes"] == ["B-WHO", "O"]
    with pytest.raises(RowError, match="the tag 3 is not among the tags: O, B-WHO, I-WHO"):
        runtime.encode({"tokens": ["cat"], "tags": [3]}, "rows:1")
    with pytest.raises(RowError, match="the tag 1 is not among the tags"):
        runtime_of(labels=("O", "B-WHO", "I-WHO")).encode({"tokens": ["cat"], "tags": [1]}, "rows:1")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):  # type: ignore[misc]
        is_fast = False

    slow = bert_like_tokenizer()
    slow.__class__ = Slow
    with pytest.raises(LoadError, match="TOKEN_CLS needs a fast tokenizer"):
        runtime_of(slow)


def test_losses_are_the_same_for_every_micro_batch(models_dir: Path, tmp_path: Path) -> None:
    curves = []
    for size in (8, 4, 2):
        (tmp_path / str(size)).mkdir()
        recipe = tiny_recipe("TOKEN_CLS", models_dir, tmp_path / str(size), training={"micro_batch_size": size})
        train(recipe, tmp_path / f"run{size}")
        curves.append([value for line in curve(tmp_path / f"run{size}", "loss", "grad_norm") for value in line])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


@pytest.fixture(scope="module")
def run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to tag."""
    folder = tmp_path_factory.mktemp("tags")
    test = write_jsonl(folder / "test.jsonl", tag_rows(24)[-6:])
    training = {"max_steps": 150, "learning_rate": 0.005, "logging_steps": 150, "micro_batch_size": 8}
    recipe = tiny_recipe(
        "TOKEN_CLS", models_dir, folder, training=training, adapter={"method": "full"}, data={"test": str(test)}
    )
    train(recipe, folder / "run")
    return folder / "run"


def test_tags_are_learned_and_evaluated(run: Path) -> None:
    result = run_cli("evaluate", run, "--json").json
    assert result["metrics"]["f1"] > 0.6
    assert set(result["metrics"]["by_class"]) == {"DID", "WHO"}


def test_a_prompt_is_split_at_white_space(run: Path) -> None:
    result = run_cli("infer", "--adapter", run, "--prompt", "the cat  sat", "--json").json
    assert len(result["prediction"]) == 3
    assert {entity["text"] for entity in result["entities"]} <= {"cat", "sat", "cat sat"}


def test_a_file_of_words_is_tagged_row_by_row_however_long(run: Path, tmp_path: Path) -> None:
    words = [word for row in tag_rows(20) for word in row["tokens"]]  # more than the model's 64 positions
    source = write_jsonl(tmp_path / "in.jsonl", [{"tokens": ["the", "cat"]}, {"tokens": words}])
    result = run_cli("infer", "--adapter", run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["prediction"]) for row in rows] == [2, len(words)]


def test_wrong_rows_are_named_with_their_file(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("TOKEN_CLS", models_dir, tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as handle:
        handle.write(json.dumps({"tokens": ["a", "b"], "tags": ["O"]}) + "\n")
    result = run_cli("plan", recipe)
    assert result.code == 3
    assert "rows.jsonl:22: there are 2 words and 1 tags; every word needs one tag" in result.err
