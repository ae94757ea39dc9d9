"""`peftkit infer` on a file of prompts beside plain loops of transformers' generate: new tokens per CPU second, as ratios.

    python benchmarks/infer.py --adapter RUN --input FILE --max-new-tokens 200

FILE holds JSON lines with `prompt`. The plain loops answer in the order of the file, one row at a time (the first rows alone:
it is slow) and in batches. Every tool is run on one row too, whose CPU seconds are taken off: what loading costs. Answers are
compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PLAIN = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter, source, output, batch_size, max_new_tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
prompts = [json.loads(line)["prompt"] for line in open(source, encoding="utf-8")]
answers = []
for start in range(0, len(prompts), batch_size):
    chosen = prompts[start : start + batch_size]
    inputs = tokenizer(chosen, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
with open(output, "w", encoding="utf-8") as handle:
    handle.writelines(json.dumps({"prediction": answer.strip()}) + "\\n" for answer in answers)
"""


def run(command: list[str], output: Path) -> tuple[float, list[str]]:
    """CPU seconds of a command, and the answers that it wrote."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]


def commands(options: argparse.Namespace, source: Path, output: Path) -> dict[str, list[str]]:
    """What is measured."""
    plain = [sys.executable, "-c", PLAIN, options.adapter, str(source), str(output)]
    ours = [sys.executable, "-m", "peftkit", "infer", "--adapter", options.adapter, "--input", str(source)]
    ours += ["--output", str(output), "--max-new-tokens", str(options.max_new_tokens)]
    found = {"one row at a time": [*plain, "1", str(options.max_new_tokens)]}
    found |= {f"batches of {size}": [*plain, str(size), str(options.max_new_tokens)] for size in options.batch_sizes}
    return found | {"peftkit infer": ours}


def count_tokens(adapter: str, answers: list[str]) -> int:
    """Tokens of the answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    return sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each tool."""
    lines = options.input.read_text(encoding="utf-8").splitlines()[: options.rows]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "rows.jsonl", Path(scratch) / "answers.jsonl"
        reference: list[str] | None = None
        for name, command in reversed(commands(options, source, output).items()):
            alone = name == "one row at a time"
            seconds, answers = {}, {}
            for count in (1, options.rows_alone if alone else len(lines)):
                source.write_text("".join(f"{line}\n" for line in lines[:count]), encoding="utf-8")
                seconds[count], answers[count] = run(command, output)
                output.unlink()
            (_, first), (count, total) = seconds.items()
            tokens = count_tokens(options.adapter, answers[count]) - count_tokens(options.adapter, answers[1])
            reference = answers[count] if reference is None else reference
            same = sum(ours == theirs for ours, theirs in zip(reference, answers[count], strict=False))
            rate = tokens / (total - first)
            results.append({"tool": name, "rows": count, "tokens_per_cpu_second": round(rate, 1), "same_answers": same})
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True, help="run directory's adapter folder")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with `prompt`")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rows-alone", type=int, default=50, help="rows that are answered one at a time")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32], help="of the plain loop")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    results = measure(parser.parse_args())
    slowest = min(row["tokens_per_cpu_second"] for row in results)
    print("| | rows | new tokens per CPU second | ratio | same answers |\n|---|---|---|---|---|")
    for row in reversed(results):
        rate = row["tokens_per_cpu_second"]
        print(f"| {row['tool']} | {row['rows']:,} | {rate:,.0f} | {rate / slowest:.1f} | {row['same_answers']:,} |")


if __name__ == "__main__":
    main()
