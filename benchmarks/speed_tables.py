"""What the lines of `speed.py` say: tables, and the plot of the README.

python benchmarks/speed_tables.py speed.jsonl --plot benchmarks/speed.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

NAMES = {
    "peftkit": "peftkit",
    "plain": "transformers' Trainer + peft",
    "bare": "bare loop",
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "axolotl": "axolotl",
    "ms_swift": "ms-swift",
    "torchtune": "torchtune",
    "litgpt": "litgpt",
    "unsloth": "unsloth",
}
SUMS = ("torchtune",)  # these send the sum over the targets backward and divide the gradients
FIRST = 1  # steps that are not measured
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}  # dense bf16, by maker
Row = dict[str, Any]


def load_results(path: Path) -> list[Row]:
    """The lines of a file of results, none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def figures(row: Row) -> dict[str, float]:
    """What a run reached from its second step on."""
    real, targets = (sum(row["tokens"][kind][FIRST:]) for kind in ("real", "targets"))
    cpu, wall = (row[clock][-1] - row[clock][FIRST - 1] for clock in ("cpu_seconds", "wall_seconds"))
    return {
        "tokens_per_cpu_second": real / cpu,
        "targets_per_cpu_second": targets / cpu,
        "tokens_per_second": real / wall,
        "memory_of_step": row["memory_of_step"] / 2**20,
        "memory_peak": row["memory_peak"] / 2**20,
        "seconds_before_step_1": row["seconds_before_step_1"],
        "cpu_seconds_before_step_1": row["cpu_seconds_before_step_1"],
        "seconds_until_step_1": row["wall_seconds"][0],
        "cpu_seconds_until_step_1": row["cpu_seconds"][0],
    }


def losses(row: Row) -> list[float]:
    """Mean loss of each step."""
    if row["tool"] not in SUMS:
        return list(row["losses"])
    return [total / targets for total, targets in zip(row["losses"], row["tokens"]["targets"], strict=True)]


def loss_gap(row: Row, plain: Row, steps: slice = slice(None)) -> float:
    """The largest difference of a step's loss to the plain script's, over the steps that both have."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses(row)[steps], losses(plain)[steps], strict=False))


def spread(values: Iterable[float], digits: int = 0) -> str:
    """Median, and the range where there are several."""
    found = sorted(values)
    if len(found) < 2:
        return f"{median(found):,.{digits}f}" if found else "-"
    return f"{median(found):,.{digits}f} ({found[0]:,.{digits}f}-{found[-1]:,.{digits}f})"


def ratios(rows: list[Row], plain: list[Row], name: str) -> list[float]:
    """A figure over the plain script's of the same round."""
    by_round = {row["round"]: figures(row)[name] for row in plain}
    return [figures(row)[name] / by_round[row["round"]] for row in rows if row["round"] in by_round]


