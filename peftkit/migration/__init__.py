"""Recipes from the configurations of other tools. One module per tool, and this table."""

from __future__ import annotations

from collections.abc import Mapping

from peftkit.migration.base import Tool
from peftkit.table import Table

TOOLS: Mapping[str, Tool] = Table(
    {
        "llamafactory": "peftkit.migration.llamafactory:LLAMAFACTORY",
        "axolotl": "peftkit.migration.axolotl:AXOLOTL",
        "trl": "peftkit.migration.trl:TRL",
    }
)
