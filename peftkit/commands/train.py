"""`peftkit train`: a recipe becomes a trained, certified adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import console
from peftkit.engine.adapter import attach_adapter, trainable_state
from peftkit.engine.blueprint import parameters_by_module
from peftkit.engine.certify import NUM_ROWS, certify, reference_logits
from peftkit.engine.compiled import compile_layers, uncompiled
from peftkit.engine.data import Data
from peftkit.engine.digest import model_fingerprint, weights_digest
from peftkit.engine.evaluate import flat_metrics
from peftkit.engine.exhausted import explain_training_memory
from peftkit.engine.facts import AdapterFacts, facts_of, write_model_card
from peftkit.engine.forgetting import forgetting_texts, measure_forgetting
from peftkit.engine.guard import explain_exhaustion, give_back_heap, release, training_memory_text
from peftkit.engine.hardware import peak_memory_bytes, process_index, start_accelerator
from peftkit.engine.hooks import Context, hook
from peftkit.engine.journal import Reporter
from peftkit.engine.loaded import load_adapter
from peftkit.engine.memory import plan_memory
from peftkit.engine.micro_batch import settle_micro_batch
from peftkit.engine.model import base_of, load_base_model, set_pad_token
from peftkit.engine.savings import save_memory
from peftkit.engine.sharding import is_sharded, whole
from peftkit.engine.store import initial_state, save_adapter
from peftkit.engine.stream import Stream
from peftkit.engine.survey import Survey, survey
from peftkit.engine.trainer import Trainer
from peftkit.environment import begin, environment, refuse_drift
from peftkit.errors import PeftkitError, Stopped
from peftkit.launch import launch_options, worker_arguments, worker_sharding
from peftkit.lock import lock
from peftkit.plan import Plan, num_steps
from peftkit.recipe import LoadedRecipe
from peftkit.report import write_report
from peftkit.run import Run, remove_leftovers, run_to_continue, write_text
from peftkit.stop import STOPS, stops_at_once
from peftkit.tasks.example import Example, Runtime

if TYPE_CHECKING:
    import torch


def train(
    loaded: LoadedRecipe, output: Path | None, resume: bool, *, force: bool = False, locked: Path | None = None
) -> dict[str, Any]:
    """Train, evaluate and certify; returns the summary that `--json` prints.

    Args:
        loaded: the recipe.
        output: the run directory; None: a new one, or the newest unfinished one with `resume`.
        resume: whether to go on with a run.
        force: go on although recipe, rows or model have changed, and break the lock of another host.
        locked: a run whose packages, model and rows must be those of now.
    """
    with console.progress(None, "reading rows", speaks=process_index() == 0) as advance:
        before = run_to_continue(loaded.recipe, output) if resume else None  # its chat template's day: the same tokens
        found = survey(loaded, date=before.template_date if before else None, on_row=lambda: advance(1))
    found = settle_micro_batch(found, worker_sharding(found.plan.hardware.num_processes), before)
    facts = environment_of(found) if process_index() == 0 else {}
    if locked is not None and facts:
        refuse_drift(locked, facts)
    run = open_run(loaded, found.plan, output, resume, force)
    reporter = console.reporter(process_index(), run.log)
    explained = functools.partial(explain_exhaustion, lambda: training_memory_text(found.plan, found.data))
    with explained(), lock(run, reporter.note, force=force) if facts else contextlib.nullcontext():
        forced = begin(run, found.plan, facts, resume=resume, force=force) if facts else []
        elsewhere = stops_at_once("outside of training, where there is nothing to save")
        with _recorded(run, loaded), explained(), explain_training_memory(loaded, found), elsewhere:
            if facts:
                _begin(run, found, reporter, forced)
            _announce(reporter, run, found)
            return _train_in(run, found, reporter)


def environment_of(found: Survey) -> dict[str, Any]:
    """What environment.json says of the run."""
    model = model_fingerprint(base_of(found.plan), found.blueprint.config)
    facts = environment(found.plan, found.data.fingerprints | {"model": model})
    counts = {"trainable": found.blueprint.trainable_params, "all": found.blueprint.all_params}
    parameters = counts | {"by_module": parameters_by_module(found.blueprint.model)}
    return facts | {"template_date": found.data.encoding.template_date, "rows": found.data.report, "parameters": parameters}


def _begin(run: Run, found: Survey, reporter: console.LineReporter, forced: list[str]) -> None:
    """Clear what a killed process has left, and write what is known before training."""
    for line in forced:
        reporter.note(f"note: --force: {line}")
    for folder in (run.dir, run.checkpoints_dir):
        remove_leftovers(folder)
    write_text(run.data_report_path, found.data.findings_path.read_text(encoding="utf-8"))
    run.write_status("training", step=0)


@contextlib.contextmanager
def _recorded(run: Run, loaded: LoadedRecipe) -> Iterator[None]:
    """Write down why a run ends; a run that is stopped is told how it goes on."""
    try:
        yield
    except Stopped as error:
        arguments = worker_arguments(loaded, run.dir, resume=True, as_json=False)
        told = Stopped(f"{error}. To go on:\n  {shlex.join(['peftkit', *arguments, *launch_options()])}", error.exit_code)
        _record_failure(run, told)
        raise told from error
    except BaseException as error:
        _record_failure(run, error)
        raise


def _announce(reporter: console.LineReporter, run: Run, found: Survey) -> None:
    """Say where the run goes, what it trains, and what is odd about its rows."""
    blueprint, rows = found.blueprint, found.data.report
    counts = [f"{name} {report['examples']:,}" for name, report in rows.items()]
    where = "from the cache" if found.data.is_cached else "read"
    reporter.note(f"rows {where}: {', '.join(counts)}")
    for split, report in rows.items():
        for kind, count in report["findings"].items():
            reporter.note(f"note: {split}: {count:,} x {kind}; {run.data_report_path.name} has each")
    for note in blueprint.notes:
        reporter.note(f"note: {note}")
    reporter.note(f"run directory: {run.dir}")
    share = f"{blueprint.trainable_percent:.4f}%"
    reporter.note(f"trainable params: {blueprint.trainable_params} of {blueprint.all_params} ({share})")


def _record_failure(run: Run, error: BaseException) -> None:
    """Write down why the run ended; a full disk must not hide the reason."""
    code = error.exit_code if isinstance(error, PeftkitError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    with contextlib.suppress(OSError):
        step = run.read_status().get("step", 0)
        run.write_status("stopped" if code in STOPS else "failed", step=step, error=str(error), exit_code=code)
        run.log(f"{type(error).__name__}: {error}")


def train_and_report(loaded: LoadedRecipe, output: Path | None, *, as_json: bool, **how: Any) -> None:
    """Train, then print the summary (rank 0 only); `how`: see `train`."""
    with console.problems_as_json(as_json):
        result = train(loaded, output, **how)
    if process_index() != 0:
        return
    if as_json:
        console.print_json(result)
        return
    _print_metrics(result["metrics_by_split"], result["metrics_before"])
    predicted, measured = result["predicted_memory_bytes"], result["peak_memory_bytes"]
    said = (
        f"{console.show_bytes(predicted)} ({predicted / measured - 1:+.0%})" if predicted else "nothing: it could not be made"
    )
    if forgetting := result.get("forgetting"):
        before, after = forgetting["loss_before"], forgetting["loss_after"]
        console.print_text(f"forgetting ({forgetting['measure']}): {before:.4g} before, {after:.4g} after")
    console.print_text(f"memory at most: {console.show_bytes(measured)}; the plan said {said}")
    certificate = result["certificate"]
    console.print_text(
        f"certificate passed: after reload into a fresh base, logits differ by at most {certificate['max_abs_diff']:.3g}"
    )
    if losses := [line["loss"] for line in Run(Path(result["run_dir"])).read_training_lines()]:
        console.print_text(f"loss: {losses[0]:.4g} {console.sparkline(losses)} {losses[-1]:.4g}")
    console.print_text(f"adapter: {result['run_dir']}/adapter")
    if result["report"]:
        console.print_text(f"report: {result['report']}")


def _print_metrics(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Metrics by split, beside those of the untrained model where they were measured."""
    rows = [
        (split, name, before.get(split, {}).get(name, ""), value)
        for split, metrics in after.items()
        for name, value in metrics.items()
    ]
    if any(row[2] != "" for row in rows):
        console.print_table("", ["split", "metric", "before", "after"], rows)
    elif rows:
        console.print_table("", ["split", "metric", "value"], [(row[0], row[1], row[3]) for row in rows])


