"""`peftkit train`, in this process, with a recipe that says the same.

peftkit shuffles by a function of seed and step, so the file of rows is laid out such that this order is the common one.
"""

import json
import sys
from pathlib import Path

from meter import start

job = start()

from peftkit.cli import main  # noqa: E402
from peftkit.engine.examples import epoch_order  # noqa: E402

lines = Path(job.rows_path).read_text(encoding="utf-8").splitlines()
laid_out = [""] * len(lines)
for line, place in zip(lines, epoch_order(len(lines), job.seed, 0), strict=True):
    laid_out[place] = line
rows_path = Path(job.cache_dir) / "rows.jsonl"
if not rows_path.exists():
    rows_path.write_text("\n".join(laid_out) + "\n", encoding="utf-8")
recipe = {
    "task": "CAUSAL_LM",
    "model": {"name_or_path": job.model_dir, "dtype": job.dtype},
    "adapter": {
        "method": "lora",
        "r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "target_modules": job.targets,
    },
    "data": {"train": {"path": str(rows_path), "format": "chat"}, "max_length": job.max_length},
    "training": {
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": job.steps,
        "batch_size": job.batch_size,
        "seed": job.seed,
    },
}
recipe_path = Path(job.scratch_dir) / "recipe.yaml"
recipe_path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML too
overrides = [part for setting in job.settings for part in ("--set", setting)]
sys.argv[1:] = ["train", str(recipe_path), "--output", str(Path(job.scratch_dir) / "run"), *overrides]
main()
