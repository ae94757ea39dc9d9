"""CAUSAL_LM: which tokens are learned, how rows are cut, and what the loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peftkit.engine.model import read_tokenizer
from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.chat import default_chat_template
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Example, Runtime
from tests.conftest import CHATML, tiny_tokenizer, write_jsonl

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Like Qwen 3: what an earlier assistant turn thought is not shown again.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'user' or loop.last %}{{ message['content'] }}{% else %}(hidden){% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {"chatml": "<|im_end|>", "llama_3": "<|eot_id|>", "zephyr": "</s>", "none": "</s>"}
USER, ANSWER = {"role": "user", "content": "how many apples"}, {"role": "assistant", "content": "tom has three"}
MORE = [{"role": "user", "content": "and birds"}, {"role": "assistant", "content": "two red birds"}]


def tokenizer_of(kind: str) -> Any:
    """A tokenizer with a template like a well-known model's, or with none of its own."""
    tokenizer = tiny_tokenizer({"chatml": CHATML, "llama_3": LLAMA_3, "zephyr": ZEPHYR, "none": None}[kind])
    if kind == "llama_3":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    if kind == "none":
        tokenizer.chat_template = default_chat_template(tokenizer)
    return tokenizer


def runtime_of(tokenizer: Any, **settings: Any) -> Runtime:
    return TASKS["CAUSAL_LM"].runtime(tokenizer, Encoding(**{"max_length": 256} | settings))


def encode(tokenizer: Any, row: dict[str, Any], **settings: Any) -> Example:
    (example,) = runtime_of(tokenizer, **settings).encode(row, "rows:1")
    return example


def learned(tokenizer: Any, example: Example) -> str:
    """The text of the supervised tokens."""
    assert isinstance(example.labels, list)
    assert all(label in (token, IGNORE_INDEX) for label, token in zip(example.labels, example.inputs["input_ids"], strict=True))
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))


