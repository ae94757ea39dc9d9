"""Predicted against measured peak memory on the CPU: `plan` and a few steps of `train`, each in a process of its own.

    python benchmarks/memory.py --work FOLDER --results results.jsonl [--only NAME ...]

Models have random weights and 25 to 70 million parameters, enough that activations count beside the libraries. Recipes that
the results have already are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

WORDS = 2000
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SPECIAL | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
WIDE = {"vocab_size": 96000, "num_hidden_layers": 3, "tie_word_embeddings": True}
BERT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "pad_token_id": 0}

# name -> (class, config class, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"vocab_size": 16000, "num_key_value_heads": 4}),
    "wide": ("LlamaForCausalLM", "LlamaConfig", LLAMA | WIDE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SPECIAL | {"vocab_size": 16000, "n_embd": 512, "n_layer": 8, "n_head": 8}),
    "bert": ("BertModel", "BertConfig", BERT | {"vocab_size": 16000, "max_position_embeddings": 512}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 16000, "d_model": 512, "d_kv": 64, "d_ff": 1408, "num_layers": 6, "num_heads": 8, "pad_token_id": 0,
         "decoder_start_token_id": 0, "eos_token_id": 2},
    ),
}  # fmt: skip

Recipe = dict[str, Any]


def micro(batch_size: int, micro_batch_size: int) -> Recipe:
    """Sequences of a step and of a pass."""
    return {"batch_size": batch_size, "micro_batch_size": micro_batch_size}


def recipe(task: str, model: str, adapter: Recipe, words: int, training: Recipe, **data: Any) -> Recipe:
    """A recipe of twelve steps on rows of up to so many words."""
    steps = {"max_steps": 12, "logging_steps": 1, "learning_rate": 1e-4}
    sections = {"max_length": 1024 if model != "bert" else 480, "truncation": "right", "cache": False}
    source = {"task": task, "model": {"name_or_path": model}, "adapter": adapter, "words": words}
    return source | {"data": sections | data, "training": steps | training}


LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
DORA = {"method": "lora", "use_dora": True}
FULL = {"method": "full"}
PREFIX = {"method": "prefix_tuning", "num_virtual_tokens": 100}
PROMPT = {"method": "prompt_tuning", "num_virtual_tokens": 20}
BF16 = {"mixed_precision": "bf16"}
RECIPES: dict[str, Recipe] = {
    "lora": recipe("CAUSAL_LM", "llama", LORA, 512, micro(8, 4)),
    "lora, checkpointed": recipe("CAUSAL_LM", "llama", LORA, 400, micro(8, 8) | {"gradient_checkpointing": True}),
    "lora, packed": recipe("CAUSAL_LM", "llama", LORA, 300, micro(8, 1), packing=True),
    "lora, large vocabulary": recipe("CAUSAL_LM", "wide", LORA, 512, micro(4, 4), train_on="all"),
    "lora, bfloat16": recipe("CAUSAL_LM", "llama", LORA, 256, micro(4, 4) | BF16),
    "dora": recipe("CAUSAL_LM", "gpt2", DORA, 1000, micro(2, 2)),
    "full": recipe("CAUSAL_LM", "llama", FULL, 256, micro(8, 4)),
    "full, adafactor": recipe("SEQ_CLS", "bert", FULL, 200, micro(8, 8) | {"optim": "adafactor"}),
    "prefix tuning": recipe("CAUSAL_LM", "llama", PREFIX, 400, micro(8, 4)),
    "ia3, T5": recipe("SEQ_2_SEQ_LM", "t5", {"method": "ia3"}, 500, micro(8, 4)),
    "bitfit, BERT, tags": recipe("TOKEN_CLS", "bert", {"method": "bitfit"}, 400, micro(8, 8)),
    "prompt tuning, BERT, pairs": recipe("FEATURE_EXTRACTION", "bert", PROMPT, 300, micro(8, 4)),
}


def rows(task: str, words: int, count: int = 96) -> list[Recipe]:
    """Rows of random words, from a quarter of the length to all of it."""
    draw = random.Random(0)

    def text(share: float = 1.0) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(int(share * words * draw.uniform(0.25, 1.0))))

    def tagged() -> Recipe:
        tokens = text().split()
        return {"tokens": tokens, "tags": ["B-X" if token[-1] == "1" else "O" for token in tokens]}

    make: dict[str, Callable[[], Recipe]] = {
        "CAUSAL_LM": lambda: {"prompt": text(0.5), "completion": text(0.5)},
        "SEQ_2_SEQ_LM": lambda: {"source": text(0.8), "target": text(0.2)},
        "SEQ_CLS": lambda: {"text": text(), "label": f"l{draw.randrange(3)}"},
        "TOKEN_CLS": tagged,
        "FEATURE_EXTRACTION": lambda: {"anchor": text(), "positive": text()},
    }
    return [make[task]() for _ in range(count)]


def save_model(name: str, folder: Path) -> Path:
    """A model with random weights and its tokenizer of whole words, made once."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = folder / name
    if (path / "config.json").is_file():
        return path
    torch.manual_seed(0)
    class_name, config_name, config = MODELS[name]
    getattr(transformers, class_name)(getattr(transformers, config_name)(**config)).save_pretrained(path)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(path)
    return path


