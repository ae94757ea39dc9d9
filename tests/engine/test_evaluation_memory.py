"""What an evaluation holds at once: a batch, whatever the number of rows, and a few positions' logits of a large vocabulary."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from peftkit.engine.evaluate import score_examples
from peftkit.engine.fast import proven_head
from peftkit.engine.step import Step
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from tests.conftest import WORDS, tiny_tokenizer

VOCABULARY = 20_000


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.living = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(place)
        self.living += size
        self.most = max(self.most, self.living)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.living -= size


@pytest.fixture(scope="module")
def step() -> Step:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    runtime = TASKS["CAUSAL_LM"].runtime(tiny_tokenizer(), Encoding(1024, train_on="all"))
    model = LlamaForCausalLM(config).eval()
    head = proven_head(model, runtime, examples_of(runtime, 3, 16), "no", "float32")
    return Step(model, runtime, head)


def examples_of(runtime: Any, num_rows: int, num_words: int) -> list[Any]:
    texts = (" ".join(WORDS[(n * 3 + place) % len(WORDS)] for place in range(num_words)) for n in range(num_rows))
    return [example for n, text in enumerate(texts) for example in runtime.encode({"text": text}, f"rows:{n}")]


def most_bytes(step: Step, num_rows: int, num_words: int) -> tuple[int, int]:
    """The most that was held at once, and the bytes of all logits together."""
    examples = examples_of(step.runtime, num_rows, num_words)
    with LivingTensors() as tensors:
        results = score_examples(step, examples, batch_size=2, device=torch.device("cpu"))
    assert len(results) == len(examples)
    return tensors.most, 4 * VOCABULARY * sum(example.length for example in examples)


def test_memory_does_not_grow_with_the_rows(step: Step) -> None:
    (few, _), (many, logits) = most_bytes(step, 4, 80), most_bytes(step, 24, 80)
    assert many < 1.05 * few
    assert many < logits / 10


def test_logits_of_long_rows_are_never_whole(step: Step) -> None:
    (short, _), (long, logits) = most_bytes(step, 2, 120), most_bytes(step, 2, 360)
    assert long < 1.5 * short
    assert long < logits / 2
