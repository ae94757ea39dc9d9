"""TRL's rows: data sets of the hub or of this machine, mixtures of them, and what is learned of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.migration.base import Draft, Note
from peftkit.migration.places import find_place
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.paths import source_kind
from peftkit.recipe.schema import SourceSection

LEARNED = (
    "of rows with prompt and completion the completion is learned, there and here; of `messages` every token there, and the "
    "answers here: `all` is every token"
)
LONGER = "rows that are longer are cut in silence there and are an error here; `data.truncation: right` cuts them"
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
READ_OF_DATASET = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
_ONE = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
_SEVERAL = ("streaming", "test_split_size")


def read_data(draft: Draft) -> None:
    """Everything about rows."""
    if draft.get("datasets"):
        _mixture(draft)
        _leave(draft, (*_ONE, *_SEVERAL), "has no effect beside `datasets`")
    elif draft.get("dataset_name") is None:
        draft.refuse("dataset_name", "is missing: the rows to train on")
    else:
        _dataset(draft, str(draft.get("dataset_name")))
        _leave(draft, (*_ONE, *_SEVERAL), "has no effect on these rows")
    _text_field(draft)
    _learned(draft)
    _length(draft)


def _leave(draft: Draft, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key not in draft.notes:
            draft.drop(key, why)


def _dataset(draft: Draft, name: str) -> None:
    """One data set: rows of its train split, and of its test split where they are evaluated."""
    path = draft.place(name)
    splits = [str(draft.get(f"dataset_{part}_split", part)) for part in ("train", "test")]
    if source_kind(SourceSection(path=path), draft.recipe_dir) == "files":
        sources = [{"path": _file_of_split(path, split, draft)} for split in splits]
        keys: tuple[str, ...] = ("dataset_name",)
    else:
        config = {"config": draft.get("dataset_config")} if draft.get("dataset_config") else {}
        sources = [{"path": path} | config | ({"split": split} if split != "train" else {}) for split in splits]
        keys = ("dataset_name", "dataset_config", "dataset_train_split")
    streams = draft.is_on("dataset_streaming")
    train = sources[0] | ({"streaming": True} if streams else {})
    draft.put("data.train", train, *keys, *(("dataset_streaming",) if streams else ()))
    is_evaluated = draft.get("eval_strategy", draft.get("evaluation_strategy", "no")) not in ("no", False)
    if is_evaluated and sources[1] != sources[0]:
        draft.put("data.validation", sources[1], "dataset_test_split", "dataset_name")


def _file_of_split(path: str, split: str, draft: Draft) -> str:
    """The file of a split in a folder, as `datasets` finds it by name; a file itself has no splits."""
    folder = find_place(path, draft.recipe_dir)
    if folder is None or not folder.is_dir():
        return path
    files = [file.name for file in folder.iterdir() if file.is_file() and file.name.lower().startswith(split)]
    return f"{path}/{files[0]}" if len(files) == 1 else path


def _mixture(draft: Draft) -> None:
    items = draft.get("datasets")
    if not isinstance(items, list) or any(not isinstance(item, dict) or not item.get("path") for item in items):
        draft.refuse("datasets", "is a list of data sets, each with a `path`; the one here is not")
        return
    streams = ("streaming",) if draft.is_on("streaming") else ()
    sources = [_source(draft, item) | ({"streaming": True} if streams else {}) for item in items]
    parts = any(item.get("fraction") for item in items)
    why = "`fraction` takes a part of the rows there; `max_rows` does here" if parts else ""
    draft.put("data.train", sources[0] if len(sources) == 1 else sources, "datasets", *streams, why=why)
    size = draft.get("test_split_size")
    if isinstance(size, float) and 0 < size < 1:
        draft.put("data.validation", size, "test_split_size")


def _source(draft: Draft, item: Mapping[str, Any]) -> dict[str, Any]:
    for name in [name for name in item if name not in READ_OF_DATASET]:
        why = did_you_mean(name, READ_OF_DATASET).removeprefix("; ") or "no such key"
        draft.notes[f"datasets.{name}"] = Note(f"datasets.{name}", "unknown", "", why)
    if item.get("columns"):
        draft.notes["datasets.columns"] = Note("datasets.columns", "ignored", "", "a format reads the columns that it knows")
    path, files = str(item["path"]), item.get("data_files")
    if path in _BUILDERS and isinstance(files, str):
        path = files
    elif files or item.get("data_dir"):
        draft.refuse("datasets", f"`{path}` has data_files or data_dir; name the file itself by `path`")
    made = {"path": draft.place(path)}
    if source_kind(SourceSection(path=made["path"]), draft.recipe_dir) == "hub":
        split = {} if item.get("split") in (None, "train") else {"split": str(item["split"])}
        made |= split | ({"config": str(item["name"])} if item.get("name") else {})
    return made


def _text_field(draft: Draft) -> None:
    name, train = draft.get("dataset_text_field"), draft.value("data.train")
    if name in (None, "text") or not isinstance(train, dict):
        draft.drop(
            "dataset_text_field", "is what the format `text` reads" if name == "text" else "name the column in data.train"
        )
        return
    source = train | {"columns": {"text": str(name)}, "format": "text"}
    draft.put("data.train", source, "dataset_text_field", *draft.entries["data.train"].keys)


def _learned(draft: Draft) -> None:
    if draft.is_on("assistant_only_loss"):
        draft.put("data.train_on", "assistant", "assistant_only_loss")
        draft.drop("completion_only_loss", "has no effect beside assistant_only_loss")
        return
    draft.drop("assistant_only_loss", "is off")
    if draft.get("completion_only_loss") is not None:
        draft.put("data.train_on", "completion" if draft.is_on("completion_only_loss") else "all", "completion_only_loss")
    draft.add("data.train_on", "completion", LEARNED)


def _length(draft: Draft) -> None:
    key = "max_length" if "max_length" in draft.config.values else "max_seq_length"
    mode = draft.get("truncation_mode")
    if draft.get(key) is not None:
        draft.put("data.max_length", draft.get(key), key, why="" if mode else LONGER)
    else:
        draft.drop(key, "no limit there; here rows over 1024 tokens stop the run, which says what length would do", "changed")
    if mode is not None:
        draft.put("data.truncation", {"keep_start": "right", "keep_end": "left"}.get(str(mode), mode), "truncation_mode")
    if draft.is_on("packing"):
        why = "packed rows never see each other here, and batch_size counts rows, not sequences of many rows"
        draft.put("data.packing", True, "packing", why=why)
    else:
        draft.drop("packing", "`data.packing: auto` lays rows end to end where that changes nothing but speed")