def write_recipe(name: str, folder: Path) -> Path:
    """The recipe with its model and rows, in a folder of its own."""
    sections = json.loads(json.dumps(RECIPES[name]))
    words, place = sections.pop("words"), folder / name.replace(", ", "-").replace(" ", "_")
    place.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows(sections["task"], words)]
    (place / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sections["model"]["name_or_path"] = str(save_model(sections["model"]["name_or_path"], folder / "models"))
    sections["data"]["train"] = "rows.jsonl"
    (place / "recipe.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return place / "recipe.yaml"


def peftkit(*arguments: str) -> Recipe:
    """The JSON of a peftkit command in a process of its own."""
    environment = os.environ | {"PEFTKIT_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", *arguments, "--json"], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"peftkit {' '.join(arguments)}\n{done.stderr}")
    result: Recipe = json.loads(done.stdout)
    return result


def measure(name: str, folder: Path) -> Recipe:
    """Predicted and measured bytes of a recipe."""
    path = write_recipe(name, folder)
    started = time.perf_counter()
    planned = peftkit("plan", str(path))
    seconds = time.perf_counter() - started
    trained = peftkit("train", str(path), "--output", str(path.parent / f"run-{time.time():.0f}"))
    return {
        "name": name,
        "predicted": planned["memory_bytes"]["total"],
        "measured": trained["peak_memory_bytes"],
        "in_train": trained["predicted_memory_bytes"],
        "parts": planned["memory_bytes"],
        "peak": planned["memory_peak"],
        "phases": planned["memory_phases"],
        "pass": planned["memory_from"].rpartition(": ")[2],
        "plan_seconds": round(seconds, 1),
    }


def line(result: Recipe) -> str:
    """A row of the table in README.md."""
    mib = {key: round(result[key] / 2**20) for key in ("predicted", "measured")}
    ratio = result["predicted"] / result["measured"]
    return f"| {result['name']} | {result['pass']} | {mib['predicted']:,} | {mib['measured']:,} | {ratio:.2f} |"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models, rows and runs")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; what is there is not measured again")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    options = parser.parse_args()
    known = [json.loads(text) for text in options.results.read_text().splitlines()] if options.results.is_file() else []
    for name in options.only:
        if any(result["name"] == name for result in known):
            continue
        known.append(measure(name, options.work))
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[-1]) + "\n")
        print(line(known[-1]), flush=True)
    print("\n| recipe | largest pass | predicted, MiB | measured, MiB | ratio |\n|---|---|---|---|---|")
    print("\n".join(line(result) for result in known if result["name"] in options.only))


if __name__ == "__main__":
    main()
