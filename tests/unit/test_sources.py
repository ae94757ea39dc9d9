"""Sources: where rows come from, what becomes of their columns, how several are mixed, and what tells that they changed."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from peftkit.engine.remote import hub_rows
from peftkit.engine.sources import content_fingerprint, mixed, read_rows, sound_rows
from peftkit.errors import DataError
from peftkit.formats.base import RowError
from peftkit.reading.columns import computed_columns
from peftkit.recipe.paths import shown_url
from peftkit.recipe.schema import SourceSection
from tests.conftest import write_jsonl
from tests.unit.test_readers import SOUND

ROWS = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def read(path: str, folder: Path = Path(), **source: Any) -> list[tuple[str, Any]]:
    """All rows of a source, each of which can be read."""
    return sound_rows(read_rows(SourceSection(path=path, **source), folder))


def texts(path: str, folder: Path = Path(), **source: Any) -> str:
    """The texts of its rows."""
    return "".join(row["text"] for _, row in read(path, folder, **source))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `rows` with two data files and others."""
    (tmp_path / "rows" / "inner").mkdir(parents=True)
    write_jsonl(tmp_path / "rows" / "b.jsonl", [{"text": "b"}])
    (tmp_path / "rows" / "a.csv").write_text("text\na\n")
    write_jsonl(tmp_path / "rows" / "inner" / "c.jsonl", [{"text": "c"}])
    for name in ("README.md", ".hidden.jsonl"):
        (tmp_path / "rows" / name).write_text("no rows")
    return tmp_path


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, with rows in it."""
    system = fsspec.filesystem("memory")
    for name in "ba":
        system.pipe_file(f"/bucket/{name}.jsonl", json.dumps({"text": name}).encode())
    system.pipe_file("/bucket/notes.md", b"no rows")
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of a server of the folder's files."""
    pytest.importorskip("aiohttp")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Stay silent."""

    handler = functools.partial(Handler, directory=str(folder / "rows"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset of two splits, saved by `datasets`, with named labels."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    names = ClassLabel(names=["bad", "good"])
    features = Features({"text": Value("string"), "label": names, "tags": List(names)})
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}
    dataset = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [("rows", "ab"), ("rows/*.jsonl", "b"), ("rows/**/*.jsonl", "bc"), ("rows/a.csv", "a"), ("./rows", "ab")],
)
def test_a_path_names_a_file_a_folder_or_files_by_a_glob(folder: Path, path: str, found: str) -> None:
    assert texts(path, folder) == found


def test_a_file_url_is_a_path(folder: Path) -> None:
    assert texts(f"file://{folder}/rows/a.csv") == "a"


@pytest.mark.parametrize("path", ["gone.jsonl", "rows/inner/*.csv", "rows/none"])
def test_a_path_without_files_is_refused(folder: Path, path: str) -> None:
    (folder / "rows" / "none").mkdir()
    with pytest.raises(DataError, match="there is no data file at `"):
        read(path, folder)


def test_max_rows_counts_bad_rows_and_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a"}, 3, {"text": "b"}, oops')
    rows = list(read_rows(SourceSection(path="rows.json", max_rows=3), tmp_path))
    assert [type(row) for _, row in rows] == [dict, RowError, dict]


def test_rows_that_cannot_be_read_are_counted_and_the_first_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("x\n" * 7)
    with pytest.raises(DataError, match=r"^7 rows that cannot be read:\n(.*rows\.jsonl:\d: .*\n){5}  \.\.\. and 2 more$"):
        read("rows.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("path", "found"), [("memory://bucket/a.jsonl", "a"), ("memory://bucket", "ab"), ("memory://bucket/*.jsonl", "ab")]
)
@pytest.mark.usefixtures("memory")
def test_a_url_names_a_file_a_folder_or_files_by_a_glob(path: str, found: str) -> None:
    assert texts(path) == found


@pytest.mark.usefixtures("memory")
def test_rows_behind_a_url_are_named_by_it() -> None:
    assert read("memory://bucket/a.jsonl") == [("memory://bucket/a.jsonl:1", {"text": "a"})]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:key@host:8/a/b.csv?token=key", "https://host:8/a/b.csv"),
        ("https://key@host/b.csv", "https://host/b.csv"),
        ("abfs://container@account/b.csv", "abfs://container@account/b.csv"),
        ("ftp://user:key@host/b.csv", "ftp://host/b.csv"),
        ("zip://a?.csv::https://host/b.zip?token=key", "zip://a?.csv::https://host/b.zip"),
        ("s3://bucket/what?.csv", "s3://bucket/what?.csv"),
    ],
)
def test_messages_name_a_url_without_its_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize("path", ["memory://bucket/gone.jsonl", "memory://empty/*.jsonl"])
@pytest.mark.usefixtures("memory")
def test_a_url_without_files_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"there is no (data )?file at memory://"):
        read(path)


def test_rows_are_read_over_http(server: str) -> None:
    assert read(f"{server}/b.jsonl?token=secret") == [(f"{server}/b.jsonl:1", {"text": "b"})]


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "gzip", "zip", "zstd", "arrow in zstd"])
def test_column_files_and_compressed_ones_are_read_over_http(server: str, folder: Path, kind: str) -> None:
    name, content, _ = SOUND[kind]
    (folder / "rows" / name).write_bytes(content)
    assert [row["label"] for _, row in read(f"{server}/{name}")] == ["x", "y"]


def test_a_file_larger_than_what_is_fetched_at_once_is_read_over_http(server: str, folder: Path) -> None:
    write_jsonl(folder / "rows" / "large.jsonl", [{"text": "x" * 1000}] * 12_000)
    assert len(read(f"{server}/large.jsonl")) == 12_000


def test_a_download_that_breaks_off_is_refused(server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def send_half(self: Any, source: Any, output: Any) -> None:
        output.write(source.read(5))

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", send_half)
    with pytest.raises(DataError, match=r"/b\.jsonl cannot be read: "):
        read(f"{server}/b.jsonl")


def test_a_server_that_cannot_be_reached_is_named_without_secrets(server: str) -> None:
    with pytest.raises(DataError, match=r"^there is no file at http://127\.0\.0\.1:\d+/gone\.jsonl, or its server"):
        read(f"{server.replace('//', '//user:secret@')}/gone.jsonl?key=secret")


def test_a_url_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^s3://bucket/a\.jsonl needs a package .* `pip install s3fs` adds it$"):
        read("s3://bucket/a.jsonl")


def test_a_saved_dataset_gives_its_split_with_labels_by_name(saved: Path) -> None:
    assert read("saved", saved, split="train") == [
        ("saved[train]:1", {"text": "a", "label": "good", "tags": ["bad", "good"]}),
        ("saved[train]:2", {"text": "b", "label": None, "tags": []}),
    ]


def test_one_split_of_a_saved_dataset_is_a_dataset_too(saved: Path) -> None:
    assert [origin for origin, _ in read("saved/test", saved)] == ["saved/test:1"]


@pytest.mark.parametrize(("split", "words"), [(None, "needs `split`; it has train, test"), ("dev", "no split `dev`; it has")])
def test_a_split_that_a_saved_dataset_has_not_is_refused(saved: Path, split: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read("saved", saved, split=split)


def test_a_damaged_saved_dataset_is_refused(saved: Path) -> None:
    (saved / "saved" / "train" / "data-00000-of-00001.arrow").write_bytes(b"rows")
    with pytest.raises(DataError, match=r"the saved dataset .* cannot be read: "):
        read("saved", saved, split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_loaded_by_the_hub_client(folder: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    write_jsonl(folder / "rows" / "inner" / "c.jsonl", ROWS)
    found = list(hub_rows(SourceSection(path=str(folder / "rows" / "inner"), streaming=streaming)))
    assert found == [(f"{folder}/rows/inner[train]:{number}", row) for number, row in enumerate(ROWS, 1)]


def test_of_a_dataset_with_a_script_the_parquet_files_of_the_hub_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        calls.append((path, options.get("data_files")))
        if path != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found raft.py")
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read("ought/raft", config="tweets", split="train[:10]") == [("ought/raft[train[:10]]:1", {"text": "a"})]
    files = "hf://datasets/ought/raft@refs/convert/parquet/tweets/train/*.parquet"
    assert calls == [("ought/raft", None), ("parquet", {"train": files})]
    with pytest.raises(DataError, match=r"`ought/raft` cannot be loaded: Dataset scripts are no longer supported"):
        read("ought/raft", revision="v1")


def test_a_dataset_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match=r"^the dataset `no-such/rows` cannot be loaded: "):
        read("no-such/rows")


COLUMNS = {"a.b": 1, "answers": [{"text": "x"}], "meta": {"id": 7}, "none": None}


@pytest.mark.parametrize(
    ("theirs", "value"),
    [("a.b", 1), ("answers.0.text", "x"), ("meta.id", 7), ("meta", {"id": 7}), ("none", None)],
)
def test_a_column_is_found_by_its_name_or_by_dots_that_lead_inwards(theirs: str, value: Any) -> None:
    assert computed_columns(COLUMNS, {"ours": theirs}, {}) == COLUMNS | {"ours": value}


@pytest.mark.parametrize("theirs", ["gone", "answers.1.text", "answers.x", "meta.id.more", "answers.0.text.0", "none.x"])
def test_a_column_that_is_not_there_is_named(theirs: str) -> None:
    with pytest.raises(RowError, match=rf"^no column `{theirs}`.* \(from `columns`\); the row has `a\.b`, `answers`"):
        computed_columns(COLUMNS, {"ours": theirs}, {})


def test_a_template_is_filled_with_the_row_and_its_renamed_columns() -> None:
    template = {"prompt": "Q: {{ question }}{% if extra %} ({{ extra }}){% endif %}\n", "completion": " {{ answers[0] }}"}
    row = {"q": "who?", "extra": "", "answers": ["tom"]}
    found = computed_columns(row, {"question": "q"}, template)
    assert found == row | {"question": "who?", "prompt": "Q: who?\n", "completion": " tom"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ gone }}", "template `text`: 'gone' is undefined; the row has `q`"),
        ("{{ none }}", "a value is null"),
        ("{{ q.__class__.__mro__ }}", "is unsafe"),
        ("{{ q / 0 }}", "template `text` fails: TypeError"),
        ("{{ rows.append(1) }}", "template `text` fails: SecurityError: "),
        ("{{ range(10000000) }}", "OverflowError"),
    ],
)
def test_a_template_that_fails_on_a_row_is_an_error_of_that_row(text: str, words: str) -> None:
    with pytest.raises(RowError, match=words):
        computed_columns({"q": "a", "none": None, "rows": []}, {}, {"text": text})


def test_columns_that_are_only_there_in_training_may_be_missing_at_inference() -> None:
    columns, template = {"question": "q", "answer": "a"}, {"prompt": "Q: {{ question }}", "completion": "{{ answer }}"}
    found = computed_columns({"q": "who?"}, columns, template, partial=True)
    assert found == {"q": "who?", "question": "who?", "prompt": "Q: who?"}


def drawn(
    counts: list[int], weights: list[float] | None, strategy: str = "all_exhausted", seed: int = 0
) -> list[tuple[int, int]]:
    """The items that a mixture of ranges of these lengths gives."""
    return list(mixed([functools.partial(iter, range(count)) for count in counts], weights, strategy, seed))


def test_sources_without_weights_follow_each_other() -> None:
    assert drawn([2, 1], None) == [(0, 0), (0, 1), (1, 0)]


def test_a_mixture_is_drawn_by_the_seed() -> None:
    assert drawn([50, 50], [1, 1]) == drawn([50, 50], [1, 1]) != drawn([50, 50], [1, 1], seed=1)


def test_a_mixture_has_the_shares_of_its_weights() -> None:
    openers = [functools.partial(iter, range(10**6))] * 2
    counts = Counter(index for index, _ in islice(mixed(openers, [3, 1], "first_exhausted", 0), 10_000))
    assert counts[0] / 10_000 == pytest.approx(0.75, abs=0.02)


def test_first_exhausted_ends_with_the_first_source_and_repeats_nothing() -> None:
    found = drawn([5, 500], [1, 1], "first_exhausted")
    assert [item for index, item in found if index == 0] == [0, 1, 2, 3, 4]
    assert [item for index, item in found if index == 1] == list(range(len(found) - 5))


def test_all_exhausted_starts_sources_over_until_each_has_been_through() -> None:
    found = drawn([3, 100], [1, 1])
    first, second = ([item for index, item in found if index == part] for part in (0, 1))
    assert second == list(range(100))
    assert first == [number % 3 for number in range(len(first))]
    assert len(first) > 30


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_a_source_without_rows_ends_the_mixture_with_an_error(weights: list[float] | None, strategy: str) -> None:
    with pytest.raises(DataError, match="source 2 of the mixture has no rows"):
        drawn([3, 0], weights, strategy)


def fingerprint(path: str, folder: Path = Path(), **source: Any) -> str | None:
    """The content fingerprint of a source."""
    return content_fingerprint(SourceSection(path=path, **source), folder)


@pytest.mark.parametrize(
    "other",
    [{"columns": {"text": "a"}}, {"template": "{{ text }}"}, {"max_rows": 1}, {"format": "text"}],
    ids=lambda other: next(iter(other)),
)
def test_a_fingerprint_changes_with_what_decides_on_the_rows(folder: Path, other: dict[str, Any]) -> None:
    assert fingerprint("rows", folder, **other) != fingerprint("rows", folder) == fingerprint("rows", folder, weight=2)


def test_a_fingerprint_changes_with_a_byte_of_a_file(folder: Path) -> None:
    before = fingerprint("rows", folder)
    (folder / "rows" / "a.csv").write_text("text\nA\n")
    assert fingerprint("rows", folder) != before


def test_a_fingerprint_changes_with_a_file_more(folder: Path) -> None:
    before = fingerprint("rows", folder)
    write_jsonl(folder / "rows" / "c.jsonl", ROWS)
    assert fingerprint("rows", folder) != before


def test_a_fingerprint_changes_with_what_is_behind_a_url(memory: Any) -> None:
    before = fingerprint("memory://bucket/a.jsonl")
    assert before == fingerprint("memory://bucket/a.jsonl") is not None
    memory.pipe_file("/bucket/a.jsonl", json.dumps({"text": "A"}).encode())
    assert fingerprint("memory://bucket/a.jsonl") != before


def test_a_fingerprint_over_http_is_that_of_the_servers_date(server: str, folder: Path) -> None:
    before = fingerprint(f"{server}/b.jsonl")
    assert before == fingerprint(f"{server}/b.jsonl") is not None
    os.utime(folder / "rows" / "b.jsonl", (1, 1))
    assert fingerprint(f"{server}/b.jsonl") != before


def test_a_server_that_says_nothing_of_its_files_gives_no_fingerprint(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "date_time_string", lambda *arguments: "")
    assert fingerprint(f"{server}/b.jsonl") is None


def test_splits_of_a_saved_dataset_have_fingerprints_of_their_own(saved: Path) -> None:
    train, test = (fingerprint("saved", saved, split=split) for split in ("train", "test"))
    assert train != test
    assert train == fingerprint("saved", saved, split="train")


def test_a_stream_has_no_fingerprint(folder: Path) -> None:
    assert fingerprint("rows", folder, streaming=True) is None
