"""Rows of training as they are kept with an adapter, for engines that render and tokenise by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENDERINGS = "renderings.json"


def kept_renderings(folder: Path) -> list[dict[str, Any]]:
    """What `peftkit.engine.parity` wrote: `row`, `input_ids` and, of conversations, `text` and `generation_prompt`."""
    path = folder / RENDERINGS
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["renderings"]
    return rows


def asked_with(row: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a chat template from which the row's `generation_prompt` was rendered."""
    messages = row["row"].get("messages") or row["row"]["chosen"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in asked]
    return {"messages": plain, "tools": row["row"].get("tools"), "add_generation_prompt": True, **settings}
