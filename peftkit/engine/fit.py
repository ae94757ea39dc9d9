"""Settings under which a run fits into so much memory, those that cost least time first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.engine.blueprint import Blueprint, draw_blueprint
from peftkit.engine.fast import find_fast_paths, taken
from peftkit.engine.largest import largest_pass
from peftkit.engine.memory import MemoryPlan, phases_of, trace_step
from peftkit.engine.quantizing import settle_quantization
from peftkit.engine.savings import Checkpointing
from peftkit.engine.stored import stored
from peftkit.engine.survey import Survey
from peftkit.engine.trace import Held
from peftkit.errors import PeftkitError
from peftkit.launch_file import Sharding
from peftkit.plan import MICRO_BATCH, Hardware, make_plan, with_micro_batch
from peftkit.recipe import LoadedRecipe, load_recipe

# Of a GPU's memory, what a run cannot use: CUDA's context, and holes in what the allocator has reserved. PEFT's published runs
# reserved up to 9% more than we find allocated (docs/memory.md).
CONTEXT_BYTES = 512 * 2**20
HOLES = 1.09
MOST_PROPOSALS = 5

_SAME_RESULT = ("training.micro_batch_size", "training.gradient_checkpointing", "training.activation_offloading")
_Base = tuple[str, str, bool]  # what blueprints differ by: dtype, quantisation, and whether lora_A is frozen
Setting = tuple[str, float]  # a `--set` argument and how much longer a step takes with it, very roughly


@dataclass(frozen=True)
class Proposal:
    """Settings that fit.

    Attributes:
        settings: `--set` arguments.
        total: bytes of the plan with them, as it counts.
        needed: bytes of the GPU's memory, with what lies outside the plan.
        time: how much longer a step takes, very roughly; 1: as long.
    """

    settings: tuple[str, ...]
    total: int
    needed: int
    time: float

    def report(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        return {"set": list(self.settings), "memory_bytes": self.total, "gpu_bytes": self.needed, "relative_time": self.time}


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory.

    Attributes:
        setting: a `--set` argument.
        saved: bytes less at the fullest moment.
        total: bytes of the plan with it.
        time: how much longer a step takes, very roughly; 1: as long.
    """

    setting: str
    saved: int
    total: int
    time: float

    @property
    def keeps_result(self) -> bool:
        """Whether the loss stays what it is."""
        return self.setting.startswith(_SAME_RESULT)


def remedies_for(loaded: LoadedRecipe, found: Survey, planned: MemoryPlan, sharding: Sharding) -> list[Remedy]:
    """What each setting alone would save, those that leave the result as it is first, then those that cost least time.

    Args:
        loaded: the recipe.
        found: what is known of it.
        planned: its memory.
        sharding: how processes share it.
    """
    search = _Search(loaded, found, sharding)
    tried = [(setting, search.try_out((setting,))) for lever in levers(found) for setting in lever]
    remedies = [Remedy(name, planned.total - with_it.total, with_it.total, time) for (name, time), with_it in tried if with_it]
    useful = [remedy for remedy in remedies if remedy.saved > 0]
    return sorted(useful, key=lambda remedy: (not remedy.keeps_result, remedy.time))


def gpu_of(gib: float, found: Hardware) -> Hardware:
    """The GPU to fit a run into: this machine's, or any that computes in bfloat16, with so much memory."""
    size = round(gib * 2**30)
    if found.device == "cuda":
        return dataclasses.replace(found, memory_bytes=size)
    return dataclasses.replace(found, device="cuda", device_name=f"a GPU of {gib:g} GiB", supports_bf16=True, memory_bytes=size)


def propose(loaded: LoadedRecipe, found: Survey, planned: MemoryPlan, sharding: Sharding) -> list[Proposal]:
    """Settings that fit into the memory of the plan's hardware; the recipe as it is comes first where it fits.

    Args:
        loaded: the recipe.
        found: what is known of it.
        planned: its memory.
        sharding: how processes share it.
    """
    search = _Search(loaded, found, sharding)
    tried = sorted(_combinations(found), key=lambda chosen: (_time(chosen), len(chosen)))
    if not search.fits(tuple(max(values, key=_saves) for values in levers(found) if values)):
        return []
    fitting: list[Proposal] = []
    for chosen in tried:
        if any(set(proposal.settings) <= {setting for setting, _ in chosen} for proposal in fitting):
            continue  # more of what is enough
        proposal = search.try_out(chosen) if chosen else _as_it_is(planned)
        if proposal is not None and proposal.needed <= found.plan.hardware.memory_bytes:
            fitting.append(proposal)
        if len(fitting) == MOST_PROPOSALS or (fitting and not fitting[0].settings):
            break
    return fitting