def _train_in(run: Run, found: Survey, reporter: console.LineReporter) -> dict[str, Any]:
    trainer, untrained = build_trainer(run, found, reporter)
    plan, data, accelerator = trainer.plan, trainer.data, trainer.accelerator
    trainer.resume()
    if plan.recipe.training.eval_on_start and "test" in data.held_out and trainer.progress.step == 0:
        trainer.evaluate("test")
    trainer.fit()
    found = dataclasses.replace(found, plan=trainer.plan)
    evaluated = [split for split in ("validation", "test") if split in data.held_out]
    metrics: dict[str, Any] = {split: flat_metrics(trainer.final_metrics(split)) for split in evaluated}
    summary = _summary(run, trainer, metrics)
    if report := hook(plan.method, "report"):
        summary["adapter"] = report(trainer.model)
    reference = _save(found, trainer, untrained)
    if accelerator.is_main_process:
        summary["certificate"] = _certify(found, trainer, reference, metrics)
        summary |= _memory(found, reporter) | _forgetting(found, run)
        run.write_status("done", step=trainer.progress.step, summary=summary)
        summary["report"] = _report(run, reporter)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def build_trainer(run: Run, found: Survey, reporter: Reporter) -> tuple[Trainer, Any]:
    """Load the model, attach the adapter; returns what trains it, and the adapter's state before that."""
    plan, tokenizer, data = found.plan, found.tokenizer, found.data
    divided = plan.hardware.divided_by
    # Processes that divide layers meet before the model is loaded; DeepSpeed must not hear of it by then.
    accelerator = start_accelerator(plan, run) if divided > 1 else None
    base_model, missing = load_base_model(base_of(plan), data.encoding, processes=divided)
    set_pad_token(base_model, tokenizer)
    runtime = plan.task.runtime(tokenizer, data.encoding)
    context = training_context(plan, tokenizer, runtime, data)
    model = attach_adapter(base_model, missing, context)
    save_memory(base_model, plan)
    if plan.recipe.training.torch_compile:
        compile_layers(base_model)
    untrained = initial_state(model, plan)
    accelerator = accelerator or start_accelerator(plan, run)
    if isinstance(data.train, Stream) and accelerator.is_main_process:
        data.train.on_dropped = run.append_data_report
        reporter.note(f"note: rows that are left out while training are in {run.data_report_path.name}")
    gathered = trainable_state(model) if divided > 1 else None  # by all who divide it together
    if accelerator.is_main_process:
        run.record_once("initial_weights", lambda: weights_digest(gathered or trainable_state(model)))
    return Trainer(plan, model, runtime, data, run, accelerator, reporter, found.questions), untrained


