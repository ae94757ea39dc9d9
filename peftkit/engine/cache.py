"""Where tokenised rows are kept: a folder whose name is a hash of everything that they depend on, so that none can go stale."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import tokenizers
import transformers

import peftkit
from peftkit.engine.prepare import Model
from peftkit.engine.sources import content_fingerprint
from peftkit.plan import Plan
from peftkit.recipe.rules import stated_encoding

MAX_AGE_SECONDS = 30 * 24 * 3600


def cache_dir() -> Path:
    """The folder of all kept rows, beside the hub's own cache (`HF_HOME` moves both)."""
    return Path(huggingface_hub.constants.HF_HOME) / "peftkit" / "rows"


def prune() -> None:
    """Remove what has not been used for 30 days."""
    oldest = time.time() - MAX_AGE_SECONDS
    for path in cache_dir().glob("*"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def cache_key(plan: Plan, model: Model) -> str | None:
    """A hash of the rows' content, the recipe's part, the tokenizer, the model's facts and the versions; None for streams.

    Content is read, not dated: a file that was changed and changed back has its old key again.
    """
    recipe, data = plan.recipe, plan.recipe.data
    assert data is not None
    sources = [source for part in (data.train, data.validation, data.test) if isinstance(part, tuple) for source in part]
    contents = [content_fingerprint(source, plan.recipe_dir) for source in sources]
    if None in contents:
        return None
    draws = isinstance(data.validation, float) or any(source.weight for source in sources)
    tasks_field = plan.method.num_tasks_field
    parts: dict[str, Any] = {
        "contents": contents,
        "data": data.model_dump(mode="json", exclude={"cache", "packing"}),
        "task": recipe.task,
        "encoding": dataclasses.asdict(stated_encoding(recipe, data.max_length)),
        "num_tasks": getattr(recipe.adapter, tasks_field) if tasks_field else None,
        "seed": recipe.training.seed if draws else None,
        "model": [model.max_positions, model.kind, model.template_date],
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "versions": [peftkit.__version__, transformers.__version__, tokenizers.__version__, _code_fingerprint()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides on a tokenizer's output: its pieces, special tokens, template and settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = {name: repr(value) for name, value in sorted(tokenizer.init_kwargs.items())}
    parts = [type(tokenizer).__name__, pieces, tokenizer.special_tokens_map, tokenizer.chat_template, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _code_fingerprint() -> str:
    """A hash of our own code: a change of it may make other rows, whatever the version says."""
    digest = hashlib.sha256()
    for file in sorted(Path(peftkit.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
