"""A trained run in the layout of the result files of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA).

Its key names are taken as they are, so that its own tables read these files. What it measures and we do not (memory reserved on
average and its 99th percentile) has our peak; the metrics of an evaluation are called `valid NAME` and `test NAME`.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.recipe.yaml_file import read_yaml
from peftkit.run import Run


def peft_result(run: Run, entry: Mapping[str, Any], name: str, all_params: int) -> dict[str, Any]:
    """One result file.

    Args:
        run: the run.
        entry: its entry of compare.json.
        name: `method/variant-seed-0`.
        all_params: parameters of model and adapter.
    """
    recipe, facts, status = read_yaml(run.resolved_path)[0], run.read_environment(), run.read_status()
    peak = entry["peak_memory_bytes"]
    return {
        "run_info": {
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(status.get("time", 0))),
            "total_time": entry.get("total_seconds") or entry["train_seconds"],
            "experiment_name": name,
            "peft_branch": "main",
            "train_config": _train_config(recipe, entry),
            "peft_config": _peft_config(run.adapter_dir),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": peak,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": peak,
            "train_time": entry["train_seconds"],
            "file_size": entry["adapter_bytes"],
            "num_trainable_params": entry["trainable_params"],
            "num_total_params": all_params,
            "status": "success",
            "metrics": _metrics(run, entry, recipe["training"]["batch_size"]),
        },
        "meta_info": _meta_info(facts),
    }


def _train_config(recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    model, training, data = recipe["model"], recipe["training"], recipe["data"]
    quantized = (model.get("quantization") or {}).get("bits")
    return {
        "model_id": model["name_or_path"],
        "dtype": f"int{quantized}" if quantized else model["dtype"],
        "max_seq_length": data.get("max_length"),
        "batch_size": training["batch_size"],
        "batch_size_eval": recipe.get("evaluation", {}).get("batch_size"),
        "max_steps": entry["steps"],
        "eval_steps": training["eval_steps"],
        "compile": training["torch_compile"],
        "use_gc": bool(training["gradient_checkpointing"]),
        "query_template": "",
        "seed": entry["seed"],
        "grad_norm_clip": training["max_grad_norm"] or 0.0,
        "optimizer_type": training["optim"],
        "optimizer_kwargs": {"lr": training["learning_rate"], "weight_decay": training["weight_decay"]},
        "lr_scheduler": training["lr_scheduler_type"],
        "use_amp": training["mixed_precision"] != "no",
        "autocast_adapter_dtype": True,
        "generation_kwargs": recipe.get("generation", {}),
        "attn_implementation": model["attn_implementation"],
        "init_kv_cache_prefix": None,
    }


def _peft_config(folder: Path) -> dict[str, Any] | None:
    """PEFT's config of the adapter; None for what PEFT has not, as it is for its own full fine-tuning."""
    path = folder / "adapter_config.json"
    config: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return config


def _metrics(run: Run, entry: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """An entry for each evaluation while training, and the last one for the figures that are compared."""
    lines, found = run.read_training_lines(), []
    for step in dict.fromkeys(line["step"] for line in lines):
        if not (valid := run.read_metrics_at(step).get("validation")):
            continue
        line = next(line for line in lines if line["step"] == step)
        names = {f"valid {name}": value for name, value in valid.items()}
        found.append({"step": step, **names, "train loss": line["loss"], "train samples": step * batch_size})
    test = {f"test {name}": value for name, value in entry["metrics"].items()}
    loss, tokens = (lines[-1]["loss"] if lines else None), entry["target_tokens"]
    last = {"step": entry["steps"], **test, "train loss": loss, "train samples": entry["steps"] * batch_size}
    return [*found, last | {"train total tokens": tokens}]


def _meta_info(facts: Mapping[str, Any]) -> dict[str, Any]:
    packages, prints = facts.get("packages", {}), facts.get("fingerprints", {})
    names = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    info = {key: value for name in names for key, value in _package(name, packages.get(name)).items()}
    rows = {name: {"sha": value, "created_at": None} for name, value in prints.items() if name.startswith("data.")}
    machine = platform.uname()
    return {
        "model_info": {"sha": prints.get("model"), "created_at": None},
        "dataset_info": rows,
        "package_info": info,
        "system_info": {
            "system": machine.system,
            "release": machine.release,
            "version": machine.version,
            "machine": machine.machine,
            "processor": machine.processor,
            "accelerator": facts.get("device"),
        },
        "pytorch_info": f"PyTorch {packages.get('torch')}",
    }


def _package(name: str, version: str | None) -> dict[str, str | None]:
    return {f"{name}-version": version, f"{name}-commit-hash": None}