def adds_bos(tokenizer: Any) -> Any:
    """The tokenizer, putting <s> before every text, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("kind", ENDS)
def test_an_answer_and_its_end_token_are_learned_and_nothing_else(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    assert learned(tokenizer, encode(tokenizer, {"messages": [USER, ANSWER]})) == f"tom has three{ENDS[kind]}"


@pytest.mark.parametrize("kind", ENDS)
def test_every_assistant_turn_of_a_conversation_is_learned(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = learned(tokenizer, encode(tokenizer, {"messages": [USER, ANSWER, *MORE]}))
    assert text == f"tom has three{ENDS[kind]}two red birds{ENDS[kind]}"


@pytest.mark.parametrize("kind", ENDS)
def test_a_system_message_is_read_and_not_learned(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    example = encode(tokenizer, {"messages": [{"role": "system", "content": "be good"}, USER, ANSWER]})
    assert "be good" in tokenizer.decode(example.inputs["input_ids"])
    assert learned(tokenizer, example) == f"tom has three{ENDS[kind]}"


@pytest.mark.parametrize("kind", ENDS)
def test_a_prompt_is_rendered_as_the_beginning_of_what_was_trained_on(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    whole = encode(tokenizer, {"messages": [USER, ANSWER]})
    (prompt,) = runtime_of(tokenizer).encode({"messages": [USER]}, "rows:1", target=False)
    assert prompt is not None
    assert isinstance(whole.labels, list)
    num_before = next(place for place, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    assert prompt.inputs["input_ids"] == whole.inputs["input_ids"][:num_before]


def test_a_completion_and_the_end_of_sequence_are_learned_without_a_template() -> None:
    tokenizer = tiny_tokenizer()
    example = encode(tokenizer, {"prompt": "the cat ", "completion": "sat on"})
    assert learned(tokenizer, example) == "sat on</s>"
    assert tokenizer.decode(example.inputs["input_ids"]) == "the cat sat on</s>"


def test_every_token_of_a_text_is_learned_and_its_end() -> None:
    tokenizer = adds_bos(tiny_tokenizer())
    example = encode(tokenizer, {"text": "the cat sat"})
    assert learned(tokenizer, example) == "<s>the cat sat</s>"
    assert example.num_targets == len(example.inputs["input_ids"]) - 1  # nothing comes before the first token to predict it


def test_train_on_all_learns_the_questions_too() -> None:
    tokenizer = tiny_tokenizer()
    example = encode(tokenizer, {"messages": [USER, ANSWER]}, train_on="all")
    assert example.labels == example.inputs["input_ids"]


@pytest.mark.parametrize("kind", ["llama_3", "none"])
def test_a_conversation_starts_with_one_bos_where_the_tokenizer_adds_one(kind: str) -> None:
    tokenizer = adds_bos(tokenizer_of(kind))
    tokenizer.chat_template = default_chat_template(tokenizer) if kind == "none" else tokenizer.chat_template
    ids = encode(tokenizer, {"messages": [USER, ANSWER]}).inputs["input_ids"]
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_prompt_and_completion_start_with_one_bos_where_the_tokenizer_adds_one() -> None:
    tokenizer = adds_bos(tiny_tokenizer())
    ids = encode(tokenizer, {"prompt": "the cat", "completion": "sat"}).inputs["input_ids"]
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_a_template_that_renders_earlier_turns_differently_is_refused() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    with pytest.raises(RowError, match=r"turn 2 \(assistant\) cannot be told from the rest.*train_on: all"):
        encode(tokenizer, {"messages": [USER, ANSWER, *MORE]})
    assert learned(tokenizer, encode(tokenizer, {"messages": [USER, ANSWER]})) == "tom has three<|im_end|>"


def test_a_template_that_raises_is_told_with_its_row(cli: Any, write_recipe: Any, lm_recipe: Any, tmp_path: Any) -> None:
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    lm_recipe["model"]["chat_template"] = "strict.jinja"
    result = cli("plan", write_recipe(lm_recipe))
    assert result.code == 3
    assert "train.jsonl:1: the chat template refuses these messages: roles must alternate" in result.err


def test_right_truncation_keeps_the_beginning_and_left_truncation_the_end() -> None:
    tokenizer, row = tiny_tokenizer(), {"prompt": "the cat sat on a mat", "completion": "and saw two red birds in an old tree"}
    whole = encode(tokenizer, row).inputs["input_ids"]
    right, left = (encode(tokenizer, row, max_length=12, truncation=side) for side in ("right", "left"))
    assert (right.inputs["input_ids"], left.inputs["input_ids"]) == (whole[:12], whole[-12:])
    assert right.num_tokens == left.num_tokens == len(whole)
    assert left.labels[-1] == tokenizer.eos_token_id


def test_a_row_whose_answer_is_cut_away_is_refused() -> None:
    with pytest.raises(RowError, match="no token is left to learn"):
        encode(tiny_tokenizer(), {"prompt": "the cat sat on a mat", "completion": "and"}, max_length=4, truncation="right")


def long_recipe(lm_recipe: dict[str, Any], tmp_path: Any, truncation: str) -> dict[str, Any]:
    """Six rows of 6 tokens; the fourth of 21."""
    rows = [{"prompt": "a a a a", "completion": "a"} for _ in range(6)]
    rows[3] = {"prompt": "a " * 8 + "a", "completion": "a a"}
    lm_recipe["data"] = {"train": str(write_jsonl(tmp_path / "long.jsonl", rows)), "max_length": 8, "truncation": truncation}
    return lm_recipe


def test_a_row_that_is_too_long_is_named_with_the_length_that_fits(
    cli: Any, write_recipe: Any, lm_recipe: Any, tmp_path: Any
) -> None:
    recipe = long_recipe(lm_recipe, tmp_path, "error")
    first = cli("plan", write_recipe(recipe))
    assert first.code == 3
    num_tokens = len(
        encode(read_tokenizer(recipe["model"]["name_or_path"]), {"prompt": "a " * 8 + "a", "completion": "a a"}).inputs[
            "input_ids"
        ]
    )
    assert f"long.jsonl:4: {num_tokens} tokens" in first.err
    assert f"longer than 8 tokens (`data.max_length`; {num_tokens} would fit them all" in first.err
    assert cli("plan", write_recipe(recipe), "--set", f"data.max_length={num_tokens}").code == 0
    assert cli("plan", write_recipe(recipe), "--set", f"data.max_length={num_tokens - 1}").code == 3


def test_no_length_is_proposed_that_the_model_does_not_take(
    cli: Any, write_recipe: Any, lm_recipe: dict[str, Any], tmp_path: Any
) -> None:
    lm_recipe["data"] = {"train": str(write_jsonl(tmp_path / "long.jsonl", [{"text": "a " * 300}])), "max_length": 200}
    result = cli("plan", write_recipe(lm_recipe))
    assert result.code == 3
    assert "longer than 200 tokens (`data.max_length`; the model takes at most 256; `data.truncation` can be left" in result.err


@pytest.mark.parametrize(("truncation", "counts"), [("drop", [5, 1, 0]), ("left", [6, 0, 1])])
def test_dropped_and_cut_rows_are_counted_in_the_plan(
    cli: Any, write_recipe: Any, lm_recipe: Any, tmp_path: Any, truncation: str, counts: list[int]
) -> None:
    result = cli("plan", write_recipe(long_recipe(lm_recipe, tmp_path, truncation)), "--json").json
    assert [result[name]["train"] for name in ("rows", "dropped_rows", "truncated_rows")] == counts


def lm_batch(models_dir: Any) -> tuple[Runtime, Any, Any]:
    """The runtime, three rows of differing length, and their logits under the tiny Llama."""
    runtime = runtime_of(read_tokenizer(str(models_dir / "llama")))
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, *MORE]}, {"text": "the cat sat on a mat"}]
    examples = [example for row in rows for example in runtime.encode(row, "rows:1")]
    batch = runtime.collate([example for example in examples if example is not None])
    return runtime, batch, sum(example.num_targets for example in examples if example is not None)


def test_the_loss_is_that_of_transformers_times_the_targets(models_dir: Any) -> None:
    runtime, batch, num_targets = lm_batch(models_dir)
    model = AutoModelForCausalLM.from_pretrained(models_dir / "llama").eval()
    with torch.no_grad():
        ours = runtime.loss_sum(runtime.forward(model, batch), batch["labels"])
        theirs = model(**batch).loss * num_targets
    assert int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) == num_targets
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_label_smoothing_is_that_of_torch(models_dir: Any) -> None:
    runtime, batch, _ = lm_batch(models_dir)
    torch.manual_seed(0)
    logits = torch.randn(*batch["labels"].shape, 300)
    ours = runtime.loss_sum(logits, batch["labels"], 0.1)
    theirs = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", label_smoothing=0.1
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert float(ours) != pytest.approx(float(runtime.loss_sum(logits, batch["labels"])), rel=1e-3)


def test_padding_changes_no_rows_loss(models_dir: Any) -> None:
    runtime, batch, _ = lm_batch(models_dir)
    model = AutoModelForCausalLM.from_pretrained(models_dir / "llama").eval()
    together = runtime.score(runtime.forward(model, batch), batch, [])
    for row, result in enumerate(together):
        width = int(batch["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1, :width] for name, tensor in batch.items()}
        assert runtime.score(runtime.forward(model, alone), alone, [])[0]["loss_sum"] == pytest.approx(
            result["loss_sum"], rel=1e-5
        )
