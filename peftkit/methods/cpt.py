"""CPT (Blau et al. 2024, arXiv:2410.17222): [E(c) + d; E(x)], worked examples c before the input, small trained changes d."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave
from peftkit.methods.prompts import NO_WEIGHTS, SET_FROM_MODEL
from peftkit.section import NonNegativeInt, Number, PositiveFloat, Section


class CptExample(Section):
    """One worked example of the context."""

    prompt: str = Field(min_length=1, description="What the model reads.")
    completion: str = Field(min_length=1, description="What it should answer.")


class CptSection(Section):
    """`adapter:` with `method: cpt`. Fields are those of `peft.CPTConfig`, and `examples`."""

    method: Literal["cpt"] = Field("cpt", description="CPT: worked examples in front of the input, with trained embeddings.")
    examples: list[CptExample] = Field([], description="Worked examples; or give their tokens in cpt_token_ids.")
    cpt_token_ids: list[NonNegativeInt] | None = Field(None, description="Token ids of the context, instead of examples.")
    cpt_mask: list[Literal[0, 1]] | None = Field(None, description="Attention to each token; PEFT attends to all of them.")
    cpt_tokens_type_mask: list[NonNegativeInt] | None = Field(
        None,
        description="Kind of each token: 4 i + 1 and 4 i + 3 for the template around input and output of example i (from 0), "
        "4 i + 2 for its input, 4 i + 4 for its output. Outputs stay as they are and are learned from.",
    )
    opt_weighted_loss_type: Literal["none", "decay"] = Field(
        "none", description="Weights of the examples' own losses: all equal, or less for earlier ones."
    )
    opt_loss_decay_factor: Annotated[Number, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="With decay: weight of an example over that of the next one, 0 to 1."
    )
    opt_projection_epsilon: PositiveFloat = Field(
        0.1, description="Bound of an input token's change, times sqrt(hidden size / 2048)."
    )
    opt_projection_format_epsilon: PositiveFloat = Field(0.1, description="The same for tokens of the template.")
    modules_to_save: ModulesToSave = None


def _check(section: CptSection) -> Iterator[tuple[str, str]]:
    if not section.examples and not section.cpt_token_ids:
        yield "examples", "is missing: give worked examples, or their tokens in `cpt_token_ids` and `cpt_tokens_type_mask`"
    if section.examples and section.cpt_token_ids is not None:
        yield "cpt_token_ids", "cannot be combined with `examples`, which give the tokens"
    yield from _check_masks(section)
    if section.opt_loss_decay_factor != 1.0 and section.opt_weighted_loss_type == "none":
        yield "opt_loss_decay_factor", "has no effect without `opt_weighted_loss_type: decay`"
    if section.opt_loss_decay_factor == 1.0 and section.opt_weighted_loss_type == "decay":
        yield "opt_weighted_loss_type", "`decay` has no effect with `opt_loss_decay_factor: 1`; 0.95 is a usual factor"


def _check_masks(section: CptSection) -> Iterator[tuple[str, str]]:
    ids, kinds = section.cpt_token_ids, section.cpt_tokens_type_mask
    for name, mask in (("cpt_mask", section.cpt_mask), ("cpt_tokens_type_mask", kinds)):
        if mask is not None and ids is None:
            yield name, "has no effect without `cpt_token_ids`"
        elif mask is not None and ids is not None and len(mask) != len(ids):
            yield name, f"must be as long as `cpt_token_ids`, which has {len(ids)} entries; it has {len(mask)}"
    if section.cpt_mask is not None and 0 in section.cpt_mask:
        yield "cpt_mask", "holds a 0, which has no effect: PEFT attends to all tokens; leave such tokens out"
    if ids and kinds is None:
        yield "cpt_tokens_type_mask", "is missing: without it PEFT learns from no token at all (the loss is not a number)"
    if kinds and (max(kinds) == 0 or max(kinds) % 4):
        yield "cpt_tokens_type_mask", f"must have a multiple of 4 as its highest value, the last output; it is {max(kinds)}"
    if kinds and not any(kind % 4 for kind in kinds):
        yield "cpt_tokens_type_mask", "has only outputs, which stay as they are: nothing would be trained"


CPT = Method(
    name="cpt",
    summary="Worked examples in front of the input, whose embeddings are trained within bounds (Blau et al. 2024)",
    section=CptSection,
    kind="prompt",
    virtual_tokens_in="embeddings",
    peft_config="CPTConfig",
    tasks=("CAUSAL_LM",),
    model_kinds=("decoder",),
    why_not="it learns from the examples in its context as from the rows, by predicting their outputs token by token",
    not_mergeable=NO_WEIGHTS,
    virtual_tokens=lambda section: len(section.cpt_token_ids or ()),
    learning_rate=1e-3,
    learning_rate_source="ours, one seed: 80 steps of a 5.4M-parameter Llama on answers in capitals, held-out loss "
    "4.25 at 1e-4, 4.24 at 1e-3 and 1e-2 (4.22 without): the bounds of the changes decide",
    left_out={
        **SET_FROM_MODEL,
        "num_virtual_tokens": "follows from the tokens",
        "tokenizer_name_or_path": "the model's tokenizer",
    },
    own_fields={"examples": "turned into cpt_token_ids, cpt_mask and cpt_tokens_type_mask with the model's tokenizer"},
    check=_check,
    runtime_module="peftkit.methods.cpt_torch",
    starter={"examples": '[{prompt: "...", completion: "..."}]'},
)