def levers(found: Survey) -> list[list[Setting]]:
    """What can be changed, by lever: each list holds settings that exclude each other, the ones that save least first."""
    plan, training = found.plan, found.plan.recipe.training
    halves = [plan.micro_batch_size // 2**power for power in range(1, 12) if plan.micro_batch_size >> power]
    micro = [(f"training.micro_batch_size={size}", 1 + 0.02 * number) for number, size in enumerate(halves, 1)]
    checkpointing = [("training.gradient_checkpointing=selective", 1.15), ("training.gradient_checkpointing=true", 1.3)]
    return [
        micro,
        [] if training.gradient_checkpointing else checkpointing,
        [("training.optim=adamw_bnb_8bit", 1.05)] if training.optim.startswith("adamw_torch") else [],
        [] if training.activation_offloading else [("training.activation_offloading=true", 1.25)],
        [("model.dtype=bfloat16", 1.01)] if plan.dtype == "float32" and not plan.method.stands_alone else [],
        _bases(found),
    ]


def _bases(found: Survey) -> list[Setting]:
    if found.plan.quantization is not None:
        return []
    bases = {"8bit": ("model.quantization={bits: 8}", 1.35), "4bit": ("model.quantization={bits: 4}", 1.4)}
    return [setting for name, setting in bases.items() if name in found.plan.method.quantizations]


def _combinations(found: Survey) -> Iterator[tuple[Setting, ...]]:
    for chosen in itertools.product(*([None, *values] for values in levers(found))):
        yield tuple(setting for setting in chosen if setting is not None)


def _time(chosen: Sequence[Setting]) -> float:
    time = 1.0
    for _, factor in chosen:
        time *= factor
    return time


def _saves(setting: Setting) -> float:
    return setting[1]


def _as_it_is(planned: MemoryPlan) -> Proposal:
    return Proposal((), planned.total, needed_bytes(planned.total), 1.0)


def needed_bytes(total: int) -> int:
    """Bytes of a GPU's memory that a plan of so many takes."""
    return round(total * HOLES) + CONTEXT_BYTES


class _Search:
    """Tries settings out; what passes of a shape hold is found once."""

    def __init__(self, loaded: LoadedRecipe, found: Survey, sharding: Sharding) -> None:
        self.loaded, self.found, self.sharding = loaded, found, sharding
        self.blueprints: dict[_Base, Blueprint] = {}
        self.held: dict[tuple[_Base, int, Checkpointing, bool], Held] = {}

    def fits(self, chosen: tuple[Setting, ...]) -> bool:
        """Whether settings are allowed and enough; unknown counts as yes."""
        proposal = self.try_out(chosen)
        return proposal is None or proposal.needed <= self.found.plan.hardware.memory_bytes

    def try_out(self, chosen: tuple[Setting, ...]) -> Proposal | None:
        """The memory of the run with these settings; None where they are refused."""
        settings = tuple(setting for setting, _ in chosen)
        try:
            changed = load_recipe(self.loaded.path, [*self.loaded.overrides, *settings])
            plan = settle_quantization(make_plan(changed, self.found.plan.hardware))
            if plan.decides(MICRO_BATCH):  # what is provisional in it is settled in the run's
                plan = with_micro_batch(plan, self.found.plan.micro_batch_size, "as the run has it")
            base = (plan.dtype, str(plan.quantization), plan.recipe.training.optim == "lorafa")
            if base not in self.blueprints:
                outputs = self.found.data.encoding.num_outputs
                self.blueprints[base] = draw_blueprint(plan, outputs, self.found.tokenizer)
            plan = dataclasses.replace(plan, rows=find_fast_paths(plan, self.blueprints[base].model).rows)
            found = dataclasses.replace(self.found, plan=plan, blueprint=self.blueprints[base])
            total = self._total(found, base)
        except PeftkitError:
            return None
        return Proposal(settings, total, needed_bytes(total), round(_time(chosen), 2))

    def _total(self, found: Survey, base: _Base) -> int:
        plan, model, training = found.plan, found.blueprint.model, found.plan.recipe.training
        runtime = plan.task.runtime(found.tokenizer, found.data.encoding)
        key = (base, plan.micro_batch_size, training.gradient_checkpointing, training.activation_offloading)
        if key not in self.held:
            with taken(plan, model):
                batch, passes = largest_pass(plan, found.data, model, runtime)
            self.held[key], _ = trace_step(found, runtime, batch, accumulates=passes > 1)
        size = stored(plan, model).shared(self.sharding)
        return max(sum(parts.values()) for _, parts in phases_of(found, runtime, size, self.held[key]))
