"""What an adapter method is: a section of the recipe and the facts that answer questions without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from peftkit.section import Section

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]
Quantization = Literal["4bit", "8bit"]  # of bitsandbytes
Layers = Literal["4bit", "8bit", "torchao", "hqq", "gptq", "awq"]
Targets = Literal["", "suffix", "query_value", "key_value_feedforward", "value", "all_linear", "norms", "embedding"]

EVERY_TASK = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
EVERY_KIND: tuple[ModelKind, ...] = ("decoder", "encoder", "encoder-decoder")
WITHOUT_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
BOTH: tuple[Quantization, ...] = ("4bit", "8bit")
OTHER_LAYERS: tuple[Layers, ...] = ("torchao", "hqq", "gptq", "awq")


@dataclass(frozen=True, eq=False, repr=False)  # one of a kind each; what is not generated starts faster
class Method:
    """One adapter method.

    Attributes:
        name: the value of `adapter.method`, PEFT's type name in lower case.
        summary: one line for `peftkit methods`, with the paper.
        section: the recipe section; its fields are PEFT's own.
        kind: where its parameters are. `weights`: in layers that PEFT puts around the base model's; `prompt`: in virtual
            tokens (or keys and values) that PEFT holds; `subset`: among the base model's own; `modules`: in layers of ours.
        learning_rate: what `training.learning_rate: auto` becomes.
        learning_rate_source: where that figure comes from.
        task_learning_rates: task -> (rate, source) where a task wants another one.
        peft_config: class name in `peft`, for `weights` and `prompt`.
        tasks: task types that it works on.
        model_kinds: architectures that it works on.
        tasks_with: task types that this section in particular works on.
        trains_nothing: whether this section puts together what is trained already, in a run of no steps.
        without: pairs of task and architecture among those that it does not work on.
        model_types: `model_type` of the base models that it works on; empty: all of those kinds.
        lacks: why a model of this config.json has nothing for it; empty where it has, or where that cannot be told.
        why_not: why it does not work on the others; empty where it works on all.
        quantizations: bitsandbytes layers that it trains on correctly.
        other_layers: quantised layers of other libraries that it trains on correctly.
        why_not_quantized: what happens on other bitsandbytes layers.
        not_quantized_with: (section, layers) -> (field, sentence) for settings of this section that do not work on such layers.
        not_mergeable: why it can never be merged into the base model; empty where it can.
        not_mergeable_with: reason why this section (or PEFT config: the fields are the same) in particular cannot be merged, or
            an empty string.
        not_one_graph: why base and adapter cannot be traced as one graph for other engines; empty where they can.
        not_packable_with: reason why packed rows would see each other under this section in particular, or an empty string;
            `why_not_packed` adds what follows from other facts.
        several_adapters: whether one base model can hold several of its adapters.
        mixed_batches: whether the rows of one batch can use different adapters.
        changes_base: whether the initialisation of this section changes base weights.
        size_fields: whole numbers that say how many parameters it trains: the first is chosen where methods are to train
            equally many, and the others go with it in proportion (a scale that is divided by the rank).
        targets: which modules are adapted where the recipe does not say and PEFT has no entry for the model type; `suffix`:
            PEFT chooses, and reads what the recipe says as the end of a name.
        linear_only: whether PEFT refuses GPT-2's Conv1D for it, which is then turned into Linear.
        num_tasks_field: the field that holds the number of tasks, for methods that learn from a `task_id` column.
        lora_plus: whether LoRA+ and LoRA-FA, which treat lora_A and lora_B apart, are defined for it.
        virtual_tokens_in: for `prompt`: what they are in front of.
        trains_output: whether it trains the output embedding of a language model, which is no new head.
        trains: for `subset`: whether a parameter of this name is trained; the task's head always is.
        stands_alone: whether the saved folder is a whole model.
        to_lora: whether PEFT can approximate its updates by a LoRA's.
        weight_copies: for methods with `trained_shapes`: how many copies of the weights that it goes into are held for the
            backward pass.
        trained_shapes: (section, in_features, out_features, has a bias) -> shapes trained in one layer, for methods that PEFT
            cannot build on the meta device.
        shared_shapes: shapes that such a method trains once for the whole model.
        needs_whole_weights: whether its shapes depend on the weights' values, so that no plan can count them exactly.
        virtual_tokens: positions that this section takes from the model's.
        no_decay: parts of names of trained matrices that weight decay would pull away from where they start, which is not zero.
        skips_parameters: whether a step of this section can leave trained parameters without a gradient.
        divisible: fields beside which PEFT can divide its matrices like the layers that they are around (tensor parallelism);
            empty where it cannot at all.
        reads_gradients: whether this section looks at gradients after each step (to allot ranks).
        rows_interact: whether the rows of a batch change each other's outputs, so that each must be answered alone.
        not_recomputable: why its layers cannot be recomputed in the backward pass; empty where they can; `why_not_recomputed`
            adds what follows from other facts.
        not_cached: why it generates without a cache of keys and values; empty where it has one.
        not_compilable: why torch.compile gains nothing for it; empty where it does; `why_not_compiled` adds what follows from
            other facts.
        may_be_empty: whether a tensor without elements is a sound result (a rank that was pruned to nothing).
        needs_cuda: the field of this section that works on a CUDA GPU only; empty where none does.
        reads_adapters: field -> PEFT type of the trained adapters that it names, by folder or run directory.
        starter: field -> YAML text that a new recipe states for it, where the default is not what one would begin with.
        requires: Python packages that it needs beyond ours, by import name.
        left_out: PEFT fields that a recipe cannot state, each with the reason.
        own_fields: fields that PEFT's config has not, each with what reads it.
        other_defaults: fields whose default differs from PEFT's, each with the reason.
        check: yields (field, sentence) for settings that cannot work together.
        fits: (section, in_features, out_features) -> (field, sentence) for settings that an adapted linear layer of that size
            cannot take, or that PEFT would change or ignore there.
        runtime_module: module with the torch side, where there is one; see `peftkit.engine.hooks`.
    """

    name: str
    summary: str
    section: type[Section]
    kind: Literal["weights", "prompt", "subset", "modules"]
    learning_rate: float
    learning_rate_source: str
    task_learning_rates: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    peft_config: str = ""
    tasks: tuple[str, ...] = EVERY_TASK
    model_kinds: tuple[ModelKind, ...] = EVERY_KIND
    tasks_with: Callable[[Any], tuple[str, ...]] = lambda section: EVERY_TASK
    trains_nothing: Callable[[Any], bool] = lambda section: False
    without: tuple[tuple[str, ModelKind], ...] = ()
    model_types: tuple[str, ...] = ()
    lacks: Callable[[Mapping[str, Any]], str] = lambda config: ""
    why_not: str = ""
    quantizations: tuple[Quantization, ...] = BOTH
    other_layers: tuple[Layers, ...] = ()
    why_not_quantized: str = ""
    not_quantized_with: Callable[[Any, Layers], Iterator[tuple[str, str]]] = lambda section, layers: iter(())
    not_mergeable: str = ""
    not_mergeable_with: Callable[[Any], str] = lambda section: ""
    not_one_graph: str = ""
    not_packable_with: Callable[[Any], str] = lambda section: ""
    several_adapters: bool = True
    mixed_batches: bool = False
    changes_base: Callable[[Any], bool] = lambda section: False
    size_fields: tuple[str, ...] = ()
    targets: Targets = ""
    linear_only: bool = False
    num_tasks_field: str = ""
    lora_plus: bool = False
    virtual_tokens_in: Literal["", "embeddings", "keys_and_values"] = ""
    trains_output: bool = False
    trains: Callable[[str], bool] = lambda name: False
    stands_alone: bool = False
    to_lora: bool = False
    weight_copies: int = 0
    trained_shapes: Callable[[Any, int, int, bool], list[tuple[int, ...]]] | None = None
    shared_shapes: Callable[[Any], list[tuple[int, ...]]] = lambda section: []
    needs_whole_weights: bool = False
    virtual_tokens: Callable[[Any], int] = lambda section: 0
    no_decay: tuple[str, ...] = ()
    skips_parameters: Callable[[Any], bool] = lambda section: False
    divisible: tuple[str, ...] = ()
    reads_gradients: Callable[[Any], bool] = lambda section: False
    rows_interact: bool = False
    not_recomputable: str = ""
    not_cached: str = ""
    not_compilable: str = ""
    may_be_empty: bool = False
    needs_cuda: Callable[[Any], str] = lambda section: ""
    reads_adapters: Mapping[str, str] = field(default_factory=dict)
    starter: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    own_fields: Mapping[str, str] = field(default_factory=dict)
    other_defaults: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Any], Iterator[tuple[str, str]]] = lambda section: iter(())
    fits: Callable[[Any, int, int], Iterator[tuple[str, str]]] = lambda section, inputs, outputs: iter(())
    runtime_module: str = ""

    @property
    def in_peft(self) -> bool:
        """Whether PEFT holds its parameters."""
        return bool(self.peft_config)

    @property
    def trains_on(self) -> tuple[Layers, ...]:
        """Every kind of quantised layers that it trains on correctly; virtual tokens have nothing to do with layers."""
        return (*self.quantizations, *(OTHER_LAYERS if self.kind == "prompt" else self.other_layers))

    def learning_rate_for(self, task: str) -> tuple[float, str]:
        """The default learning rate for a task, and its source."""
        return self.task_learning_rates.get(task, (self.learning_rate, self.learning_rate_source))

    def why_not_packed(self, section: Section) -> str:
        """Why rows laid end to end in one sequence would not be trained as they are alone; empty where they are."""
        if self.virtual_tokens_in:
            return "its virtual tokens come once for a sequence, in front of the first row alone"
        if self.num_tasks_field:
            return "every row names its task, and a sequence can have one only"
        if self.rows_interact:
            return "what it does to a token depends on all tokens of the batch"
        return self.not_packable_with(section)

    @property
    def why_not_recomputed(self) -> str:
        """Why gradient checkpointing cannot be used with it; empty where it can."""
        if self.virtual_tokens_in == "keys_and_values":
            return "recomputed layers would write their keys and values twice"
        return self.not_recomputable

    @property
    def why_not_compiled(self) -> str:
        """Why torch.compile cannot be used with it; empty where it can."""
        if self.virtual_tokens_in == "keys_and_values":
            return "each layer looks for its own keys and values, and would be compiled for itself"
        return self.not_compilable

    @property
    def why_not_static(self) -> str:
        """Why it cannot generate with a static cache; empty where it can."""
        if self.virtual_tokens_in:
            return "its virtual tokens take places that a static cache has not"
        return self.not_cached

    def peft_fields(self, section: Section) -> dict[str, Any]:
        """The keyword arguments for the PEFT config class, plain values only."""
        return section.model_dump(exclude={"method", *self.own_fields})

    def runtime(self) -> ModuleType | None:
        """The torch side of this method, where it has one."""
        return importlib.import_module(self.runtime_module) if self.runtime_module else None
