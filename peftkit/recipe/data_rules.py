"""Rules about the rows: where they come from, and data settings that a task does not have or that would have no effect.

Sources carry their number in keys (`data.train.0.path`); the loader drops it where the recipe has no list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftkit.formats import FORMATS
from peftkit.recipe.findings import Finding, written
from peftkit.recipe.paths import (
    FILE_SUFFIXES,
    data_suffix,
    find_files,
    find_path,
    missing_package,
    places_text,
    saved_splits,
    source_kind,
    url_name,
)
from peftkit.recipe.schema import DataSection, Recipe, SourceSection
from peftkit.recipe.templates import template_fault
from peftkit.tasks import TASKS

Sources = Sequence[SourceSection]


def check_data(recipe: Recipe, data: DataSection, recipe_dir: Path) -> Iterator[Finding]:
    """Everything that is wrong with the section `data`."""
    yield from _task_settings(recipe, data)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    lists: dict[str, Sources] = {name: sources for name, sources in splits.items() if isinstance(sources, tuple)}
    for name, sources in lists.items():
        for number, source in enumerate(sources):
            yield from _source(recipe, f"data.{name}.{number}", source, recipe_dir)
        yield from _mixture(f"data.{name}", sources)
    if written(data, "stopping_strategy") and not any(source.weight for sources in lists.values() for source in sources):
        yield "data.stopping_strategy", "has no effect unless the sources of a list have `weight`", 2
    yield from _streams(recipe, data, lists)


def _task_settings(recipe: Recipe, data: DataSection) -> Iterator[Finding]:
    task = TASKS[recipe.task]
    if not task.train_on and "train_on" in data.model_fields_set:
        yield "data.train_on", f"has no effect for {task.name}", 2
    if not task.has_labels and data.labels is not None:
        yield "data.labels", f"has no effect for {task.name}", 2
    if data.labels is not None and len(set(data.labels)) != len(data.labels):
        yield "data.labels", "names a class twice", 2
    if data.labels is not None and len(data.labels) < 2:
        yield "data.labels", "a classifier needs at least two classes", 2
    if len(task.truncations) > 1 and data.truncation not in task.truncations:
        what = f"`{data.truncation}` is not for {task.name}; it takes {', '.join(task.truncations)}"
        yield "data.truncation", what, 2
    if not task.generates and data.system_prompt is not None:
        yield "data.system_prompt", f"has no effect for {task.name}", 2


def _source(recipe: Recipe, key: str, source: SourceSection, recipe_dir: Path) -> Iterator[Finding]:
    task = TASKS[recipe.task]
    item = FORMATS.get(source.format)
    if item is not None and not task.can_read(item.yields):
        good = [name for name, other in FORMATS.items() if task.can_read(other.yields)]
        yield f"{key}.format", f"{task.name} cannot learn from `{source.format}`; it can from {', '.join(good)}", 2
    for name, text in source.template.items():
        if fault := template_fault(text):
            yield f"{key}.template.{name}", f"is no Jinja template: {fault}", 2
    kind = source_kind(source, recipe_dir)
    if kind == "url":
        yield from _url(key, source.path)
    elif kind == "files":
        yield from _files(key, source.path, recipe_dir)
    elif kind == "saved":
        yield from _saved(key, source, recipe_dir)
    names = {"hub": (), "saved": ("config", "revision")}.get(kind, ("split", "config", "revision"))
    what = {"saved": "a saved dataset", "url": "a URL"}.get(kind, "files")
    for name in names:
        if getattr(source, name) is not None:
            yield f"{key}.{name}", f"has no effect for {what}; it belongs to datasets of the hub", 2


def _url(key: str, url: str) -> Iterator[Finding]:
    if package := missing_package(url):
        yield f"{key}.path", f"`{url.partition('://')[0]}://` needs a package; `pip install {package}` adds it", 2
    elif not _is_protocol(url.rpartition("::")[2].partition("://")[0]):
        yield f"{key}.path", f"fsspec knows no `{url.partition('://')[0]}://`; there are https, s3, gs, az, hf and others", 2
    # The path of any other protocol may be a folder.
    if url.startswith(("http://", "https://")) and data_suffix(url_name(url)) not in FILE_SUFFIXES:
        yield f"{key}.path", f"the name of the file must end in {', '.join(FILE_SUFFIXES)} (or .gz and such after it)", 2


def _is_protocol(name: str) -> bool:
    from fsspec.registry import known_implementations  # 0.1 s, where a recipe has URLs

    return name in known_implementations


def _files(key: str, path: str, recipe_dir: Path) -> Iterator[Finding]:
    files = find_files(path, recipe_dir)
    folder = find_path(path, recipe_dir)
    if not files and folder is not None and not os.access(folder, os.R_OK | os.X_OK):
        yield f"{key}.path", f"the folder `{path}` may not be looked into: permission denied", 3
    elif not files and folder is not None:
        yield f"{key}.path", f"the folder `{path}` has no file that ends in {', '.join(FILE_SUFFIXES)}", 3
    elif not files:
        yield f"{key}.path", f"there is no file `{path}` (looked in {places_text(recipe_dir)})", 3
    other = next((file.name for file in files if data_suffix(file.name) not in FILE_SUFFIXES), None)
    if other is not None:
        yield f"{key}.path", f"`{other}` cannot be read; files that can end in {', '.join(FILE_SUFFIXES)}", 3


def _saved(key: str, source: SourceSection, recipe_dir: Path) -> Iterator[Finding]:
    folder = find_path(source.path, recipe_dir)
    splits = saved_splits(folder) if folder is not None else ()
    if not splits and source.split is not None:
        yield f"{key}.split", "has no effect for a saved dataset without splits", 2
    elif splits and len(splits) > 1 and source.split is None:
        yield f"{key}.split", f"is missing: the saved dataset has the splits {', '.join(splits)}", 2
    elif splits and source.split is not None and source.split not in splits:
        yield f"{key}.split", f"the saved dataset has no split `{source.split}`; it has {', '.join(splits)}", 3


def _mixture(key: str, sources: Sources) -> Iterator[Finding]:
    weighted = [source.weight is not None for source in sources]
    if len(sources) == 1 and weighted[0]:
        yield f"{key}.0.weight", "has no effect on a single source; it shares rows out among several", 2
    elif any(weighted):
        for number, has_weight in enumerate(weighted):
            if not has_weight:
                yield f"{key}.{number}.weight", "is missing: other sources of the list have one; give it to all or to none", 2


def _streams(recipe: Recipe, data: DataSection, lists: dict[str, Sources]) -> Iterator[Finding]:
    for name in ("validation", "test"):
        for number, source in enumerate(lists.get(name, ())):
            if source.streaming:
                what = "streams are for training alone; `max_rows` limits what is read here"
                yield f"data.{name}.{number}.streaming", what, 2
    streaming = [source.streaming for source in data.train]
    if not any(streaming):
        for name in written(data, "audit_rows", "shuffle_buffer_size"):
            yield f"data.{name}", "has no effect unless `data.train` is a stream (`streaming: true`)", 2
        return
    if recipe.training.max_steps is None:
        yield "training.max_steps", "is missing: the rows of a stream are not counted, so the steps must be", 2
    if data.validation is not None and not isinstance(data.validation, tuple):
        what = "a fraction cannot be drawn from a stream; name a source of its own"
        yield "data.validation", what, 2
    if not all(streaming):
        number = streaming.index(False)
        yield f"data.train.{number}.streaming", "is missing: other sources of the list are streams; all of them or none", 2
