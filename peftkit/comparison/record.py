"""compare.json as it grows: every trial with its state, written whenever one changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.comparison import result as results
from peftkit.comparison.file import Experiment, top_key
from peftkit.comparison.peft_layout import peft_result
from peftkit.comparison.trials import Trial, exit_code_of, figures, state_after
from peftkit.comparison.variants import Variant, list_seeds
from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe
from peftkit.run import Run, write_json
from peftkit.tasks import TASKS

TRIALS = "trials"


@dataclass
class Record:
    """A comparison's directory and what is known so far.

    Attributes:
        root: the directory.
        result: the content of compare.json.
    """

    root: Path
    result: dict[str, Any]

    @classmethod
    def begin(cls, root: Path, loaded: LoadedRecipe, experiment: Experiment) -> Record:
        """The record of a directory: what a comparison that was stopped has left there, or a new one.

        Raises:
            RecipeError: what is there belongs to another recipe.
        """
        digest = hashlib.sha256(loaded.text.encode()).hexdigest()
        path = root / results.FILE
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["recipe_sha256"] != digest:
                raise RecipeError(f"--resume: {loaded.path} has changed since {root} was begun; name a new folder")
            return cls(root, found)
        budget = experiment.budget.model_dump(exclude_none=True) if experiment.budget is not None else None
        facts = {
            "kind": top_key(type(experiment)),
            "name": experiment.name or loaded.recipe.name,
            "recipe": str(loaded.path),
            "recipe_sha256": digest,
            "task": loaded.recipe.task,
            "metric": experiment.metric,
            "greater_is_better": None,
            "split": None,
            "budget": budget,
            "seeds": list_seeds(experiment.seeds, loaded.recipe.training.seed),
            "interval": results.INTERVAL,
            "pareto_over": list(results.PARETO),
            "notes": [],
        }
        return cls(root, facts | {"variants": []})

    @property
    def variants(self) -> list[dict[str, Any]]:
        """The variants' entries."""
        found: list[dict[str, Any]] = self.result["variants"]
        return found

    def decide_metric(self, default: str, split: str) -> None:
        """Settle what is compared, on which rows."""
        self.result["metric"] = self.result["metric"] or default
        self.result["split"] = split
        self.result["greater_is_better"] = TASKS[self.result["task"]].metrics[self.result["metric"]]
        self.result["pareto_over"] = [self.result["metric"], *results.PARETO]

    def add(self, variant: Variant, facts: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """Enter a variant with all its trials to come; its entry."""
        trials = [_pending(seed, f"{TRIALS}/{variant.name}/seed-{seed}") for seed in seeds]
        entry = dataclasses.asdict(variant) | dict(facts) | {"trials": trials, "summary": {}, "pareto": False}
        self.variants.append(entry)
        return entry

    def refuse(self, name: str, reason: str, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Enter a variant that cannot work; its entry, with one trial of the state `refused`."""
        trial = _pending(self.result["seeds"][0], f"{TRIALS}/{name}") | {"state": "refused", "exit_code": 2, "error": reason}
        facts = {"name": name, "method": stated.get("adapter.method"), "overrides": dict(stated), "stated": dict(stated)}
        entry = facts | {"learning_rate": None, "learning_rate_source": None, "steps": {}, "size_note": ""}
        self.variants.append(entry | {"trials": [trial], "summary": {}, "pareto": False})
        return self.variants[-1]

    def open_again(self, *, retry_failed: bool) -> None:
        """Take up trials where a process that is gone has left them."""
        for trial in self.trials():
            if Run(self.root / trial["run_dir"]).read_status().get("state") == "done" and trial["state"] != "done":
                self._take_figures(trial)
            elif trial["state"] == "running" or (trial["state"] == "failed" and retry_failed):
                trial.update(state="pending", exit_code=None, error=None)

    def trials(self) -> Iterator[dict[str, Any]]:
        """Entries of all trials that can be run, seed by seed: every variant has one figure before any has two."""
        for seed in self.result["seeds"]:
            trials = [trial for variant in self.variants for trial in variant["trials"] if trial["seed"] == seed]
            yield from (trial for trial in trials if trial["state"] != "refused")

    def variant_of(self, trial: Trial) -> dict[str, Any]:
        """The entry of a trial's variant."""
        return next(variant for variant in self.variants if variant["name"] == trial.variant)

    def entry_of(self, trial: Trial) -> dict[str, Any]:
        """A trial's entry."""
        return next(entry for entry in self.variant_of(trial)["trials"] if entry["seed"] == trial.seed)

    def start(self, trial: Trial) -> None:
        """Note that a trial has begun."""
        self.entry_of(trial)["state"] = "running"
        self.write()

    def end(self, trial: Trial, code: int, seconds: float) -> dict[str, Any]:
        """Note how a trial has ended; its entry."""
        entry = self.entry_of(trial)
        entry |= {"state": state_after(code), "exit_code": exit_code_of(code), "error": trial.error(code) if code else None}
        entry["total_seconds"] = round(entry["total_seconds"] + seconds, 1)
        if entry["state"] == "done":
            self._take_figures(entry)
        self.write()
        return entry

    def _take_figures(self, entry: dict[str, Any]) -> None:
        run = Run(self.root / entry["run_dir"])
        entry |= {"state": "done", "exit_code": 0, "error": None} | figures(run, self.result["split"])
        variant = next(variant for variant in self.variants if entry in variant["trials"])
        if self.result["kind"] == "compare":
            name = f"{variant['name']}-seed-{entry['seed']}"
            layout = peft_result(run, entry, f"{variant['method']}/{name}", variant["all_params"])
            layout["train_info"]["metrics"][-1]["split"] = self.result["split"]
            write_json(self.root / "peft_results" / f"{name}.json", layout)

    def write(self) -> None:
        """Write compare.json, the summaries made anew."""
        for variant in self.variants:
            variant["summary"] = results.summarise(variant["trials"])
        if self.result["metric"]:
            better = self.result["greater_is_better"]
            results.mark_pareto(self.variants, self.result["metric"], greater_is_better=better)
        write_json(self.root / results.FILE, self.result)

    def finish(self) -> None:
        """Say whether all were trained on the same rows."""
        self.result["different_rows"] = results.different_rows(self.root, self.variants)
        self.write()

    def best(self) -> dict[str, Any] | None:
        """The variant with the best mean of the metric; None where none is done."""
        metric, sign = self.result["metric"], 1 if self.result["greater_is_better"] else -1
        rated = [variant for variant in self.variants if metric in variant["summary"]]
        return max(rated, key=lambda variant: sign * variant["summary"][metric]["mean"], default=None)

    @property
    def exit_code(self) -> int:
        """0 where all trials are done, else that of the first one that is not."""
        codes = [trial["exit_code"] for trial in self.trials() if trial["state"] != "done"]
        return next((code for code in codes if code), 1 if codes else 0)


def _pending(seed: int, run_dir: str) -> dict[str, Any]:
    numbers = ("trainable_params", "adapter_bytes", "peak_memory_bytes", "train_seconds", "target_tokens_per_second")
    unknown = dict.fromkeys((*numbers, "target_tokens", "steps", "forgetting"))
    facts = {"seed": seed, "run_dir": run_dir, "state": "pending", "exit_code": None, "error": None, "metrics": {}}
    return facts | unknown | {"total_seconds": 0.0}
