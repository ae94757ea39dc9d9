"""LLaMA-Adapter on tensors: the number of layers where the recipe names none."""

from __future__ import annotations

from typing import Any


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """Every layer, where `adapter_layers` is not given."""
    return {"adapter_layers": section.adapter_layers or model.config.get_text_config().num_hidden_layers}
