"""Sources through the command line: whatever holds the rows, the model sees the same tokens."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import http.server
import io
import json
import lzma
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import instruction_rows, label_rows, question_rows, tag_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

Row = dict[str, Any]
ROWS = instruction_rows(12)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def recipe_for(models_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe of two steps on the rows of some sources."""

    def write(source: Any, task: str = "CAUSAL_LM", **data: Any) -> Path:
        return tiny_recipe(task, models_dir, tmp_path, data={"train": source} | data, training={"max_steps": 2})

    return write


def shown(recipe: Path, *arguments: Any) -> Row:
    """What `peftkit data --json` says of a recipe, with up to 1,000 rows."""
    result = run_cli("data", recipe, "--json", "--rows", 1000, *arguments)
    assert result.code == 0, result.err
    answer: Row = result.json
    return answer


def tokens(report: Row) -> list[list[list[int]]]:
    """Token ids and weights of every row."""
    return [[part for view in row["sequences"] for part in (view["input_ids"], view["weights"])] for row in report["rows"]]


def table(separator: str) -> bytes:
    """The rows as a table with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*ROWS[0]], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zipped() -> bytes:
    """The rows in a .zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return buffer.getvalue()


def columnar(kind: str) -> bytes:
    """The rows as a Parquet or Arrow file."""
    buffer, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        parquet.write_table(rows, buffer)
    else:
        with pyarrow.ipc.new_file(buffer, rows.schema) as writer:
            writer.write_table(rows)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "rows.csv": lambda: table(","),
    "rows.tsv": lambda: table("\t"),
    "rows.parquet": lambda: columnar("parquet"),
    "rows.arrow": lambda: columnar("arrow"),
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "rows.jsonl.bz2": lambda: bz2.compress(LINES),
    "rows.jsonl.xz": lambda: lzma.compress(LINES),
    "rows.jsonl.zst": lambda: pyarrow.compress(LINES, "zstd", asbytes=True),
    "rows.jsonl.zip": zipped,
    "rows.csv.gz": lambda: gzip.compress(table(",")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_kind_gives_the_same_tokens(recipe_for: Any, tmp_path: Path, name: str) -> None:
    expected = tokens(shown(recipe_for(str(write_jsonl(tmp_path / "plain.jsonl", ROWS)))))
    (tmp_path / name).write_bytes(FILES[name]())
    found = shown(recipe_for(name))
    assert tokens(found) == expected
    assert found["rows"][0]["row"].startswith(str(tmp_path / name))


def in_two_files(folder: Path) -> None:
    """The rows in two files of a folder, and something that is no data beside them."""
    (folder / "parts").mkdir()
    write_jsonl(folder / "parts/b.jsonl", ROWS[5:])
    write_jsonl(folder / "parts/a.jsonl", ROWS[:5])
    (folder / "parts/README.md").write_text("rows")


def saved(folder: Path) -> None:
    """The rows as a saved dataset, and as one of two splits."""
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"first": dataset, "other": dataset.select([0])}).save_to_disk(str(folder / "splits"))


def in_memory(folder: Path) -> None:
    """The rows behind a URL."""
    with fsspec.open("memory://bucket/rows.jsonl", "wb") as handle:
        handle.write(LINES)


def nested(folder: Path) -> None:
    """The rows with their columns deep inside."""
    rows = [{"task": {"text": row["instruction"]}, "answers": [{"value": row["output"]}]} for row in ROWS]
    write_jsonl(folder / "nested.jsonl", rows)


