"""Time and memory of auditing, tokenising and packing rows, by their number: memory must not grow with it.

    python benchmarks/rows.py --model FOLDER --rows 10000 100000

Rows are alpaca-like (instruction, perhaps an input, output), 6 to 72 words of a made-up vocabulary each. Each number of rows
is prepared twice in fresh processes with a cache of its own: the second time it comes from the cache. Then all steps of an
epoch are packed. Prints one JSON object for each number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from peftkit.engine.batches import layout_of
from peftkit.engine.data import load_data
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.survey import find_model_facts
from peftkit.plan import make_plan
from peftkit.recipe import load_recipe

plan = make_plan(load_recipe(Path(sys.argv[1])), detect_hardware())
model = find_model_facts(plan)
ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
data = load_data(plan, model)
prepared = time.process_time()
layout, tokens, places = layout_of(plan, data.encoding.max_length), 0, 0
for step in range(-(-data.train.num_rows // plan.recipe.training.batch_size)):
    lengths = [row.length for row in data.train.step(step, plan.recipe.training.batch_size, 0)]
    for packs in layout.passes(lengths):
        sizes = [sum(lengths[row] for row in pack) for pack in packs]
        tokens, places = tokens + sum(sizes), places + max(sizes) * len(sizes)
packed = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "cached": data.is_cached,
    "prepare_cpu_seconds": round(prepared - started, 1),
    "pack_cpu_seconds": round(packed - prepared, 1),
    "mib_before": ready // 1024, "mib_peak": peak // 1024, "tokens": tokens, "fill_rate": round(tokens / places, 4),
}))
"""


def write_rows(path: Path, count: int) -> None:
    """Distinct alpaca-like rows."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            extra = text(3, 20) if draw.random() < 0.4 else ""
            row = {"instruction": f"{number}: {text(3, 12)}", "input": extra, "output": text(3, 40)}
            handle.write(json.dumps(row) + "\n")


def measure(model: str, count: int) -> dict[str, Any]:
    """Fresh, then from the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, recipe = Path(scratch) / "rows.jsonl", Path(scratch) / "recipe.yaml"
        write_rows(rows, count)
        data = {"train": str(rows), "max_length": 512, "packing": True}
        content = {"task": "CAUSAL_LM", "model": {"name_or_path": model}, "adapter": {"method": "lora"}, "data": data}
        recipe.write_text(json.dumps(content), encoding="utf-8")
        environment = os.environ | {"HF_HOME": f"{scratch}/cache"}
        command = [sys.executable, "-c", PROGRAM, str(recipe)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
        fresh, cached = (json.loads(run.stdout) for run in runs)
    assert cached["cached"]
    assert not fresh["cached"]
    return {"rows": count, "fresh": fresh, "from_cache": cached}


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal language model; no weights are read")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    for count in options.rows:
        print(json.dumps(measure(options.model, count)), flush=True)


if __name__ == "__main__":
    main()
