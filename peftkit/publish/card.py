"""The model card: front matter for the hub, and what a reader needs to load the model and to trust it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import yaml

from peftkit import __version__
from peftkit.publish.subject import Published
from peftkit.recipe.paths import is_url, looks_local
from peftkit.report.facts import finite, mapping

# Of a local file nobody else can load the rows; the hub wants some name.
_LOCAL = "local"


def model_card(found: Published, repo_id: str) -> str:
    """The README.md of a published folder; nothing in it is a row, a path of this machine or its name."""
    summary = found.run.summary if found.run else {}
    environment = found.run.environment if found.run else {}
    return _template().render(
        header=_front_matter(found, repo_id).to_yaml().strip(),
        found=found,
        repo_id=repo_id,
        title=repo_id.rpartition("/")[2],
        head_options=_head_options(found),
        notes=list(_plain_notes(found)),
        license=found.base_card.get("license"),
        data=list(_data(found)),
        metrics=list(_metrics(found)),
        certificate=found.certificate,
        summary=summary,
        environment=environment,
        packages=mapping(environment.get("packages")),
        overrides=list(_overrides(found)),
        recipe=yaml.safe_dump(public(found.run.written), sort_keys=False, allow_unicode=True).strip() if found.run else "",
        version=__version__,
    )


@functools.cache
def _template() -> jinja2.Template:
    text = (Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)


def _front_matter(found: Published, repo_id: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    name = repo_id.rpartition("/")[2]
    sources = [source for _, source in _sources(found)]
    datasets = [source["path"] for source in sources if _is_on_hub(source)]
    shown, from_files = datasets[0] if datasets else _LOCAL, {split: names for split, names, _, _ in _data(found)}
    results = [
        EvalResult(found.task.pipeline_tag, shown, from_files.get(split, _LOCAL), metric, value, dataset_split=split)
        for split, metric, value, _ in _metrics(found)
    ]
    language = found.base_card.get("language")
    data = ModelCardData(
        base_model=found.base or None,
        library_name="transformers" if found.is_model else "peft",
        license=found.base_card.get("license") or "unknown",
        language=language if isinstance(language, str) else None,
        pipeline_tag=found.task.pipeline_tag,
        datasets=sorted(set(datasets)) or None,
        tags=["peftkit", found.facts["method"]],
        model_name=name if results else None,
        eval_results=results or None,
    )
    if found.base:
        data["base_model_relation"] = "finetune" if found.is_model else "adapter"
    return data


def _sources(found: Published) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(split, source) of all files and datasets that the recipe names."""
    data = mapping(found.run.resolved.get("data")) if found.run else {}
    for split in ("train", "validation", "test"):
        value = data.get(split)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, str):
                yield split, {"path": source}
            elif isinstance(source, dict) and source.get("path"):
                yield split, source


def _overrides(found: Published) -> Iterator[str]:
    """What `--set` put in place of keys of the recipe, from the command line that the run has recorded without secrets."""
    argv = [str(part) for part in (found.run.environment.get("argv") or [])] if found.run else []
    for part, following in pairwise([*argv, ""]):
        if part == "--set" or part.startswith("--set="):
            key, _, value = (following if part == "--set" else part.removeprefix("--set=")).partition("=")
            yield f"{key}={public(value)}"


def _is_on_hub(source: Mapping[str, Any]) -> bool:
    path = str(source["path"])
    return not is_url(path) and not looks_local(path) and path.count("/") == 1 and not Path(path).suffix


def _name_of(source: Mapping[str, Any]) -> str:
    """A hub dataset by its id, everything else by its last part: folders and hosts are nobody's business."""
    path = str(source["path"])
    return path if _is_on_hub(source) else urlsplit(path).path.rstrip("/").rpartition("/")[2]


def _data(found: Published) -> Iterator[tuple[str, str, Any, str]]:
    """(split, names, rows, fingerprint) of every split."""
    environment = found.run.environment if found.run else {}
    prints = mapping(environment.get("fingerprints"))
    for split, report in mapping(environment.get("rows")).items():
        names = ", ".join(dict.fromkeys(_name_of(source) for part, source in _sources(found) if part == split))
        yield split, names or "of the training rows", mapping(report).get("rows"), str(prints.get(f"data.{split}", ""))[:16]


def _metrics(found: Published) -> Iterator[tuple[str, str, float, float | None]]:
    """(split, metric, value, value before training) of test and validation rows; numbers alone."""
    summary = found.run.summary if found.run else {}
    before = mapping(summary.get("metrics_before"))
    for split in ("test", "validation"):
        for name, value in mapping(mapping(summary.get("metrics_by_split")).get(split)).items():
            if (number := finite(value)) is not None:
                yield split, name, number, finite(mapping(before.get(split)).get(name))


def _head_options(found: Published) -> str:
    """What the base's class must be told for its head to have the size of the trained one, and to name its classes."""
    encoding = mapping(found.facts.get("encoding"))
    labels = encoding.get("labels") or []
    options = [f"id2label=dict(enumerate({labels!r}))"] if found.task.has_labels and labels else []
    if found.task.has_labels and not labels and encoding.get("problem_type"):
        options.append("num_labels=1")
    if encoding.get("problem_type"):
        options.append(f'problem_type="{encoding["problem_type"]}"')
    return "".join(f", {option}" for option in options)


def _plain_notes(found: Published) -> Iterator[str]:
    """Where PEFT alone loads or computes something else (docs/adapters.md); peftkit does what training did."""
    method = found.method
    if found.is_model or method is None:
        return
    if method.virtual_tokens_in == "embeddings" and found.task.has_head:
        yield "PEFT lets the head read the virtual tokens too; in training it read those of the text alone."
    elif method.virtual_tokens_in == "embeddings":
        yield "PEFT generates something else for batches that are padded on the left."
    if method.linear_only:
        yield "On GPT-2, whose layers are Conv1D, this adapter is for the same model with Linear layers: PEFT refuses it there."
    if (found.folder / "head.safetensors").is_file():
        yield "The trained head is in `head.safetensors`, for which PEFT has no place: PEFT alone leaves the head random."
    if found.task.plain_note:
        yield found.task.plain_note


def public(value: Any) -> Any:
    """A value of a recipe or config, with paths of this machine cut to their last part and URLs to their place."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    if is_url(value):
        return f"{value.partition('://')[0]}://.../{_name_of({'path': value})}"
    is_path = value.startswith(("/", "~/", "file://")) or value[1:3] == ":\\"
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path and len(value) > 1 and " " not in value else value
