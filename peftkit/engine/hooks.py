"""What a method may do beyond its PEFT config: the functions that its `runtime_module` can define; all may be missing.

Before and while attaching, in this order:
- `config_fields(section, model, context)`: PEFT config fields that a recipe does not state
- `before_attach(model, config, context)`: a pass over data that the initialisation needs; not on the meta device
- `attach(build, model, config, context)`: make the adapted model otherwise than `build(model, config)`, the class, does; for
  methods of kind `modules` it is `attach(model, section, modules_to_save, find_adapter)`, the last one: name -> folder
- `after_attach(adapted, section, context)`: initialisations that need the adapted model

In training:
- `penalty(adapted)`: a term of the loss, once per optimizer step
- `batch_penalty(adapted, batch, loss_sum)`: a term of the loss, summed over the targets of a batch
- `after_step(adapted, step)`: after the optimizer's step, with gradients still there; steps count from 0
- `extra_state(adapted)`, `load_extra_state(adapted, state)`: what a checkpoint needs besides the trained tensors
- `report(adapted)`: what the run's summary should say

Saving and loading:
- `before_save(adapted)`: make the config say what the tensors are
- `adapter_state(adapted)`: the tensors to save, where PEFT's choice is not right; None: PEFT's choice
- `stored_fields(config)`: fields of the saved PEFT config that differ from those of training
- `save(adapted, folder)`: further files of the adapter folder
- `load(build, base, config, folder)`: the adapted model of such a folder; None: load it as any other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import LoadError
from peftkit.methods.base import Method
from peftkit.plan import Plan
from peftkit.recipe.paths import find_adapter
from peftkit.tasks.example import Runtime


@dataclass(frozen=True)
class Context:
    """What is known when an adapter is attached.

    Attributes:
        plan: the plan.
        total_steps: optimizer steps of the run; None where they are not known.
        tokenizer: the model's; None where it is not at hand.
        runtime: the task on tensors; None where only shapes are wanted.
        batches: rows per batch -> batches of one epoch, for initialisations that look at data; None as above.
    """

    plan: Plan
    total_steps: int | None = None
    tokenizer: Any = None
    runtime: Runtime | None = None
    batches: Callable[[int], Iterator[dict[str, Any]]] | None = None

    def find_adapter(self, name: str) -> Path:
        """The folder of an adapter that the recipe names; the rules have found it there."""
        folder = find_adapter(name, self.plan.recipe_dir)
        if folder is None:
            raise LoadError(f"`{name}` is neither a run directory nor an adapter folder")
        return folder.resolve()

    @property
    def shapes_only(self) -> bool:
        """Whether the model is on the meta device."""
        return self.runtime is None


def hook(method: Method, name: str) -> Callable[..., Any] | None:
    """A function of the method's torch side; None where it has none of this name."""
    module = method.runtime()
    return getattr(module, name, None) if module else None


@dataclass(frozen=True)
class ExtraState:
    """A method's own state in the form that checkpoints take: an object with `state_dict`."""

    method: Method
    model: Any

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, and lists and mappings of them."""
        save = hook(self.method, "extra_state")
        return save(self.model) if save else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back."""
        if load := hook(self.method, "load_extra_state"):
            load(self.model, state)
