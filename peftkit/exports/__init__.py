"""The export targets. One module per target, and this table: grep finds every one of them here."""

from __future__ import annotations

from collections.abc import Mapping

from peftkit.exports.base import Exporter
from peftkit.table import Table

_TARGETS = ("safetensors", "gguf", "vllm", "sglang", "ollama", "onnx", "openvino")

EXPORTS: Mapping[str, Exporter] = Table({name: f"peftkit.exports.{name}:{name.upper()}" for name in _TARGETS})
