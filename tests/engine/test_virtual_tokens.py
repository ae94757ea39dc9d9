"""Virtual tokens in batches: heads, losses and generation see the real tokens where they would be without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contracts.matrix import SETTINGS
from tests.runs import run_cli, tiny_recipe, train

PROMPTS = ["prompt_tuning", "p_tuning", "prefix_tuning", "cartridge", "cpt", "multitask_prompt_tuning"]
TEXTS = ["the cat", "seven small dogs ran home because it was late", "an old tree"]


@pytest.fixture(scope="module")
def adapter(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(method, model) -> a loaded adapter of a language model, trained far enough to matter."""
    from peftkit.engine.loaded import load_adapter
    from tests.conftest import instruction_rows, write_jsonl

    loaded: dict[tuple[str, str], Any] = {}

    def of(method: str, name: str) -> Any:
        if (method, name) not in loaded:
            folder = tmp_path_factory.mktemp(f"{method}-{name}")
            task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
            rows: list[dict[str, Any]] = [row | {"task_id": index % 2} for index, row in enumerate(instruction_rows(8))]
            if task == "SEQ_2_SEQ_LM":
                rows = [{"source": row["instruction"], "target": row["output"]} | {"task_id": row["task_id"]} for row in rows]
            recipe = tiny_recipe(
                task,
                models_dir,
                folder,
                adapter={"method": method, **SETTINGS[method]},
                model={"name_or_path": str(models_dir / name)},
                data={"train": str(write_jsonl(folder / "train.jsonl", rows))},
                training={"learning_rate": 0.5},
            )
            train(recipe, folder / "run")
            loaded[method, name] = load_adapter(folder / "run")
        return loaded[method, name]

    return of


def encoded(loaded: Any) -> list[Any]:
    """The prompts of TEXTS, of both tasks where there are tasks."""
    names = loaded.runtime.settings.task_names
    rows = [{"prompt": text} | ({"task_id": names[index % 2]} if names else {}) for index, text in enumerate(TEXTS)]
    return [example for row in rows for example in loaded.prompts.encode(row, "test", target=False)]


@torch.no_grad()
def step_by_step(loaded: Any, example: Any, count: int) -> list[int]:
    """Greedy answer of a decoder by whole forward passes, without cache, without padding."""
    ids = list(example.inputs["input_ids"])
    tasks = {} if example.task_id is None else {"task_ids": torch.tensor([example.task_id])}
    for _ in range(count):
        ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False, **tasks).logits[0, -1].argmax()))
    return ids[len(example.inputs["input_ids"]) :]


@torch.no_grad()
def step_by_step_decoder(loaded: Any, example: Any, count: int) -> list[int]:
    """The same for an encoder with a decoder."""
    ids, tasks = [0], {} if example.task_id is None else {"task_ids": torch.tensor([example.task_id])}
    for _ in range(count):
        output = loaded.model(
            input_ids=torch.tensor([example.inputs["input_ids"]]),
            decoder_input_ids=torch.tensor([ids]),
            use_cache=False,
            **tasks,
        )
        ids.append(int(output.logits[0, -1].argmax()))
    return ids[1:]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_padded_batch_generates_what_each_prompt_does_alone(adapter: Any, method: str, name: str, num_beams: int) -> None:
    if (method, name) == ("cpt", "t5"):
        return  # refused: CPT is for decoders
    loaded = adapter(method, name)
    examples = encoded(loaded)
    batch = loaded.runtime.generation_batch(examples)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "eos_token_id": None, "pad_token_id": 0}
    together = loaded.runtime.new_tokens(loaded.model.generate(**batch, **settings), batch)
    for example, answer in zip(examples, together, strict=True):
        single = loaded.runtime.generation_batch([example])
        alone = loaded.runtime.new_tokens(loaded.model.generate(**single, **settings), single)[0]
        assert answer.tolist() == alone.tolist()
        if num_beams == 1:
            stepwise = step_by_step_decoder(loaded, example, 6) if name == "t5" else step_by_step(loaded, example, 6)
            assert alone.tolist()[-6:] == stepwise


@pytest.mark.parametrize("method", PROMPTS)
def test_logits_of_a_row_do_not_depend_on_its_batch(adapter: Any, method: str) -> None:
    loaded = adapter(method, "llama")
    names = loaded.runtime.settings.task_names
    more = {"completion": "cat"} | ({"task_id": names[0]} if names else {})
    examples = [example for text in TEXTS for example in loaded.runtime.encode({"prompt": text} | more, "t")]
    with torch.no_grad():
        together = loaded.runtime.forward(loaded.model, loaded.runtime.collate(examples))
        for number, example in enumerate(examples):
            alone = loaded.runtime.forward(loaded.model, loaded.runtime.collate([example]))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", PROMPTS)
def test_without_the_adapter_the_base_model_answers(adapter: Any, models_dir: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    loaded = adapter(method, "llama")
    ids = torch.tensor([[10, 20, 30, 40]])
    base = AutoModelForCausalLM.from_pretrained(models_dir / "llama").eval()
    tasks = {"task_ids": torch.tensor([0])} if method == "multitask_prompt_tuning" else {}
    with torch.no_grad():
        with loaded.model.disable_adapter():
            assert torch.equal(loaded.model(input_ids=ids, **tasks).logits, base(input_ids=ids).logits)
        assert not torch.allclose(loaded.model(input_ids=ids, **tasks).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_plain_peft_loads_a_causal_adapter_with_the_same_logits(adapter: Any, models_dir: Path, method: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    loaded = adapter(method, "llama")
    base = AutoModelForCausalLM.from_pretrained(models_dir / "llama")
    plain = peft.PeftModel.from_pretrained(base, str(loaded.folder)).eval()
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -4:]
        torch.testing.assert_close(theirs, loaded.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_that_peft_has_trained_with_a_head_are_refused(models_dir: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(models_dir / "bert", num_labels=2)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "theirs"))
    result = run_cli("infer", "--adapter", tmp_path / "theirs", "--prompt", "the cat")
    assert (result.code, "was trained by PEFT alone" in result.err) == (7, True)


def test_virtual_tokens_that_peft_has_trained_for_an_encoder_and_a_decoder_generate_as_there(
    models_dir: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForSeq2SeqLM

    from peftkit.engine.loaded import load_adapter

    base = AutoModelForSeq2SeqLM.from_pretrained(models_dir / "t5")
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(tmp_path / "theirs")
    ids = torch.tensor([[10, 11, 12, 13, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert ours.model.generate(**inputs).tolist() == theirs.generate(**inputs).tolist()