def _save(found: Survey, trainer: Trainer, untrained: Any) -> list[torch.Tensor]:
    """Write the adapter folder; the logits of what was trained, which is let go. Every process takes part where weights are
    shared out; else the main one alone."""
    plan, data, model, accelerator = found.plan, found.data, trainer.model, trainer.accelerator
    sharded, writes = is_sharded(model), accelerator.is_main_process
    if not writes and not sharded:
        return []
    trainer.paths.leave(model)  # the proof is about the plain model
    give_back_heap()
    with uncompiled(model):
        forward = trainer.whole_logits if sharded else None
        reference = reference_logits(model, trainer.runtime, _proof_rows(data), plan.mixed_precision, forward=forward)
    with whole(model, model.saved_names, holds=writes):  # type: ignore[arg-type]
        if writes:
            save_adapter(trainer.run.adapter_dir, model, found.tokenizer, _facts(found), untrained, data.renderings)
    release(model, trainer.optimizer.optimizer)
    return reference


def _facts(found: Survey) -> AdapterFacts:
    plan, data = found.plan, found.data
    return facts_of(plan, base_of(plan).path, data.encoding, data.formats[0])


def _proof_rows(data: Data) -> Sequence[Example]:
    return data.held_out.get("validation", data.sample)[:NUM_ROWS]


