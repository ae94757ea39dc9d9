"""The server's work done by vLLM: its command line, for adapters that it takes as they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from peftkit.errors import RecipeError
from peftkit.exports.lora import rank_of
from peftkit.exports.serving import ServingOptions
from peftkit.exports.subject import Subject
from peftkit.exports.vllm import VLLM, max_rank, pooling_words

_TEMPLATE = "chat_template.jinja"


def vllm_command(subjects: Mapping[str, Subject], host: str, port: int) -> list[str]:
    """`vllm serve` with every adapter.

    Args:
        subjects: adapters of one base, by name.
        host: address to listen at.
        port: port to listen at.

    Raises:
        RecipeError: vLLM cannot serve one of them, or not together, with the reasons.
    """
    problems = [
        f"{name}: {finding.what}" + (f"; {finding.remedy}" if finding.remedy else "")
        for name, subject in subjects.items()
        for finding in VLLM.findings(subject, ServingOptions())
        if finding.refuses
    ]
    templates = {name: subject.folder / _TEMPLATE for name, subject in subjects.items()}
    if len({path.read_bytes() if path.is_file() else b"" for path in templates.values()}) > 1:
        problems.append("they were trained with different chat templates, and it has one for all: serve them apart")
    if problems:
        raise RecipeError("--engine vllm cannot serve these adapters:\n  " + "\n  ".join(problems))
    first, template = next(iter(subjects.values())), next(iter(templates.values()))
    modules = [f"{name}={subject.folder.absolute()}" for name, subject in subjects.items()]
    words = ["vllm", "serve", first.base, *(["--revision", first.revision] if first.revision else [])]
    words += ["--enable-lora", "--max-lora-rank", str(max_rank(max(map(rank_of, subjects.values()))))]
    words += ["--max-loras", str(len(subjects)), "--lora-modules", *modules]
    words += ["--chat-template", str(template.absolute())] if template.is_file() else []
    return [*words, *pooling_words(first.task), "--host", host, "--port", str(port)]


def require_vllm() -> None:
    """Raise RecipeError where vLLM is not installed."""
    if shutil.which("vllm") is None:
        raise RecipeError("--engine vllm: there is no `vllm` command; `pip install vllm` brings it (Linux with a GPU)")
