"""The server's work done by vLLM: what it can serve, and its command line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftkit.adapters import CONFIG, read_mapping
from peftkit.errors import RecipeError
from peftkit.exports.vllm import RANKS


def why_not(config: Mapping[str, Any]) -> Iterator[str]:
    """What vLLM cannot do of an adapter's config (vllm/lora/peft_helper.py; it leaves out the patterns without a word)."""
    if config.get("peft_type") != "LORA":
        yield f"it is {config.get('peft_type')}, and vLLM serves LoRA alone; `peftkit convert` makes a LoRA of many methods"
        return
    if config.get("use_dora"):
        yield "vLLM has no DoRA"
    if config.get("modules_to_save"):
        yield f"vLLM takes no modules that are saved whole ({', '.join(config['modules_to_save'])})"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "vLLM would scale all modules alike, without `rank_pattern` and `alpha_pattern`"
    if config.get("r", 0) > RANKS[-1]:
        yield f"its rank is {config['r']}, and vLLM takes at most {RANKS[-1]}"


def vllm_command(base: str, adapters: Mapping[str, Path], host: str, port: int) -> list[str]:
    """`vllm serve` with every adapter.

    Args:
        base: the base model.
        adapters: adapter folders by name.
        host: address to listen at.
        port: port to listen at.

    Raises:
        RecipeError: vLLM cannot serve one of them, with the reasons.
    """
    configs = {name: read_mapping(folder / CONFIG) for name, folder in adapters.items()}
    problems = [f"{name}: {reason}" for name, config in configs.items() for reason in why_not(config)]
    if problems:
        raise RecipeError("--engine vllm cannot serve these adapters:\n  " + "\n  ".join(problems))
    rank = next(known for known in RANKS if known >= max(config["r"] for config in configs.values()))
    modules = [f"{name}={folder.absolute()}" for name, folder in adapters.items()]
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(adapters)), "--lora-modules", *modules]
    return ["vllm", "serve", base, *lora, "--host", host, "--port", str(port)]


def require_vllm() -> None:
    """Raise RecipeError where vLLM is not installed."""
    if shutil.which("vllm") is None:
        raise RecipeError("--engine vllm: there is no `vllm` command; `pip install vllm` brings it (Linux with a GPU)")
