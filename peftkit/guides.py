"""Where docs/ tell more: pages and headings that errors end with. tests/test_guides.py opens every one of them."""

from __future__ import annotations

import re

AUDIT = "docs/data.md#the-audit"
CERTIFIED_MERGE = "docs/merging.md#what-is-proved"
FORMATS = "docs/data.md#formats"
LENGTH = "docs/data.md#length"
LINT = "docs/exporting.md#rules-of-the-lint"
MEMORY = "docs/memory.md#when-memory-runs-out"
ODD_STEPS = "docs/memory.md#odd-steps"
RESUME = "docs/reliability.md#resume"
SHARDED = "docs/many_gpus.md#fsdp-and-deepspeed"
TEMPLATE_PARITY = "docs/adapters.md#template-parity-renderingsjson"
WORKERS = "docs/many_gpus.md#workers-that-die-or-hang"

# What a problem is about, a key of the recipe (without the number of a source) or an option -> where more is said of it.
SECTIONS = {
    "adapter.method": "docs/methods.md#reasons",
    "data.max_length": LENGTH,
    "data.packing": "docs/data.md#packing-and-grouping",
    "data.train.columns": "docs/data.md#other-columns-columns-and-template",
    "data.train.format": FORMATS,
    "data.train.streaming": "docs/data.md#streaming",
    "data.train.template": "docs/data.md#other-columns-columns-and-template",
    "data.train_on": "docs/data.md#what-is-learned",
    "data.truncation": LENGTH,
    "evaluation.generation_metrics": "docs/evaluation.md#generated-answers",
    "model.quantization": "docs/quantization.md#what-survives-which-layers",
    "--launch": "docs/many_gpus.md#launch-files",
    "--locked": "docs/reliability.md#locked",
    "--onto": "docs/merging.md#adapters-of-quantised-bases---onto",
    "--resume": RESUME,
    "--target": "docs/exporting.md#targets-checks-and-what-they-gave",
}


def section_of(about: str) -> str:
    """Where more is said of a key (or of the section that it is in) or of an option; empty where nothing is."""
    name = re.sub(r"^data\.(validation|test|train)\b(\.\d+)?", "data.train", about)
    while name and name not in SECTIONS:
        name = name.rpartition(".")[0]
    return SECTIONS.get(name, "")
