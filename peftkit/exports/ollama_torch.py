"""The files of the target `ollama`; llama.cpp reads its GGUF, and Go its template."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peftkit.errors import CertificateError, RecipeError
from peftkit.exports import gguf_torch
from peftkit.exports.base import Check, Material
from peftkit.exports.gguf_torch import ADAPTER, MODEL, begins_with_bos
from peftkit.exports.go_template import Messages, Pieces, UnlikePiecesError, find_pieces
from peftkit.exports.llama_cpp import find_go
from peftkit.exports.ollama import MOST_CONTEXT, OllamaOptions
from peftkit.exports.renderings import asked_with, kept_renderings

SCRIPT = Path(__file__).with_name("render.go")
_SECONDS = 600  # Go compiles its own library before the first program


def write(material: Material, options: OllamaOptions, folder: Path) -> None:
    """Write GGUF and Modelfile."""
    pieces = _pieces(material)
    gguf_torch.write(material, options, folder)
    own = f"FROM ./{MODEL}" if options.form == "merged" else f"FROM {options.from_model}\nADAPTER ./{ADAPTER}"
    lines = [own, *_template_lines(pieces, _beginning(material)), *_parameters(material, options, pieces)]
    if system := material.subject.facts.get("system_prompt"):
        lines.append(f'SYSTEM """{system}"""')
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(material: Material, options: OllamaOptions, folder: Path) -> Check:
    """llama.cpp on the GGUF, and Go's text/template on rows of training; Ollama itself is not asked."""
    found = gguf_torch.check(material, options, folder)
    pieces = _pieces(material)
    if found.passed is False or pieces is None:
        return found
    rendered = _check_template(material, options, pieces.without(_beginning(material)))
    clients = " and ".join(check.client for check in (found, rendered) if check.client) or None
    passed = False if rendered.passed is False else True if clients else None
    return dataclasses.replace(found, client=clients, passed=passed, detail=f"{found.detail}; {rendered.detail}")


def _pieces(material: Material) -> Pieces | None:
    """The chat template in pieces; None: there is none.

    Raises:
        RecipeError: it cannot be put into a Go template of pieces.
    """
    subject = material.subject
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    if not tokenizer.chat_template:
        return None
    variables = (subject.facts.get("encoding") or {}).get("chat_template_kwargs") or {}

    def render(messages: Messages, generation: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **variables
            )
        except Exception as error:  # a template raises whatever it likes
            raise UnlikePiecesError(f"refuses messages: {error}") from error
        return text

    try:
        pieces = find_pieces(render)
    except UnlikePiecesError as error:
        what = "--target ollama: the chat template cannot be put into Ollama's Go template: it"
        raise RecipeError(f"{what} {error}; use the target `gguf`, whose file holds the template as it is") from error
    return pieces


def _beginning(material: Material) -> str:
    """What llama.cpp puts in front of every text, so that the template must not."""
    tokenizer = AutoTokenizer.from_pretrained(material.subject.folder)
    return str(tokenizer.bos_token) if begins_with_bos(material.subject.folder, tokenizer) else ""


def _template_lines(pieces: Pieces | None, beginning: str) -> list[str]:
    """The template's line; without one, prompts are texts to go on with."""
    template = pieces.without(beginning).go() if pieces else "{{ .Prompt }}"
    if '"""' in template:
        raise RecipeError("--target ollama: the chat template has three quotation marks, which end a text in a Modelfile")
    return [f'TEMPLATE """{template}"""']


def _parameters(material: Material, options: OllamaOptions, pieces: Pieces | None) -> list[str]:
    """How answers end and are sampled: as in training's generation section."""
    settings = material.subject.facts.get("generation") or {}
    limit = min(int(material.subject.model.get("max_position_embeddings", MOST_CONTEXT)), MOST_CONTEXT)
    values: list[tuple[str, Any]] = [("num_ctx", options.num_ctx or limit)]
    if settings:
        values.append(("num_predict", settings["max_new_tokens"]))
        values.append(("temperature", settings["temperature"] if settings["do_sample"] else 0))
    if settings.get("do_sample"):
        values += [("top_p", settings["top_p"]), *([("top_k", settings["top_k"])] if settings["top_k"] else [])]
    values.append(("repeat_penalty", settings.get("repetition_penalty", 1.0)))  # Ollama's own default changes answers
    stops = [pieces.assistant[1].strip(), pieces.user[0].strip()] if pieces else []
    values += [("stop", f'"{stop}"') for stop in dict.fromkeys(stops) if stop and not set(stop) & set('"\n')]
    return [f"PARAMETER {name} {value}" for name, value in values]


def _check_template(material: Material, options: OllamaOptions, pieces: Pieces) -> Check:
    """Go's rendering of the prompts of training."""
    rows = [row for row in kept_renderings(material.subject.folder) if "generation_prompt" in row]
    asked = [asked_with(row, {}) for row in rows]
    plain = [number for number, variables in enumerate(asked) if not variables["tools"]]
    conversations = [
        [{"role": item["role"], "content": item["content"] or ""} for item in asked[number]["messages"]] for number in plain
    ]
    expected = [rows[number]["generation_prompt"].removeprefix(_beginning(material)) for number in plain]
    if [pieces.render(messages) for messages in conversations] != expected:
        return Check("peftkit", False, "the Modelfile's template renders other prompts than training")
    program = find_go(options.go)
    if program is None:
        return Check.not_here("the Modelfile's template, for want of `go`; nor was Ollama asked")
    version, rendered = run_go(program, pieces.go(), conversations, material.work_dir / "go.json")
    if rendered != expected:
        return Check(version, False, "the Modelfile's template renders other prompts than training")
    return Check(
        version, True, f"the Modelfile's template gives {len(expected)} prompts of training; Ollama itself was not asked"
    )


def run_go(program: str, template: str, conversations: list[Any], path: Path) -> tuple[str, list[str]]:
    """Go's version, and what its text/template makes of conversations."""
    path.write_text(json.dumps({"Template": template, "Conversations": conversations}), encoding="utf-8")
    try:
        version = subprocess.run([program, "version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
        done = subprocess.run(
            [program, "run", str(SCRIPT), str(path)], capture_output=True, text=True, check=True, timeout=_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise CertificateError(f"ollama: Go refuses the Modelfile's template: {error.stderr.strip()[-500:]}") from error
    texts: list[str] = json.loads(done.stdout)
    return f"Go {version.stdout.split()[2].removeprefix('go')} text/template", texts