DOTS = {"instruction": "task.text", "output": "answers.0.value"}
PLACES: dict[str, tuple[Callable[[Path], None], Any]] = {
    "glob": (in_two_files, "parts/*.jsonl"),
    "folder": (in_two_files, "parts"),
    "list of files": (in_two_files, ["parts/a.jsonl", "parts/b.jsonl"]),
    "saved dataset": (saved, "saved"),
    "split of a saved dataset": (saved, {"path": "splits", "split": "first"}),
    "URL": (in_memory, "memory://bucket/rows.jsonl"),
    "columns with dots": (nested, {"path": "nested.jsonl", "columns": DOTS}),
    "templates": (nested, {"path": "nested.jsonl", "template": {ours: f"{{{{ {name} }}}}" for ours, name in DOTS.items()}}),
}


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_every_place_are_trained_on_alike(recipe_for: Any, tmp_path: Path, place: str) -> None:
    write, source = PLACES[place]
    write(tmp_path)
    expected = tokens(shown(recipe_for(str(write_jsonl(tmp_path / "plain.jsonl", ROWS)))))
    recipe = recipe_for(source)
    assert tokens(shown(recipe)) == expected
    train(recipe, tmp_path / "run")
    plain = train(recipe_for(str(tmp_path / "plain.jsonl")), tmp_path / "plain")
    assert plain["certificate"]["passed"]
    facts = [json.loads((tmp_path / name / "environment.json").read_text())["fingerprints"] for name in ("run", "plain")]
    assert facts[0]["data.train"] == facts[1]["data.train"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the test's folder."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def test_rows_come_over_http_and_are_kept_until_they_change(recipe_for: Any, tmp_path: Path, server: str) -> None:
    write_jsonl(tmp_path / "plain.jsonl", ROWS)
    recipe = recipe_for(f"{server}/plain.jsonl")
    first = shown(recipe)
    assert (first["cached"], first["splits"]["train"]["rows"]) == (False, 12)
    assert shown(recipe)["cached"]
    write_jsonl(tmp_path / "plain.jsonl", ROWS[:11])
    assert (shown(recipe)["cached"], shown(recipe)["splits"]["train"]["rows"]) == (False, 11)


def conll(rows: list[Row]) -> bytes:
    """Rows of words and tags as a CoNLL file."""
    sentences = ["".join(f"{word} _ {tag}\n" for word, tag in zip(row["tokens"], row["tags"], strict=True)) for row in rows]
    return "\n".join(sentences).encode()


def squad(rows: list[Row]) -> bytes:
    """Questions as nested SQuAD JSON."""
    paragraphs = []
    for number, row in enumerate(rows):
        found = row["answers"]
        answers = [
            {"text": text, "answer_start": start} for text, start in zip(found["text"], found["answer_start"], strict=True)
        ]
        question = {"id": str(number), "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": row["context"], "qas": [question]})
    return json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}).encode()


@pytest.mark.parametrize(
    ("task", "rows", "name", "content"),
    [
        ("TOKEN_CLS", tag_rows(12), "rows.conll", conll(tag_rows(12))),
        ("QUESTION_ANS", question_rows(8), "rows.json", squad(question_rows(8))),
        ("CAUSAL_LM", [{"text": "the cat sat"}, {"text": "two birds"}], "rows.txt", b"the cat sat\n\ntwo birds\n"),
    ],
    ids=["conll", "squad", "txt"],
)
def test_layouts_of_a_task_give_the_tokens_of_its_rows(
    recipe_for: Any, tmp_path: Path, task: str, rows: list[Row], name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    expected = shown(recipe_for(str(write_jsonl(tmp_path / "plain.jsonl", rows)), task))
    found = shown(recipe_for(name, task))
    assert (tokens(found), found["classes"]) == (tokens(expected), expected["classes"])
    assert train(recipe_for(name, task), tmp_path / "run")["certificate"]["passed"]


def test_max_rows_takes_the_first_rows_of_all_files_of_a_source(recipe_for: Any, tmp_path: Path) -> None:
    in_two_files(tmp_path)
    found = shown(recipe_for({"path": "parts", "max_rows": 7}))
    assert Counter(Path(row["row"]).name[0] for row in found["rows"]) == {"a": 5, "b": 2}


def test_a_validation_fraction_has_every_label_in_its_share(recipe_for: Any, tmp_path: Path) -> None:
    rows = [row | {"label": "rare" if place % 5 == 0 else "common"} for place, row in enumerate(label_rows(100))]
    found = shown(recipe_for(str(write_jsonl(tmp_path / "plain.jsonl", rows)), "SEQ_CLS", validation=0.25))
    assert found["classes"] == {"train": {"common": 60, "rare": 15}, "validation": {"common": 20, "rare": 5}}


def test_several_sources_validate_together(recipe_for: Any, tmp_path: Path) -> None:
    in_two_files(tmp_path)
    write_jsonl(tmp_path / "plain.jsonl", instruction_rows(30)[20:])
    recipe = recipe_for("plain.jsonl", validation=["parts/a.jsonl", {"path": "parts/b.jsonl", "max_rows": 3}])
    assert shown(recipe)["splits"]["validation"]["rows"] == 8
    assert train(recipe, tmp_path / "run")["metrics"]["loss"] > 0


def test_train_drops_a_bad_row_and_lists_it(recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(LINES + b'{"instruction": "a", "output": " "}\n{"instruction": "cut')
    summary = train(recipe_for("plain.jsonl", on_bad_row="drop"), tmp_path / "run")
    assert summary["global_step"] == 2
    report = (tmp_path / "run/data_report.jsonl").read_text().splitlines()
    found = [(line["kind"], line["row"], line["split"]) for line in map(json.loads, report)]
    file = str(tmp_path / "plain.jsonl")
    assert found == [("bad_row", f"{file}:13", "train"), ("bad_row", f"{file}:14", "train")]
