"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): prompt P * (u_k v_k^T), P for all tasks, u and v of task k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, VirtualTokens
from peftkit.methods.prompts import NO_WEIGHTS, SET_FROM_MODEL, TWENTY_TOKENS
from peftkit.section import NonNegativeInt, PositiveInt, Section


class MultitaskPromptTuningSection(Section):
    """`adapter:` with `method: multitask_prompt_tuning`. Fields are those of `peft.MultitaskPromptTuningConfig`."""

    method: Literal["multitask_prompt_tuning"] = Field(
        "multitask_prompt_tuning", description="Multitask prompt tuning: one prompt, and low-rank factors for each task."
    )
    num_virtual_tokens: VirtualTokens = 20
    prompt_tuning_init: Literal["RANDOM", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"] = Field(
        "RANDOM",
        description="How it starts: at random, as the tokens of a text, or from an earlier training: its prompt and the mean "
        "of its tasks' factors, its prompt and the factors of one task, or its prompt alone.",
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="That text; it is repeated or cut to num_virtual_tokens."
    )
    prompt_tuning_init_state_dict_path: str | None = Field(
        None, min_length=1, description="Run directory or adapter folder of the earlier training."
    )
    prompt_tuning_init_task: NonNegativeInt = Field(0, description="Number of that one task, from 0.")
    num_ranks: PositiveInt = Field(1, description="Rank of a task's factors.")
    num_tasks: PositiveInt = Field(1, description="Number of tasks; rows name theirs in `task_id`.")
    modules_to_save: ModulesToSave = None


def _check(section: MultitaskPromptTuningSection) -> Iterator[tuple[str, str]]:
    init, path = section.prompt_tuning_init, section.prompt_tuning_init_state_dict_path
    if init == "TEXT" and section.prompt_tuning_init_text is None:
        yield "prompt_tuning_init_text", "is missing: `prompt_tuning_init: TEXT` starts from it"
    if init != "TEXT" and section.prompt_tuning_init_text is not None:
        yield "prompt_tuning_init_text", "has no effect without `prompt_tuning_init: TEXT`"
    if "SOURCE" in init and path is None:
        yield "prompt_tuning_init_state_dict_path", f"is missing: `prompt_tuning_init: {init}` starts from it"
    if "SOURCE" not in init and path is not None:
        yield "prompt_tuning_init_state_dict_path", f"has no effect with `prompt_tuning_init: {init}`"
    if init != "EXACT_SOURCE_TASK" and section.prompt_tuning_init_task:
        yield "prompt_tuning_init_task", "has no effect without `prompt_tuning_init: EXACT_SOURCE_TASK`"
    if init in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK") and section.num_tasks != 1:
        yield (
            "num_tasks",
            f"must be 1 with `prompt_tuning_init: {init}`, which gives factors for one task; it is {section.num_tasks}",
        )


MULTITASK_PROMPT_TUNING = Method(
    name="multitask_prompt_tuning",
    summary="One trained prompt for several tasks, with low-rank factors for each (Wang et al. 2023)",
    section=MultitaskPromptTuningSection,
    kind="prompt",
    virtual_tokens_in="embeddings",
    peft_config="MultitaskPromptTuningConfig",
    not_mergeable=NO_WEIGHTS,
    num_tasks_field="num_tasks",
    virtual_tokens=lambda section: section.num_virtual_tokens,
    size_fields=("num_virtual_tokens",),
    learning_rate=0.1,
    learning_rate_source="ours, one seed: 80 steps of a 5.4M-parameter Llama on answers in capitals, held-out loss "
    "from 4.22 to 3.90 at 1e-2, 3.79 at 3e-2, 3.59 at 0.1, 3.48 at 0.3; below the best, the highest tried",
    left_out={
        **SET_FROM_MODEL,
        "tokenizer_name_or_path": "the model's tokenizer",
        "tokenizer_kwargs": "the model's tokenizer is loaded already",
    },
    other_defaults=TWENTY_TOKENS,
    check=_check,
    runtime_module="peftkit.methods.prompt_tuning_torch",
    reads_adapters={"prompt_tuning_init_state_dict_path": "MULTITASK_PROMPT_TUNING"},
    starter={"num_tasks": "2"},
)
