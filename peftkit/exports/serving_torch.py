"""The folders of the targets `vllm` and `sglang`: PEFT's layout with one rank and one scale, or the merged model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import transformers

from peftkit.adapters import CONFIG, TENSORS
from peftkit.exports.base import Check, Material
from peftkit.exports.logits_torch import compare_logits
from peftkit.exports.lora_torch import other_tensors, read_layers, uniform, write_tensors
from peftkit.exports.renderings import asked_with, kept_renderings
from peftkit.exports.safetensors_torch import compare_folder
from peftkit.exports.serving import ServingOptions
from peftkit.exports.subject import Subject

_TOLERANCE = 1e-4  # of the largest logit: another order of summation


def write(material: Material, options: ServingOptions, folder: Path) -> None:
    """Write the adapter, or copy the merged model."""
    if options.form == "merged":
        shutil.copytree(material.merged(options.dtype), folder, dirs_exist_ok=True)
        return
    subject = material.subject
    layers, rank, alpha = uniform(read_layers(subject))
    write_tensors(folder / TENSORS, layers, dict(other_tensors(subject)))
    config = dict(subject.adapter) | {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _targets(subject, [layer.name for layer in layers]),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in sorted(subject.folder.iterdir()):
        if path.is_file() and path.name not in (CONFIG, TENSORS, "README.md"):
            shutil.copyfile(path, folder / path.name)


def check(material: Material, options: ServingOptions, folder: Path) -> Check:
    """Have PEFT, or plain transformers, load the folder, and the base's tokenizer render as in training."""
    if options.form == "merged":
        check = compare_folder(material, folder)
    else:
        check = compare_logits(f"peft {peft.__version__}", material.logits("adapter"), material.logits_of(folder), _TOLERANCE)
    if check.passed and options.form == "adapter" and (wrong := _rendered_otherwise(material, folder)):
        return dataclasses.replace(check, passed=False, detail=wrong)
    return dataclasses.replace(check, detail=f"{check.detail}; the server itself was not asked: it does not run here")


def _rendered_otherwise(material: Material, folder: Path) -> str:
    """How a server would render rows of training otherwise: by the base's tokenizer and the adapter's template."""
    subject, template = material.subject, folder / "chat_template.jinja"
    rows = [row for row in kept_renderings(folder) if "generation_prompt" in row]
    if not rows or not template.is_file() or material.runtime.settings.template_date:
        return ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(subject.base, revision=subject.revision)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    for row in rows:
        variables = asked_with(row, material.runtime.settings.chat_template_kwargs)
        prompt = tokenizer.apply_chat_template(variables.pop("messages"), tokenize=False, **variables)
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if prompt != row["generation_prompt"] or [ids] != row["input_ids"]:
            return "the base's tokenizer makes other tokens of rows of training; `--merged` brings the adapter's own along"
    return ""


def _targets(subject: Subject, names: list[str]) -> list[str]:
    """A list, which both servers want, of ends of names where that says the same as the expression that was trained with."""
    wanted = subject.adapter.get("target_modules")
    return sorted(wanted) if isinstance(wanted, list) else names
