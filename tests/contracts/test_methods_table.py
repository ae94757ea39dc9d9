"""docs/methods.md is what the matrix proves: written by this test (`UPDATE_DOCS=1`), and compared by it in every other run."""

from __future__ import annotations

import os
from pathlib import Path

from peftkit.methods import METHODS
from peftkit.recipe.fit import why_not
from tests.contracts.matrix import MODELS, Cell, why_not_merged

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
CONFIGS = {
    "llama": {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2"},
    "bert": {"model_type": "bert"},
    "t5": {"model_type": "t5", "is_encoder_decoder": True},
}
SHORT = {
    "CAUSAL_LM": "LM", "SEQ_2_SEQ_LM": "S2S", "SEQ_CLS": "CLS", "TOKEN_CLS": "TOK", "QUESTION_ANS": "QA",
    "FEATURE_EXTRACTION": "EMB",
}  # fmt: skip
HEAD = """# What works with what

`tests/contracts` runs every cell of this table through the command line on tiny models: `validate`, `train` (the loss falls),
the certificate (a reload into a fresh base gives the same logits), `params` (the same count), `infer`, `merge` (the same
logits). It writes this file; a cell that neither works nor is refused fails the suite.

- **+** trains, reloads, answers and merges into the base model
- **o** trains, reloads and answers; `merge` refuses and says why
- **.** refused by `peftkit validate` before anything is loaded, with the reason and the methods that do work

Columns: a decoder (Llama), one with Conv1D layers (GPT-2), an encoder (BERT), an encoder with a decoder (T5). LM: CAUSAL_LM,
S2S: SEQ_2_SEQ_LM, CLS: SEQ_CLS, TOK: TOKEN_CLS, QA: QUESTION_ANS, EMB: FEATURE_EXTRACTION. T5 answers TOK and EMB with its
encoder alone.

"""


def symbol(cell: Cell) -> str:
    """The sign of a cell."""
    if why_not(cell.facts, cell.task, CONFIGS[cell.model]):
        return "."
    return "o" if why_not_merged(cell) else "+"


def matrix_table() -> str:
    """Methods by tasks and models."""
    columns = [(model, task) for model, tasks in MODELS.items() for task in tasks]
    titles = [f"{model} {SHORT[task]}" for model, task in columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in METHODS:
        signs = [symbol(Cell(name, task, model)) for model, task in columns]
        lines.append(f"| `{name}` | " + " | ".join(signs) + " |")
    return "\n".join(lines) + "\n"


def facts_table() -> str:
    """What each method is and says of itself."""
    lines = ["| method | what it is | learning rate | quantised bases | adapters on one base |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        several = "several, also in one batch" if method.mixed_batches else "several" if method.several_adapters else "one"
        bits = ", ".join(method.trains_on) or "none"
        lines.append(f"| `{name}` | {method.summary} | {method.learning_rate:g} | {bits} | {several} |")
    return "\n".join(lines) + "\n"


def reasons() -> str:
    """Why methods do not work, do not merge or are not for quantised bases."""
    lines = []
    for name, method in METHODS.items():
        parts = [f"refused where it is: {method.why_not}"] if method.why_not else []
        parts += [f"not merged: {method.not_mergeable}"] if method.not_mergeable else []
        parts += [f"quantised bases: {method.why_not_quantized}"] if method.why_not_quantized else []
        if parts:
            lines.append(f"- `{name}`: " + "; ".join(parts))
    return "\n".join(lines) + "\n"


def document() -> str:
    """The whole file."""
    sections = [HEAD + matrix_table(), "## Facts\n\n" + facts_table(), "## Reasons\n\n" + reasons()]
    return (
        "\n".join(sections)
        + "\nQuantised bases: 4bit and 8bit are layers of bitsandbytes. Settings that do not work there are refused by\n"
        "`validate`; [quantization.md](quantization.md) lists them.\n\n"
        "`peftkit methods NAME` shows the fields of a method, its learning rates and their sources.\n"
    )


def test_the_table_in_the_docs_is_the_one_that_the_matrix_proves() -> None:
    if os.environ.get("UPDATE_DOCS"):
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(document(), encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == document(), "run it with UPDATE_DOCS=1 to write the table anew"


def test_fewer_cells_are_refused_than_fail_on_bare_peft() -> None:
    # PEFT 0.21.2 on the same seven cells for its 45 methods: 315 cells, 261 of which train and reload.
    seven = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
    seven += [("bert", task) for task in MODELS["bert"]]
    refused = [
        (name, model, task)
        for name, method in METHODS.items()
        for model, task in seven
        if method.in_peft and symbol(Cell(name, task, model)) == "."
    ]
    assert len(refused) < 315 - 261
