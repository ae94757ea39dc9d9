"""Rules about answers that are generated to be measured, and about the text that forgetting is measured on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from peftkit.recipe.findings import Finding, written
from peftkit.recipe.paths import FILE_SUFFIXES, data_suffix, find_path, places_text
from peftkit.recipe.schema import Recipe
from peftkit.tasks import TASKS
from peftkit.tasks.generations import INSTALL_HINT, PACKAGES, TOKENIZER_PACKAGES, AnswerSettings


def check_generation(recipe: Recipe, recipe_dir: Path) -> Iterator[Finding]:
    """Everything that is wrong with these keys of the section `evaluation`."""
    evaluation, names = recipe.evaluation, recipe.evaluation.generation_metrics
    if evaluation.forgetting is not None:
        yield from _forgetting(evaluation.forgetting, recipe_dir)
    if not TASKS[recipe.task].generates:
        return
    for key, what in check_answer_settings(answer_settings(recipe)):
        yield f"evaluation.{key}", what, 2
    if len(set(names)) < len(names):
        yield "evaluation.generation_metrics", "names a metric twice", 2
    if not names:
        for name in written(evaluation, "generation_rows"):
            yield f"evaluation.{name}", "has no effect without `generation_metrics`", 2


def answer_settings(recipe: Recipe) -> AnswerSettings:
    """What of generated answers a recipe has measured."""
    evaluation = recipe.evaluation
    return AnswerSettings(
        tuple(evaluation.generation_metrics),
        evaluation.answer_pattern,
        evaluation.bleu_tokenize,
        evaluation.triple_format,
        evaluation.triple_keys,
    )


def check_answer_settings(settings: AnswerSettings) -> Iterator[tuple[str, str]]:
    """Keys with what is wrong with them: packages that are missing, patterns, settings without effect."""
    for name in dict.fromkeys(PACKAGES[name] for name in settings.metrics if name in PACKAGES):
        if importlib.util.find_spec(name) is None:
            yield "generation_metrics", f"needs {name.replace('_', '-')}, which is not installed; {INSTALL_HINT}"
    if settings.bleu_tokenize != "13a" and "bleu" not in settings.metrics:
        yield "bleu_tokenize", "has no effect without `bleu` in `generation_metrics`"
    package = TOKENIZER_PACKAGES.get(settings.bleu_tokenize)
    if package is not None and importlib.util.find_spec(package) is None:
        what = f"`{settings.bleu_tokenize}` needs {package}, which is not installed"
        yield "bleu_tokenize", f"{what}; `pip install 'sacrebleu[{settings.bleu_tokenize[:2]}]'` adds it"
    if "answer" in settings.metrics and settings.answer_pattern is None:
        yield "answer_pattern", "is missing: `answer` compares what its group finds, such as `#### (.+)` for GSM8K"
    if settings.answer_pattern is not None:
        yield from _pattern(settings)
    yield from _triples(settings)


def _triples(settings: AnswerSettings) -> Iterator[tuple[str, str]]:
    stated = {"triple_format": settings.triple_format != "auto", "triple_keys": settings.triple_keys is not None}
    if "triples" not in settings.metrics:
        for key in [key for key, is_stated in stated.items() if is_stated]:
            yield key, "has no effect without `triples` in `generation_metrics`"
    elif settings.triple_keys is not None:
        if settings.triple_format in ("tuples", "lines"):
            yield "triple_keys", f"has no effect with `triple_format: {settings.triple_format}`, which has no keys"
        if len(set(settings.triple_keys)) < 3:
            yield "triple_keys", "names a key twice; it takes those of head, relation and tail"


def _pattern(settings: AnswerSettings) -> Iterator[tuple[str, str]]:
    pattern = settings.answer_pattern
    assert pattern is not None
    if "answer" not in settings.metrics:
        yield "answer_pattern", "has no effect without `answer` in `generation_metrics`"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield "answer_pattern", f"`{pattern}` is no regular expression: {error}"
        return
    if groups != 1:
        what = f"`{pattern}` has {groups} groups; the answer is what its one group finds, as in `#### (.+)`"
        yield "answer_pattern", what + (" (others can be written `(?:...)`)" if groups else "")


def _forgetting(name: str, recipe_dir: Path) -> Iterator[Finding]:
    path = find_path(name, recipe_dir)
    if path is None or not path.is_file():
        yield "evaluation.forgetting", f"there is no file `{name}` (looked in {places_text(recipe_dir)})", 3
    elif data_suffix(path.name) not in FILE_SUFFIXES:
        yield "evaluation.forgetting", f"`{name}` cannot be read; files that can end in {', '.join(FILE_SUFFIXES)}", 3
