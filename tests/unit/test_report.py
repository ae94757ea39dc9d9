"""What a report reads and says, without a browser: runs that are whole, unfinished, damaged; charts; comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peftkit import console
from peftkit.errors import LoadError, RecipeError
from peftkit.report import write_report
from peftkit.report.changes import changes, differing
from peftkit.report.charts import Line, chart, mean_of, nice_ticks, thin
from peftkit.report.comparison import read_comparison
from peftkit.report.curves import run_charts, throughput
from peftkit.report.examples import confusion, examples
from peftkit.report.facts import Evaluation, RunFacts, read_run, read_runs
from peftkit.report.page import headline
from peftkit.report.spread import intervals, pareto
from peftkit.report.verdict import verdict
from tests.conftest import write_jsonl
from tests.report_runs import EVIL, write_comparison, write_run


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    """A run of 40 steps on two classes, done and certified."""
    return read_run(write_run(tmp_path / "run"))


def texts(facts: RunFacts, level: str) -> str:
    """The remarks of a level."""
    return " ".join(remark.text for remark in verdict(facts) if remark.level == level)


def test_a_certified_run_is_said_to_be_one_first(facts: RunFacts) -> None:
    first = verdict(facts)[0]
    assert first.level == "good"
    assert "certified" in first.text
    assert "Accuracy on validation rows went from 0.25 before training to 0.75" in texts(facts, "good")


def test_the_step_whose_adapter_was_kept_is_known_from_the_last_evaluation(facts: RunFacts) -> None:
    assert facts.kept_step == 30
    assert [step for step, _ in facts.scores["validation"]] == [0, 10, 20, 30, 40]
    with facts.run.metrics_path.open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "loss": 0.1}\n')
    assert read_run(facts.run.dir).kept_step is None


def test_the_headline_has_the_metric_that_decides_with_the_untrained_one_beside(facts: RunFacts) -> None:
    assert headline(facts)[0] == ("Accuracy, validation", "0.75", "0.25 before")
    assert ("Trained parameters", "1,234", "10% of 12,340") in headline(facts)


def test_an_unfinished_run_with_half_a_line_is_told_as_what_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", status={"state": "training", "step": 40, "total_steps": 90})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')
    facts = read_run(folder)
    assert len(facts.steps) == 40
    assert "Unfinished: step 40 of 90" in texts(facts, "odd")
    assert "Metrics.jsonl has 1 line that cannot be read" in texts(facts, "odd")


def test_a_failed_run_is_told_with_its_error_and_code(tmp_path: Path) -> None:
    facts = read_run(write_run(tmp_path / "run", status={"state": "failed", "step": 7, "error": "loss is nan", "exit_code": 5}))
    assert texts(facts, "bad") == "Failed after step 7 (exit code 5): loss is nan"


@pytest.mark.parametrize(
    "name", ["status.json", "environment.json", "resolved.yaml", "recipe.yaml", "evaluations/validation.json"]
)
@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "\x00", '{"summary": 3, "metrics": [], "decided": 1, "argv": null}'])
def test_a_damaged_file_is_named_and_the_page_written_all_the_same(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content, encoding="utf-8")
    assert write_report([folder], tmp_path / "report.html").stat().st_size > 30_000
    if content in ("", "[1, 2]", "{"):
        assert Path(name).name in " ".join(remark.text for remark in verdict(read_run(folder))).replace("R", "r").lower()


def test_numbers_that_are_not_finite_and_spikes_are_told_with_their_steps(tmp_path: Path) -> None:
    facts = read_run(write_run(tmp_path / "run", losses={5: math.nan}, spikes=(9,)))
    assert "not finite at step 5" in texts(facts, "bad")
    assert "jumped at step 9" in texts(facts, "odd")


def test_a_loss_that_does_not_fall_and_one_that_rises_again_are_told(tmp_path: Path) -> None:
    flat = read_run(write_run(tmp_path / "flat", losses=dict.fromkeys(range(1, 41), 2.0)))
    assert "did not fall" in texts(flat, "bad")
    assert "lowest at step 30 and rose by 50%" in texts(flat, "odd")


def test_findings_of_the_audit_classes_never_right_and_memory_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_jsonl(folder / "data_report.jsonl", [{"split": "train", "kind": "bad_row", "row": "a:1", "reason": "blank"}] * 3)
    odd = texts(read_run(folder), "odd")
    assert "audit of the train rows found 3 x bad row" in odd
    assert f"Never right on validation rows: {EVIL}" in odd
    assert "2.00 GiB at most, but the plan said 1.00 GiB (-50%)" in odd


def test_what_differs_from_the_defaults_comes_with_who_said_so(facts: RunFacts) -> None:
    found = {change.key: (change.value, change.default, change.origin) for change in changes(facts)}
    assert found["training.batch_size"] == (8, 32, "recipe")
    assert found["training.seed"] == (3, 0, "--set")
    assert found["model.dtype"] == ("float32", "auto", "decided")
    assert "training.weight_decay" not in found


def test_what_runs_differ_in_is_listed_by_key(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "one" / "run"), write_run(tmp_path / "two" / "run", rate=0.5)])
    assert [facts.name for facts in runs] == ["one/run", "two/run"]
    assert differing(runs) == {"training.learning_rate": [0.01, 0.5]}


def test_the_base_beside_the_adapter_and_generated_answers_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    compared = {
        "metrics": {"accuracy": 0.76},
        "base_metrics": {"accuracy": 0.31},
        "better": 11,
        "worse": 2,
        "row_figure": "correct",
    }
    compared["differences"] = {"accuracy": {"difference": 0.45, "low": 0.4, "high": 0.5}}
    compared["most_worse"] = [{"row": f"rows.jsonl:5 {EVIL}", "base": 1.0, "adapter": 0.0, "change": -1.0}]
    (folder / "evaluations" / "validation.comparison.json").write_text(json.dumps(compared), encoding="utf-8")
    write_jsonl(
        folder / "evaluations" / "validation.generations.jsonl", [{"prompt": "2+2?", "reference": "4", "prediction": "five"}]
    )
    html = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("11 got better, 2 worse", "0.4 to 0.5", "Rows that changed most", "five"):
        assert text in html
    assert EVIL not in html


def test_wrong_rows_come_first_with_their_text(facts: RunFacts) -> None:
    first, *_, last = examples(facts.evaluations[0])
    assert (first.kind, last.kind) == ("wrong", "best")
    assert ("Text", f"row 4 {EVIL}") in first.parts
    assert ("Probabilities", f"pos 90%, {EVIL} 10%") in first.parts


def test_a_matrix_of_many_classes_becomes_a_list_of_mistakes(facts: RunFacts) -> None:
    small = confusion(facts.evaluations[0])
    assert small is not None
    assert (small.counts, small.pairs) == ([[15, 0], [5, 0]], [(EVIL, "pos", 5)])
    names = [f"class {number}" for number in range(20)]
    metrics = {"by_class": {name: {} for name in names}, "confusion": [[int(place == 3) for place in range(20)] for _ in names]}
    large = confusion(Evaluation("test", 20, metrics, [], [], {}))
    assert large is not None
    assert (large.names, len(large.pairs)) == ([], 19)


def test_thinned_lines_keep_every_spike_and_gap() -> None:
    points: list[tuple[float, float | None]] = [(float(step), 1.0) for step in range(10_000)]
    points[7777], points[5000] = (7777.0, 9.0), (5000.0, None)
    kept = thin(points, 400)
    assert len(kept) <= 401
    assert {(7777.0, 9.0), (5000.0, None)} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])


def test_a_chart_says_that_it_is_thinned_and_breaks_its_line_at_gaps() -> None:
    drawn = chart("loss", "Loss", [Line("a", "a", [(1, 1.0), (2, None), (3, 3.0), (4, 2.0)])])
    assert drawn is not None
    assert drawn.path(drawn.lines[0]).count("M") == 2
    assert drawn.data()["lines"]["a"]["y"] == [1.0, None, 3.0, 2.0]
    long = chart("loss", "Loss", [Line("a", "a", [(step, float(step)) for step in range(5000)])])
    assert long is not None
    assert "5,000 points" in long.note


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 1e-9), (2.0, 2.0001), (0.0, 3e9), (1e-9, 2e-9)])
def test_ticks_are_round_and_lie_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)


def test_throughput_is_that_between_two_lines(facts: RunFacts) -> None:
    assert throughput(facts)[:2] == [(1.0, 200.0), (2.0, 200.0)]


def test_the_mean_of_lines_is_taken_where_all_have_a_step() -> None:
    mean, band = mean_of([[(1, 1.0), (2, 2.0)], [(2, 4.0), (3, 9.0)]])
    assert (mean, band) == ([(2, 3.0)], [(2, 2.0, 4.0)])


def test_a_file_of_ten_thousand_steps_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=10_000)
    assert write_report([folder], tmp_path / "report.html").stat().st_size < 300_000


def test_texts_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    html = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in html
    assert "&lt;script&gt;" in html
    assert html.count("<script") == 2


def test_a_comparison_ranks_its_variants_and_finds_those_that_no_smaller_one_equals(tmp_path: Path) -> None:
    found = read_comparison(write_comparison(tmp_path / "compare"))
    assert [variant.name for variant in found.variants][:2] == ["method 7", "method 6"]
    assert [row["variant"].name for row in intervals(found)["rows"]][-1] == "method 0"
    best = {point["variant"].name for point in pareto(found)["points"] if point["is_best"]}
    assert best == {"method 5", "method 6", "method 7"}
    assert [(variant.name, trial.facts["exit_code"]) for variant, trial in found.failures] == [("method 3", 4)]
    assert "CUDA is out of memory" in write_report([tmp_path / "compare"], tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_comparison_that_has_just_begun_is_a_page_too(tmp_path: Path) -> None:
    variants = [{"name": "a", "trials": [{"state": "pending"}]}]
    facts: dict[str, Any] = {"kind": "sweep", "name": "s", "metric": "loss", "variants": variants}
    (tmp_path / "compare.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "1 trials are still to come" in write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_and_a_run_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is no run directory, and no folder of a comparison"):
        write_report([tmp_path], tmp_path / "r.html")
    folder = write_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="is named twice"):
        read_runs([folder, folder])
    (tmp_path / "compare.json").write_text("{", encoding="utf-8")
    with pytest.raises(LoadError, match="cannot be read"):
        write_report([tmp_path], tmp_path / "r.html")


def test_the_loss_fits_a_line_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.sparkline([3.0, 2.0, 1.0, math.nan]) == "█▅▁!"
    assert len(console.sparkline([1.0] * 1000)) == 40
    monkeypatch.setattr("sys.stdout", type("Old", (), {"encoding": "ascii"}))
    assert console.sparkline([2.0, 1.0]) == "#_"


def test_a_run_has_charts_for_losses_metrics_and_speed(facts: RunFacts) -> None:
    names = [drawn.name for drawn in run_charts(facts)]
    assert names == ["loss", "accuracy", "learning_rate", "grad_norm", "throughput", "memory"]
