"""llama.cpp as the client that reads a GGUF back, by way of node-llama-cpp, which npm brings ready-made.

Compared are, on the prompts of training that are kept with the adapter (or fixed rows): the tokens of every text, the prompts
that the chat template in the file renders, and after each of a greedy answer's tokens which one llama.cpp holds likeliest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.exports.base import Check, Form, Material
from peftkit.exports.llama_cpp import find_client
from peftkit.exports.renderings import asked_with, kept_renderings

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
_NUM_PROMPTS, _NUM_NEW, _SECONDS = 4, 16, 900
# Largest difference of the logarithm of a greedy token's probability over the largest logit (docs/exporting.md has measured
# ones). That of types below q8_0 says no more than that the file is whole.
_TOLERANCES = {"f32": 2e-4, "f16": 2e-3, "bf16": 1e-2, "q8_0": 2e-2}
_COARSE = 0.2


@dataclass(frozen=True)
class Greedy:
    """A prompt and its greedy answer by transformers.

    Attributes:
        ids: prompt and answer.
        first: length of the prompt.
        log_probabilities: of each of the answer's tokens.
        margins: by how much each is ahead of the next likeliest.
        largest: the largest absolute logit.
    """

    ids: list[int]
    first: int
    log_probabilities: list[float]
    margins: list[float]
    largest: float


def check_with_llama_cpp(material: Material, named: str | None, kind: str, model: Path, adapter: Path | None = None) -> Check:
    """Ask llama.cpp for what transformers gives, and compare.

    Args:
        material: what was exported.
        named: folder with node_modules, where the user has named one.
        kind: type of the file's matrices.
        model: the GGUF.
        adapter: a GGUF of a LoRA to put onto it.
    """
    client, why = find_client(named)
    if client is None:
        return Check.not_here(why)
    form: Form = "adapter" if adapter else "merged"
    expected = greedy_answers(material, form)
    rows = kept_renderings(material.subject.folder)
    settings = material.runtime.settings
    if settings.template_date:  # the template writes the date, and llama.cpp that of today
        rows = [{name: value for name, value in row.items() if name != "generation_prompt"} for row in rows]
    job = {
        "node_modules": str(client),
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "context_size": max(len(answer.ids) for answer in expected) + 8,
        "sequences": [{"ids": answer.ids, "first": answer.first} for answer in expected],
        "texts": [row["text"] for row in rows if "text" in row],
        "conversations": [asked_with(row, settings.chat_template_kwargs) for row in rows if "generation_prompt" in row],
        "result": str(material.work_dir / "llama_cpp.result.json"),
    }
    found = _ask(job, material.work_dir / "llama_cpp.job.json")
    if isinstance(found, str):
        return Check("llama.cpp", False, found)
    return _compared(found, expected, rows, kind)


def greedy_answers(material: Material, form: Form) -> list[Greedy]:
    """Greedy answers of transformers, each with how sure it is."""
    model = material.load(form)
    return [_greedy(model, ids) for ids in _prompts(material)]


def _prompts(material: Material) -> list[list[int]]:
    """Prompts of training rows, or fixed rows where none are kept; cut to leave room for an answer."""
    texts = [row["generation_prompt"] for row in kept_renderings(material.subject.folder) if "generation_prompt" in row]
    tokenizer = material.runtime.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = ids or [batch["input_ids"][0].tolist() for batch in material.batches()]
    longest = (material.position_limit or sys.maxsize) - _NUM_NEW - 1
    return [prompt[:longest] for prompt in ids[:_NUM_PROMPTS] if prompt]


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int]) -> Greedy:
    ids = torch.tensor([prompt])
    for _ in range(_NUM_NEW):  # by whole passes: no cache that methods or models could treat otherwise
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()  # (new, V)
    best = logits.log_softmax(-1).topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    return Greedy(ids[0].tolist(), len(prompt), best[:, 0].tolist(), margins, float(logits.abs().max()))


def _ask(job: dict[str, Any], path: Path) -> dict[str, Any] | str:
    """The script's answer, or the last of what it said."""
    path.write_text(json.dumps(job), encoding="utf-8")
    try:
        command = ["node", str(SCRIPT), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"gave no answer in {_SECONDS} s"
    result = Path(job["result"])
    if done.returncode or not result.is_file():
        return "could not read it: " + " ".join((done.stderr or done.stdout).split())[-500:]
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _compared(found: dict[str, Any], expected: list[Greedy], rows: list[dict[str, Any]], kind: str) -> Check:
    client = f"llama.cpp {found['release']} (node-llama-cpp {found['version']})"
    texts = [row for row in rows if "text" in row]
    others = sum([ids] != row["input_ids"] for row, ids in zip(texts, found["tokens"], strict=True))
    if others:
        return Check(client, False, f"makes other tokens than training of {others} of {len(texts)} texts")
    asked = [row["generation_prompt"] for row in rows if "generation_prompt" in row]
    prompts = asked if found["prompts"] is None else found["prompts"]  # a base's GGUF may have no template
    if wrong := [other for text, other in zip(asked, prompts, strict=True) if text != other]:
        return Check(client, False, f"the template in the file renders other prompts than training, such as {wrong[0][:200]!r}")
    return _compared_answers(client, found["answers"], expected, kind, len(texts))


def _compared_answers(client: str, found: list[Any], expected: list[Greedy], kind: str, num_texts: int) -> Check:
    """Fails where probabilities are off, or another token is likeliest where transformers is surer than the tolerance."""
    tolerance = _TOLERANCES.get(kind, _COARSE) * max(1.0, *(answer.largest for answer in expected))
    largest, same, total, wrong = 0.0, 0, 0, 0
    for answer, places in zip(expected, found, strict=True):
        for number, place in enumerate(places):
            logarithm = float(torch.tensor(max(place["expected"], 1e-30)).log())
            largest = max(largest, abs(logarithm - answer.log_probabilities[number]))
            is_same = place["best"] == answer.ids[answer.first + number]
            same, total = same + is_same, total + 1
            wrong += not is_same and answer.margins[number] > 2 * tolerance
    passed = largest <= tolerance and not wrong
    detail = (
        f"{same} of {total} greedy tokens are those of transformers; log-probabilities differ by at most {largest:.2g} "
        f"(allowed {tolerance:.2g})"
    )
    detail += f"; {num_texts} rows of training give the same tokens" if num_texts else ""
    return Check(
        client, passed, detail, {"same_tokens": same, "tokens": total, "max_abs_diff": largest, "tolerance": tolerance}
    )
