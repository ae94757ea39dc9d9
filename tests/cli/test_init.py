"""`peftkit init`: what it proposes for rows of many kinds, and what it asks at a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Result, instruction_rows, label_rows, pair_rows, question_rows, tag_rows, write_jsonl
from tests.terminals import CTRL_C, CTRL_D, talk

Cli = Callable[..., Result]


def odd_csv(path: Path) -> None:
    """Reviews under names that no format knows."""
    lines = [f'{number},"a film about {row["text"]}",{row["label"]}' for number, row in enumerate(label_rows(30))]
    path.write_text("\n".join(["ID,customerReview,Stars", *lines]), encoding="utf-8")


def chat(path: Path) -> None:
    """Conversations under another name."""
    turns = [[{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
             for row in instruction_rows(12)]  # fmt: skip
    write_jsonl(path, [{"dialog": turn} for turn in turns])


def conll(path: Path) -> None:
    """Words and tags, a line each."""
    path.write_text("\n\n".join("\n".join(map(" ".join, zip(row["tokens"], row["tags"], strict=True))) for row in tag_rows(12)))


def parquet(path: Path) -> None:
    """Translations as the hub has them."""
    from pyarrow import Table, parquet

    rows = [{"translation": {"en": row["instruction"], "de": row["output"]}} for row in instruction_rows(12)]
    parquet.write_table(Table.from_pylist(rows), path)


def folder(path: Path) -> None:
    """Pairs of texts and whether one follows from the other, in two files."""
    path.mkdir()
    rows = [{"premise": row["anchor"], "hypothesis": row["positive"], "gold": "yes"} for row in pair_rows(12)]
    write_jsonl(path / "a.jsonl", rows)
    write_jsonl(path / "b.jsonl", [row | {"gold": "no"} for row in rows])


def nested(path: Path) -> None:
    """Instructions whose answers lie within."""
    rows = [{"id": f"seed_{number}", "instruction": row["instruction"], "instances": [{"output": row["output"]}]}
            for number, row in enumerate(instruction_rows(12))]  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")


def similar(path: Path) -> None:
    """Pairs of sentences with a number, in Chinese."""
    lines = [f"第{number}句话\t另一句{number}\t{number / 7:.3f}" for number in range(12)]
    path.write_text("\n".join(["sentence_a\tsentence_b\tscore", *lines]), encoding="utf-8")


def tickets(path: Path) -> None:
    """Classes whose names are long words."""
    names = [f"{what}_not_updated_after_cheque_or_cash_deposit" for what in ("balance", "statement")]
    lines = [f"{number},why is this wrong at number {number}?,{names[number % 2]}" for number in range(12)]
    path.write_text("\n".join(["ticket no,utterance,category", *lines]), encoding="utf-8")


LAID_OUT: list[tuple[str, Callable[[Path], Any], str, str, dict[str, str]]] = [
    ("odd.csv", odd_csv, "SEQ_CLS", "classification", {"text": "customerReview", "label": "Stars"}),
    ("tickets.csv", tickets, "SEQ_CLS", "classification", {"text": "utterance", "label": "category"}),
    ("chat.jsonl", chat, "CAUSAL_LM", "chat", {"messages": "dialog"}),
    ("ner.conll", conll, "TOKEN_CLS", "tokens", {}),
    ("mt.parquet", parquet, "SEQ_2_SEQ_LM", "seq2seq", {"source": "translation.en", "target": "translation.de"}),
    ("nli", folder, "SEQ_CLS", "classification", {"text": "premise", "text_pair": "hypothesis", "label": "gold"}),
    ("nested.json", nested, "CAUSAL_LM", "instruction", {"output": "instances.0.output"}),
    ("similar.tsv", similar, "FEATURE_EXTRACTION", "pairs", {"text": "sentence_a", "text_pair": "sentence_b"}),
    ("squad.jsonl", lambda path: write_jsonl(path, question_rows(12)), "QUESTION_ANS", "question_answering", {}),
    ("rows.jsonl", lambda path: write_jsonl(path, instruction_rows(12)), "CAUSAL_LM", "instruction", {}),
    ("text.txt", lambda path: path.write_text("a line\n" * 12), "CAUSAL_LM", "text", {}),
]


@pytest.mark.parametrize(("name", "write", "task", "layout", "columns"), LAID_OUT, ids=[case[0] for case in LAID_OUT])
def test_rows_of_every_kind_become_a_valid_recipe(
    cli: Cli, tmp_path: Path, name: str, write: Callable[[Path], Any], task: str, layout: str, columns: dict[str, str]
) -> None:
    write(tmp_path / name)
    path = tmp_path / "new.yaml"
    result = cli("init", path, "--data", name, "--model", "owner/name")
    assert result.code == 0, result.err
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    train = recipe["data"]["train"]
    assert (recipe["task"], train["path"], train["format"], train.get("columns", {})) == (task, name, layout, columns)
    assert recipe["data"]["validation"] == 0.1
    assert f"next: peftkit train {path}" in result.out
    assert cli("validate", path).code == 0


def test_a_recipe_of_init_trains(cli: Cli, models_dir: Path, tmp_path: Path) -> None:
    odd_csv(tmp_path / "odd.csv")
    path = tmp_path / "new.yaml"
    assert cli("init", path, "--data", "odd.csv", "--model", models_dir / "bert").code == 0
    overrides = [part for text in ("training.max_steps=2", "data.cache=false") for part in ("--set", text)]
    assert "max_length: 64\n" in path.read_text()
    assert cli("train", path, "--output", tmp_path / "run", *overrides, "--json").json["metrics"]["accuracy"] >= 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "`rows.csv` has no rows"),
        (b"text,label\n", "`rows.csv` has no rows"),
        (b"text,label\ncaf\xe9,x\n", "has the byte 0xe9 (character 4), which is not UTF-8; save the file as UTF-8"),
        ("text,label\na,b\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"a,b\n1,\n2,\n", "has `a`, `b`: no format that any task reads can be made of them"),
    ],
)
def test_rows_that_nothing_can_be_learned_of_are_told(cli: Cli, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    result = cli("init", tmp_path / "new.yaml", "--data", "rows.csv")
    assert (result.code, (tmp_path / "new.yaml").exists()) == (3, False)
    assert words in result.err


def test_rows_that_cannot_be_read_among_others_are_told(cli: Cli, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", label_rows(12))
    path.write_text(path.read_text() + '{"text": \n')
    result = cli("init", tmp_path / "new.yaml", "--data", path)
    assert f"1 more cannot be read (`data.on_bad_row: drop` leaves them out): {path}:13: " in result.out
    assert result.code == 0


def test_files_beside_the_training_rows_are_named(cli: Cli, tmp_path: Path) -> None:
    for name in ("my_train.jsonl", "my_dev.jsonl", "my_test.jsonl"):
        write_jsonl(tmp_path / name, label_rows(6))
    assert cli("init", tmp_path / "new.yaml", "--data", "my_train.jsonl", "--model", "owner/name").code == 0
    data = yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]
    assert [data[split]["path"] for split in ("train", "validation", "test")] == [
        "my_train.jsonl",
        "my_dev.jsonl",
        "my_test.jsonl",
    ]


def test_too_few_rows_get_no_validation(cli: Cli, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", label_rows(6))
    assert cli("init", tmp_path / "new.yaml", "--data", "rows.jsonl", "--model", "owner/name").code == 0
    assert "validation" not in yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]


def test_a_named_task_decides_how_rows_are_read(cli: Cli, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", label_rows(12))
    arguments = ("init", tmp_path / "new.yaml", "--data", "rows.jsonl", "--model", "owner/name")
    assert cli(*arguments, "--task", "causal_lm").code == 0
    train = yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]["train"]
    assert (train["format"], train["columns"]) == ("instruction", {"instruction": "text", "output": "label"})
    refused = cli(*arguments, "--force", "--task", "TOKEN_CLS")
    assert refused.code == 3
    assert "no format that TOKEN_CLS reads" in refused.err


def test_nothing_is_asked_without_a_terminal_and_what_is_missing_is_told(cli: Cli, tmp_path: Path) -> None:
    result = cli("init", tmp_path / "new.yaml")
    assert result.code == 0
    assert "Before it can train:" in result.out
    assert "data.train" in result.out


def test_a_place_that_cannot_be_written_to_is_told_first(cli: Cli, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", label_rows(12))
    for path, words in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "rows.jsonl" / "r.yaml", "is a file, no folder"),
    ):
        result = cli("init", path, "--data", "rows.jsonl", "--force")
        assert (result.code, words in result.err, result.out) == (2, True, "")


def test_enter_alone_takes_what_is_proposed(tmp_path: Path) -> None:
    odd_csv(tmp_path / "train.csv")
    code, shown = talk(tmp_path, ["init"], ["", "", "", ""])
    assert code == 0, shown
    assert "train.csv: 30 rows, columns ID, customerReview, Stars" in shown
    assert (
        "1  SEQ_CLS: learns of the first row label 'pos' (format classification, text: customerReview, label: Stars)" in shown
    )
    assert "next: peftkit train recipe.yaml" in shown
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (recipe["task"], recipe["adapter"]["method"], recipe["data"]["train"]["path"]) == ("SEQ_CLS", "lora", "train.csv")


def test_wrong_answers_are_told_why_and_asked_again(models_dir: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", label_rows(12))
    (tmp_path / "broken.jsonl").write_text("{\n")
    llama, bert = str(models_dir / "llama"), str(models_dir / "bert")
    answers = ["gone.jsonl", "broken.jsonl", "a.jsonl", "9", "1", "./gone", "8", bert, "lorra", "adaption_prompt", "IA3"]
    code, shown = talk(tmp_path, ["init", "new.yaml"], answers)
    assert code == 0, shown
    for words in (
        "Files of rows here: a.jsonl, broken.jsonl",
        "there is no file `gone.jsonl`",
        "broken.jsonl:1: holds one JSON document",
        "`9` is none of the numbers 1 to",
        "there is no folder `./gone`",
        "8 is none of the numbers 1 to",
        "no method is called `lorra`; did you mean `lora`?",
        "`adaption_prompt` does not work",
    ):
        assert words in shown
    assert llama not in shown
    recipe = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert (recipe["model"]["name_or_path"], recipe["adapter"]["method"]) == (bert, "ia3")


def test_columns_can_be_named_where_no_format_is_recognised(models_dir: Path, tmp_path: Path) -> None:
    rows = [{"a": number, "b": row["text"], "c": number + 0.5} for number, row in enumerate(label_rows(12))]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = ["init", "--data", "rows.jsonl", "--model", models_dir / "bert", "--method", "lora", "--task", "SEQ_CLS"]
    code, shown = talk(tmp_path, arguments, ["", "x", "a", "c", "b", "c"])
    assert code == 0, shown
    assert "no column is called `x`; there are: a, b, c; - for none" in shown
    assert "rows cannot be read: column `text` holds a number, not text\nOnce more:" in shown
    train = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["train"]
    assert (train["format"], train["columns"]) == ("classification", {"text": "b", "label": "c"})


def test_a_model_that_cannot_do_the_task_is_refused_and_no_rows_may_be_there_yet(models_dir: Path, tmp_path: Path) -> None:
    code, shown = talk(tmp_path, ["init"], ["", "NER", "causal_lm", str(models_dir / "bert"), "", ""])
    assert code == 0, shown
    assert "`NER` is none of the numbers 1 to 6 and no name of them" in shown
    assert "CAUSAL_LM needs a model that reads from left to right; `bert` models are encoders" in shown
    assert "there is no file `train.jsonl`" in shown


@pytest.mark.parametrize("answers", [[CTRL_C], ["rows.jsonl", "", CTRL_D], ["rows.jsonl", CTRL_C]])
def test_ctrl_c_and_the_end_of_the_input_leave_nothing(tmp_path: Path, answers: list[str]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", label_rows(12))
    code, shown = talk(tmp_path, ["init"], answers)
    assert code == 130
    assert "interrupted; nothing has been written" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_another_file_is_asked_for_where_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    arguments = ["init", "--task", "SEQ_CLS", "--method", "lora", "--model", "owner/name"]
    code, shown = talk(tmp_path, arguments, ["recipe.yaml", "", ""])
    assert code == 0, shown
    assert "recipe.yaml exists already" in shown
    assert ((tmp_path / "recipe.yaml").read_text(), (tmp_path / "recipe-2.yaml").exists()) == ("mine", True)
