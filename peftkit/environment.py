"""What a run was made with: versions, machine, what the machine decided, fingerprints; and how that differs from another's."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import DataError, LoadError, RecipeError
from peftkit.guides import RESUME
from peftkit.plan import Plan
from peftkit.resolved import resolved_yaml
from peftkit.run import Run, write_json, write_text

PACKAGES = ("peftkit", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")
# `--set some.api_key=abc` and `--set=some.api_key=abc`; a tokenizer is no secret.
_SECRET = re.compile(r"((?:token(?!izer)|key|secret|password)[\w.\-]*\s*=).*", re.IGNORECASE | re.DOTALL)


def environment(plan: Plan, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Versions, machine and what it decided, command line (secrets removed), fingerprints of data and model."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": plan.hardware.device_name,
        "num_processes": plan.hardware.num_processes,
        "git_commit": _git_commit(plan.recipe_dir),
        "argv": [_without_secret(argument) for argument in sys.argv],
        "fingerprints": fingerprints,
        "decided": {choice.key: choice.value for choice in plan.choices},
    }


def differences(was: Mapping[str, Any], now: Mapping[str, Any], *names: str) -> dict[str, str]:
    """How the named facts differ, by what `environment` calls them; the facts of a mapping count one by one."""
    found: dict[str, str] = {}
    for name in names:
        old, new = was.get(name), now.get(name)
        pairs = [(name, old, new)]
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
        found |= {key: f"was {before}, is {after}" for key, before, after in pairs if before != after}
    return found


def refuse_drift(path: Path, now: Mapping[str, Any]) -> None:
    """Refuse other packages, models or rows than a run's environment.json has recorded; `path` is that file or the run.

    Raises:
        RecipeError: with every difference, or where the file cannot be read.
    """
    file = path / "environment.json" if path.is_dir() else path
    try:
        was = json.loads(file.read_text(encoding="utf-8"))
        found = differences(was, now, "packages", "fingerprints")
    except (OSError, ValueError, AttributeError) as error:
        what = f"{file} is no environment.json that a run has written: {error}"
        raise RecipeError(f"--locked: {what}; name a run directory or such a file") from error
    if found:
        raise RecipeError(f"--locked: this is not what {file} has recorded:\n{_lines(found)}")


def begin(run: Run, plan: Plan, facts: Mapping[str, Any], *, resume: bool, force: bool) -> list[str]:
    """Write environment.json of a run that starts or goes on; returns what was forced, a line each.

    Raises:
        DataError: the rows are not those that the run has been trained on.
        LoadError: the model is not.
    """
    was = run.read_environment() if resume else {}
    found = differences(was, facts, "fingerprints") if was else {}
    if found and not force:
        text = f"--resume: {run.dir} has been trained on something else:\n{_lines(found)}\n`--force` goes on all the same"
        kind = DataError if any(key.startswith("data.") for key in found) else LoadError
        raise kind(text, guide=RESUME)
    changed = run.changes_of_recipe(plan) if resume and force else ""
    kept = {key: was[key] for key in ("initial_weights", "forced") if key in was}
    forced = [f"{key} {text}" for key, text in found.items()] + changed.splitlines()
    if forced:
        entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "was": run.identity, "changes": forced}
        kept["forced"] = [*kept.get("forced", []), entry]
    # The old identity is on record before anything changes: checkpoints that were written under it stay known.
    write_json(run.environment_path, {**facts, **kept})
    if changed:
        write_text(run.resolved_path, resolved_yaml(plan))
    return forced


def _lines(found: Mapping[str, str]) -> str:
    return "\n".join(f"  {key} {text}" for key, text in found.items())


def _git_commit(folder: Path) -> str | None:
    """The commit that the recipe's folder is at; None outside a repository or without git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _without_secret(argument: str) -> str:
    return _SECRET.sub(r"\1***", argument)