def _certify(found: Survey, trainer: Trainer, reference: list[torch.Tensor], metrics: dict[str, Any]) -> dict[str, Any]:
    """Prove the adapter folder; returns its certificate."""
    folder, facts = trainer.run.adapter_dir, _facts(found)
    certificate = certify(folder, reference, facts, trainer.runtime, _proof_rows(found.data))
    write_model_card(folder, facts, metrics, certificate)
    return certificate


def _forgetting(found: Survey, run: Run) -> dict[str, Any]:
    """By how much the loss has risen on text that the recipe names, where it names one."""
    evaluation, texts = found.plan.recipe.evaluation, forgetting_texts(found.plan)
    return {"forgetting": measure_forgetting(load_adapter(run.dir), texts, evaluation.batch_size)} if texts else {}


def _memory(found: Survey, reporter: console.LineReporter) -> dict[str, int | None]:
    """The most memory that the run took, beside what the plan says: found now, when it keeps nobody waiting for a step.

    The run is trained and certified: whatever is wrong with the plan cannot fail it any more, and is noted.
    """
    hardware = found.plan.hardware
    measured = peak_memory_bytes(hardware.device)
    try:
        predicted = plan_memory(found, worker_sharding(hardware.num_processes)).total
    except Exception as error:
        reporter.note(f"note: the plan for the memory could not be made: {type(error).__name__}: {error}")
        predicted = None
    return {"peak_memory_bytes": measured, "predicted_memory_bytes": predicted}


def _report(run: Run, reporter: console.LineReporter) -> str | None:
    """Write the run's page; what is wrong with it cannot fail a run that is trained and certified, and is noted."""
    try:
        return str(write_report([run.dir], run.report_path))
    except Exception as error:
        reporter.note(f"note: the report could not be written: {type(error).__name__}: {error}")
        return None


def training_context(plan: Plan, tokenizer: Any, runtime: Runtime, data: Data) -> Context:
    """What initialisations of the adapter may use: the run's steps, tokenizer and rows."""

    def batches(num_rows: int) -> Iterator[dict[str, Any]]:
        yield from map(runtime.collate, data.sample.batches(num_rows, plan.recipe.training.seed))

    return Context(
        plan=plan,
        total_steps=num_steps(plan, data.train.num_rows),
        tokenizer=tokenizer,
        runtime=runtime,
        batches=batches,
    )


def _summary(run: Run, trainer: Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "run_dir": str(run.dir),
        "global_step": progress.step,
        "train_loss": run.read_last_loss(),
        "metrics": metrics.get("test") or metrics.get("validation") or {},
        "metrics_by_split": metrics,
        "metrics_before": run.read_metrics_at(0),
        "trainable_params": sum(parameter.numel() for parameter in trainer.trained),
        "train_seconds": round(progress.seconds, 3),
        "target_tokens_per_second": round(progress.target_tokens / max(progress.seconds, 1e-9), 2),
        "peak_memory_bytes": peak_memory_bytes(trainer.plan.hardware.device),
    }


def open_run(loaded: LoadedRecipe, plan: Plan, output: Path | None, resume: bool, force: bool) -> Run:
    """The run directory to write to: a new one, or the one to continue; rank 0 makes it."""
    if resume:
        return Run.resume(plan, output, force=force)
    if process_index() == 0:
        return Run.create(loaded, plan, output)
    assert output is not None, "launch names the directory for all processes"
    return Run(output)