def grouped(results: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order of their first appearance."""
    found = defaultdict(list)
    for row in results:
        found[key(row)].append(row)
    return dict(found)


def speed_table(results: list[Row]) -> list[str]:
    """One job: a line for each tool."""
    by_tool = grouped(results, lambda row: row["tool"])
    plain = by_tool.get("plain", [])
    titles = (
        "tool",
        "tokens / CPU s",
        "over plain",
        "targets / CPU s",
        "tokens / wall s",
        "step memory, MiB",
        "over plain",
        "peak, MiB",
        "loss gap, step 1",
        "all steps",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for tool in sorted(by_tool, key=list(NAMES).index):
        rows = by_tool[tool]
        found = [figures(row) for row in rows]
        memory = (median(ratios(rows, plain, name)) if plain else 0 for name in ("memory_of_step",))
        gaps = [max(loss_gap(row, plain[0], steps) for row in rows) if plain else 0 for steps in (slice(1), slice(None))]
        cells = [
            NAMES[tool],
            spread(row["tokens_per_cpu_second"] for row in found),
            spread(ratios(rows, plain, "tokens_per_cpu_second"), 2),
            spread(row["targets_per_cpu_second"] for row in found),
            spread(row["tokens_per_second"] for row in found),
            spread(row["memory_of_step"] for row in found),
            *(f"{ratio:.2f}" for ratio in memory),
            f"{median(row['memory_peak'] for row in found):,.0f}",
            *(f"{gap:.0e}" if gap else "0" for gap in gaps),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def growth_table(results: list[Row]) -> list[str]:
    """Several jobs: a line for each, with the tools beside each other."""
    tools = sorted({row["tool"] for row in results}, key=list(NAMES).index)
    titles = ["job", *(f"{NAMES[tool]}: {what}" for tool in tools for what in ("tokens / CPU s", "step MiB"))]
    others = [tool for tool in tools if tool != "plain"]
    titles += [f"{NAMES[tool]} over plain: {what}" for tool in others for what in ("speed", "memory")]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for job, rows in grouped(results, lambda row: row["job"]).items():
        by_tool = grouped(rows, lambda row: row["tool"])
        cells = [job]
        for tool in tools:
            found = [figures(row) for row in by_tool.get(tool, [])]
            cells += [spread(row[name] for row in found) for name in ("tokens_per_cpu_second", "memory_of_step")]
        for tool in others:
            for name in ("tokens_per_cpu_second", "memory_of_step"):
                cells.append(spread(ratios(by_tool.get(tool, []), by_tool.get("plain", []), name), 2))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def start_table(results: list[Row]) -> list[str]:
    """A line for each tool: seconds until its first look-up of an embedding, and until step 1 is done."""
    titles = ["tool"]
    for start in ("first start", "second start"):
        titles += [f"{start}: {what}" for what in ("s to step 1", "CPU s to step 1", "CPU s to its end")]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    by_tool = grouped(results, lambda row: row["tool"])
    for tool in sorted(by_tool, key=list(NAMES).index):
        cells = [NAMES[tool]]
        for start in ("cold", "again"):
            found = [figures(row) for row in by_tool[tool] if row["start"] == start]
            for name in ("seconds_before_step_1", "cpu_seconds_before_step_1", "cpu_seconds_until_step_1"):
                cells.append(spread((row[name] for row in found), 1))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gpu_table(results: list[Row]) -> list[str]:
    """Tokens a second and the share of the GPU's arithmetic that they take."""
    lines = ["| tool | tokens / s / GPU | model FLOPs utilisation |", "|---|---|---|"]
    by_tool = grouped(results, lambda row: row["tool"])
    for tool in sorted(by_tool, key=list(NAMES).index):
        found = [figures(row)["tokens_per_second"] for row in by_tool[tool]]
        peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in by_tool[tool][0].get("gpu", "")), None)
        shares = [speed * row["flops_per_token"] / peak / 1e12 for speed, row in zip(found, by_tool[tool], strict=True) if peak]
        lines.append(f"| {NAMES[tool]} | {spread(found)} | {spread((100 * share for share in shares), 1)}% |")
    return lines


def print_tables(results: list[Row]) -> None:
    """Everything that the results hold, as Markdown."""
    good = [row for row in results if "error" not in row]
    for device, rows in grouped(good, lambda row: (row["device"], row["dtype"])).items():
        starts = [row for row in rows if row["start"]]
        runs = [row for row in rows if not row["start"]]
        tables = [start_table(starts)] if starts else []
        jobs = grouped(runs, lambda row: row["job"])
        tables += [growth_table(runs)] if len(jobs) > 1 else [speed_table(found) for found in jobs.values()]
        tables += [gpu_table(found) for found in jobs.values() if device[0] == "cuda"]
        for lines in tables:
            print("\n".join(["", *lines]))
    failed = grouped([row for row in results if "error" in row], lambda row: row["tool"])
    for tool, rows in failed.items():
        if not any(row["tool"] == tool for row in good):
            print(f"\n{NAMES[tool]}: {rows[-1]['error']}: {' '.join(rows[-1]['log'].strip().splitlines()[-1:])}")


def plot(results: list[Row], path: Path) -> None:
    """Bars of tokens per CPU second over the plain script's; greys that can be read on white and on black."""
    from matplotlib import pyplot

    by_tool = grouped([row for row in results if "error" not in row and not row["start"]], lambda row: row["tool"])
    values = {tool: median(ratios(rows, by_tool["plain"], "tokens_per_cpu_second")) for tool, rows in by_tool.items()}
    tools = sorted(values, key=lambda tool: values[tool])
    figure, axes = pyplot.subplots(figsize=(6.4, 0.3 * len(tools) + 0.7), dpi=150)
    colours = ["#2f81f7" if tool == "peftkit" else "#8b949e" for tool in tools]
    bars = axes.barh([NAMES[tool] for tool in tools], [values[tool] for tool in tools], color=colours, height=0.65)
    axes.bar_label(bars, fmt="%.2f", padding=3, color="#808080")
    axes.set_xlabel("tokens per CPU second, transformers' Trainer + peft = 1", color="#808080")
    axes.tick_params(colors="#808080", length=0)
    axes.margins(x=0.1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#808080")
    figure.tight_layout()
    figure.savefig(path, transparent=True)


def main() -> None:
    """Print the tables of a file of results, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    options = parser.parse_args()
    results = load_results(options.results)
    print_tables(results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
