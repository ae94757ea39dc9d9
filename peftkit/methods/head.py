"""Head only: a linear probe of the frozen base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import EVERY_TASK, OTHER_LAYERS, Method
from peftkit.section import Section


class HeadSection(Section):
    """`adapter:` with `method: head`."""

    method: Literal["head"] = Field("head", description="Only the task's head is trained (linear probe).")
    modules_to_save: list[str] | None = Field(None, description="More modules to train and save whole, such as `pooler`.")


HEAD = Method(
    name="head",
    summary="Head only (linear probe): the base model stays as it is",
    section=HeadSection,
    kind="subset",
    trains_output=True,
    tasks=tuple(task for task in EVERY_TASK if task != "FEATURE_EXTRACTION"),
    why_not="embeddings have no head",
    other_layers=OTHER_LAYERS,
    learning_rate=1e-2,
    learning_rate_source="ours: recipes/quickstart.yaml with `head`: 0.55 at 1e-3, 0.65 at 1e-2, 0.70 at 1e-1 (validation)",
)
