"""The sections of a recipe about what a trained model gives: how it is evaluated, makes vectors, writes. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from peftkit.section import NonNegativeInt, Number, PositiveFloat, PositiveInt, Section
from peftkit.tasks.generations import GENERATION_METRICS, TripleFormat


class EvaluationSection(Section):
    """How to evaluate."""

    batch_size: PositiveInt = Field(16, description="Sequences per process and forward pass.")
    max_rows: PositiveInt | None = Field(None, description="Use only the first rows of each split, a number of rows.")
    max_answer_length: PositiveInt = Field(30, description="QUESTION_ANS: longest answer, in tokens; stored with the adapter.")
    null_score_threshold: Number = Field(
        0.0,
        description="QUESTION_ANS: how much higher than the best answer's the score of `no answer` must be; stored with the "
        "adapter.",
    )
    generation_metrics: list[Literal[*GENERATION_METRICS]] = Field(  # type: ignore[valid-type]
        [],
        description="Have held-out prompts answered at the end of training, and compare the answers with those of the rows. "
        "answer: the part that answer_pattern finds; triples: precision, recall and F1 of (head, relation, tail).",
    )
    generation_rows: PositiveInt | None = Field(
        None, description="Answer only the first rows of each split, a number of rows; default: all that are evaluated."
    )
    answer_pattern: str | None = Field(
        None,
        description="Regular expression with one group, the answer within a text: `#### (.+)` for GSM8K. Numbers are compared "
        "as numbers: 1,200 is 1200.0.",
    )
    bleu_tokenize: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none"] = Field(
        "13a", description="How BLEU splits words, by sacrebleu's name."
    )
    triple_format: TripleFormat = Field(
        "auto",
        description="How answers write triples, for `triples`. json: a list of objects or of lists; tuples: (head, relation, "
        "tail); lines: one `head | relation | tail` a line; auto: as the text looks.",
    )
    triple_keys: tuple[str, str, str] | None = Field(
        None,
        description="Names of head, relation and tail in JSON objects; default: head or subject, relation or predicate, ...",
    )
    samples: NonNegativeInt = Field(
        0, description="At each evaluation, write the answers to so many held-out prompts to metrics.jsonl, a number of rows."
    )
    forgetting: str | None = Field(
        None,
        description="File of texts (txt, or rows with `text`) that the adapter is not about: by how much the loss on them has "
        "risen is measured after training.",
    )


class EmbeddingSection(Section):
    """How texts become vectors and what these learn (FEATURE_EXTRACTION); stored with the adapter."""

    pooling: Literal["auto", "mean", "cls", "last", "max"] = Field(
        "auto",
        description="Which hidden states make the vector: their mean, the first or last token's, the largest values. "
        "auto: last for models that read from left to right, else mean.",
    )
    normalize: bool = Field(True, description="Give vectors the length 1.")
    loss: Literal["auto", "contrastive", "cosine", "triplet"] = Field(
        "auto",
        description="contrastive: tell the positive from those of all other rows of the step; triplet: the positive must be "
        "nearer than the row's own negative; cosine: similarity as scored. auto: cosine for rows with a score, else "
        "contrastive.",
    )
    scale: PositiveFloat = Field(20.0, description="contrastive: what similarities are multiplied by (1 / temperature).")
    margin: PositiveFloat = Field(0.5, description="triplet: how much nearer the positive must be, as a cosine distance.")
    score_range: tuple[Number, Number] = Field(
        (0.0, 1.0), description="cosine: lowest and highest score in the rows, which become the similarities 0 and 1."
    )


class GenerationSection(Section):
    """How answers are generated; stored with the adapter."""

    max_new_tokens: PositiveInt = Field(256, description="Longest answer, in tokens.")
    do_sample: bool = Field(False, description="Sample instead of taking the likeliest token.")
    temperature: PositiveFloat = Field(1.0, description="Temperature of sampling.")
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Sample from the smallest set with this probability."
    )
    top_k: NonNegativeInt = Field(0, description="Sample from so many likeliest tokens; 0: all.")
    num_beams: PositiveInt = Field(1, description="Beams of a beam search; 1: none.")
    repetition_penalty: PositiveFloat = Field(1.0, description="Above 1, tokens seen before become less likely.")
    cache_implementation: Literal["auto", "dynamic", "static"] = Field(
        "auto",
        description="Memory for keys and values. dynamic: grows with the answer; static: laid out in advance, and compiled "
        "on a CUDA GPU. auto: static on a CUDA GPU for 50,000 new tokens or more, where model and method can; else dynamic.",
    )
