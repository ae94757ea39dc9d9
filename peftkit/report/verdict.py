"""What there is to say of a run, in plain words, the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peftkit.report.facts import RunFacts, finite, mapping
from peftkit.report.show import label_of, show, show_bytes
from peftkit.tasks import TASKS

MEMORY_TOLERANCE = 0.25  # share by which memory may differ from the plan before it is worth a word
OVERFIT = 0.1  # share by which a loss has risen above its lowest
MAX_NAMED = 6  # steps or classes that are named in one sentence


@dataclass(frozen=True)
class Remark:
    """One sentence of the verdict.

    Attributes:
        level: good, note (nothing is wrong), odd (worth a look), or bad.
        text: the sentence.
    """

    level: Literal["good", "note", "odd", "bad"]
    text: str


def verdict(facts: RunFacts) -> list[Remark]:
    """How the run ended, then everything about it that is odd, the worst first."""
    parts = (_numbers, _gain, _learning, _classes, _rows, _memory, _files)
    remarks = [remark for part in parts for remark in part(facts)]
    return [*_ending(facts), *sorted(remarks, key=lambda remark: ("bad", "odd", "good", "note").index(remark.level))]


def _ending(facts: RunFacts) -> Iterator[Remark]:
    certificate = mapping(facts.summary.get("certificate"))
    step, total = facts.num_steps, facts.status.get("total_steps")
    at = f"step {step:,}" + (f" of {total:,}" if total else "")
    error = str(facts.status.get("error") or "no reason is recorded").strip()
    if facts.state == "done" and certificate.get("passed"):
        difference, bound = (show(certificate.get(key)) for key in ("max_abs_diff", "tolerance"))
        yield Remark(
            "good",
            f"Trained and certified: the saved adapter, loaded into a fresh base, gives the logits of the trained model "
            f"(largest difference {difference}, allowed {bound}, {show(certificate.get('num_rows'))} rows).",
        )
    elif facts.state == "done":
        yield Remark("odd", "Trained, but there is no certificate: nothing proves that the saved adapter is what was trained.")
    elif facts.state in ("failed", "stopped"):
        code = facts.status.get("exit_code")
        level: Literal["bad", "odd"] = "bad" if facts.state == "failed" else "odd"
        yield Remark(level, f"{facts.state.capitalize()} after {at}{f' (exit code {code})' if code else ''}: {error}")
    elif facts.state == "training":
        yield Remark("odd", f"Unfinished: {at} is the last that was heard of it. It still trains, or it was killed.")
    else:
        yield Remark("odd", "How far this run is cannot be told: it has no readable status.")


def _numbers(facts: RunFacts) -> Iterator[Remark]:
    broken = [line["step"] for line in facts.steps if finite(line.get("loss")) is None]
    if broken:
        yield Remark("bad", f"The loss was not finite at {_steps(broken)}.")
    spikes = [line["step"] for line in facts.steps if line.get("spike")]
    if spikes:
        yield Remark("odd", f"Loss or gradient jumped at {_steps(spikes)}; train.log names the rows.")
    skipped = facts.steps[-1].get("skipped_steps") if facts.steps else None
    if skipped:
        yield Remark("note", f"{skipped:,} optimizer steps were skipped because float16 overflowed.")


def _gain(facts: RunFacts) -> Iterator[Remark]:
    for split, before in facts.first_scores.items():
        name, better = metric_of(facts, split)
        old, new = finite(before.get(name)), finite(facts.last_scores[split].get(name))
        if old is None or new is None or len(facts.scores[split]) < 2:
            continue
        if (new > old) == better and new != old:
            yield Remark("good", f"{label_of(name)} on {split} rows went from {show(old)} before training to {show(new)}.")
        else:
            yield Remark("bad", f"{label_of(name)} on {split} rows did not improve: {show(old)} before, {show(new)} after.")


def _learning(facts: RunFacts) -> Iterator[Remark]:
    losses = [value for line in facts.steps if (value := finite(line.get("loss"))) is not None]
    tenth = max(1, len(losses) // 10)
    if len(losses) >= 5 and sum(losses[-tenth:]) >= sum(losses[:tenth]):
        yield Remark("bad", f"The training loss did not fall: {show(losses[0])} at first, {show(losses[-1])} at last.")
    scores = [
        (step, value) for step, row in facts.scores.get("validation", []) if (value := finite(row.get("loss"))) is not None
    ]
    if len(scores) >= 3:
        (best, lowest), (last, final) = min(scores, key=lambda score: score[1]), scores[-1]
        if 0 < best < last and final > lowest * (1 + OVERFIT):
            rise = f"{final / lowest - 1:.0%}" if lowest > 0 else show(final - lowest)
            yield Remark(
                "odd", f"The validation loss was lowest at step {best:,} and rose by {rise} until the end: overfitting."
            )
    if facts.kept_step is not None:
        yield Remark("note", f"The adapter of step {facts.kept_step:,} was kept, the best on validation rows.")


def _classes(facts: RunFacts) -> Iterator[Remark]:
    for evaluation in facts.evaluations:
        table = {name: mapping(row) for name, row in mapping(evaluation.metrics.get("by_class")).items()}
        missed = [name for name, row in table.items() if row.get("num_rows") and not row.get("recall")]
        if missed:
            more = f" and {len(missed) - MAX_NAMED} more" if len(missed) > MAX_NAMED else ""
            yield Remark("odd", f"Never right on {evaluation.split} rows: {', '.join(missed[:MAX_NAMED])}{more}.")
        total = sum(row.get("num_rows", 0) for row in table.values())
        accuracy = finite(evaluation.metrics.get("accuracy"))
        if total and accuracy is not None:
            name, row = max(table.items(), key=lambda item: item[1].get("num_rows", 0))
            share = row.get("num_rows", 0) / total
            if accuracy <= share:
                what = f"Always answering `{name}` would be right for {share:.1%} of the {evaluation.split} rows"
                yield Remark("bad", f"{what}; the adapter is right for {accuracy:.1%}.")


def _rows(facts: RunFacts) -> Iterator[Remark]:
    for (split, kind), count in sorted(facts.num_findings.items()):
        yield Remark("odd", f"The audit of the {split} rows found {count:,} x {kind.replace('_', ' ')}.")


def _memory(facts: RunFacts) -> Iterator[Remark]:
    measured, planned = (finite(facts.summary.get(f"{name}_memory_bytes")) for name in ("peak", "predicted"))
    if measured and planned and abs(planned / measured - 1) > MEMORY_TOLERANCE:
        share = f"{planned / measured - 1:+.0%}"
        yield Remark("odd", f"Memory: {show_bytes(measured)} at most, but the plan said {show_bytes(planned)} ({share}).")


def _files(facts: RunFacts) -> Iterator[Remark]:
    for text in facts.unreadable:
        yield Remark("odd", f"{text[:1].upper()}{text[1:]}.")


def metric_of(facts: RunFacts, split: str) -> tuple[str, bool]:
    """The metric that a split is judged by, and whether more of it is better."""
    scores = facts.last_scores[split]
    task = TASKS.get(str(facts.resolved.get("task")))
    wanted = mapping(facts.resolved.get("training")).get("metric_for_best_model")
    names = [wanted] if wanted != "loss" else []
    if task is not None:
        names += [task.default_metric, *task.other_default_metrics]
    name = next((str(name) for name in [*names, "loss", *scores] if name in scores), "loss")
    return name, name != "loss" and (task is None or task.metrics.get(name, True))


def _steps(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - MAX_NAMED} more" if len(steps) > MAX_NAMED else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps[:MAX_NAMED])}{more}"
