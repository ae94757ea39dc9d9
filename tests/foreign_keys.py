"""The keys of other tools' configuration classes, read from their sources without importing them.

`python -m tests.foreign_keys FOLDER`, where FOLDER holds the unpacked wheels of llamafactory, axolotl, trl and transformers,
writes tests/unit/foreign_keys.json, which tests compare with the tables of peftkit.migration.
"""

from __future__ import annotations

import ast
import json
import sys
from fnmatch import fnmatch
from pathlib import Path

STORED = Path(__file__).parent / "unit/foreign_keys.json"
# Group -> where the classes are, and which of them; `*Args` are those of axolotl's integrations.
GROUPS = {
    "transformers": ("transformers/training_args*.py", ("TrainingArguments", "Seq2SeqTrainingArguments")),
    "llamafactory": ("llamafactory/hparams/*.py", None),
    "axolotl": ("axolotl/utils/schemas/*.py", ("AxolotlInputConfig",)),
    "axolotl_integrations": ("axolotl/integrations/*/args.py", ("*Args", "SwanLabConfig")),
    "axolotl_dataset": (
        "axolotl/utils/schemas/datasets.py",
        ("SFTDataset", "PretrainingDataset", "UserDefinedPrompterType"),
    ),
    "trl": ("trl/trainer/*_config.py", ("SFTConfig", "ModelConfig")),
    "trl_script": ("trl/scripts/utils.py", ("ScriptArguments", "DatasetMixtureConfig")),
    "trl_dataset": ("trl/scripts/utils.py", ("DatasetConfig",)),
}


def keys_of(files: list[Path], wanted: tuple[str, ...] | None) -> list[str]:
    """The annotated fields of classes (all where none are wanted) and of those that they are made from."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    waiting = [name for name in classes if wanted is None or any(fnmatch(name, pattern) for pattern in wanted)]
    keys: dict[str, None] = {}
    seen = {"CompressionArgs"}  # stands inside `llmcompressor`
    while waiting:
        name = waiting.pop()
        if name in seen or name not in classes:
            continue
        seen.add(name)
        fields = [part.target for part in classes[name].body if isinstance(part, ast.AnnAssign)]
        keys |= dict.fromkeys(field.id for field in fields if isinstance(field, ast.Name) and not field.id.startswith("_"))
        waiting += [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    return sorted(keys)


def main(folder: Path) -> None:
    """Write the file."""
    found = {group: keys_of(sorted(folder.glob(pattern)), wanted) for group, (pattern, wanted) in GROUPS.items()}
    STORED.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
