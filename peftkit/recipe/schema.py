"""The recipe: every key, its type, its default and its meaning. A default is written here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, model_validator
from pydantic_core import PydanticKnownError

from peftkit.formats import FORMATS
from peftkit.methods import METHODS
from peftkit.recipe.answer_sections import EmbeddingSection, EvaluationSection, GenerationSection
from peftkit.section import NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share
from peftkit.tasks import TASKS

Fraction = Annotated[Number, Field(gt=0.0, lt=1.0)]
Seed = Annotated[NonNegativeInt, Field(lt=2**31)]  # numpy's generators take 32 bits


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _source_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _text_template(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def _sources_as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class QuantizationSection(Section):
    """How the linear layers of the base are quantised while it is loaded; heads and the output embedding never are."""

    method: Literal["bitsandbytes", "torchao", "hqq"] = Field("bitsandbytes", description="The library that quantises.")
    bits: Literal[1, 2, 3, 4, 8] = Field(
        description="Bits of a weight: 4 or 8 with bitsandbytes, 8 with torchao, 1 to 4 or 8 with hqq."
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="bitsandbytes, 4 bits: data type of the weights.")
    double_quant: bool = Field(True, description="bitsandbytes, 4 bits: quantise the scales too (0.4 bits less per weight).")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="bitsandbytes with 4 bits, hqq: type that weights are multiplied in. auto: that of mixed_precision, or of "
        "the weights that are not quantised.",
    )
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        "uint8", description="bitsandbytes, 4 bits: type that packed weights lie in; FSDP needs that of the other weights."
    )
    llm_int8_threshold: NonNegativeFloat = Field(
        6.0, description="bitsandbytes, 8 bits: inputs larger than this are multiplied in 16 bits (LLM.int8); 0: none are."
    )
    group_size: Annotated[PositiveInt, Field(multiple_of=8)] = Field(
        64, description="hqq: weights that share a scale, a multiple of 8."
    )


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(
        min_length=1, description="Hub id or local folder; `embedded/all-MiniLM-L6-v2` is the model of the quickstart extra."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights. auto: bfloat16 on a GPU that has it, float32 elsewhere."
    )
    quantization: QuantizationSection | None = Field(
        None, description="Quantise the frozen linear layers, such as `{bits: 4}` (QLoRA) or `{bits: 8}`."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random builds the model from its config alone, with the seed of the run."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = Field(
        None, description="Attention kernel; default: what transformers picks for the model."
    )
    config_overrides: dict[str, str | int | float | bool | None] = Field(
        {}, description="Keys of the model's config.json to change, such as `hidden_dropout_prob: 0`."
    )
    tokenizer_name_or_path: str | None = Field(None, description="Tokenizer, where it is not the model's own.")
    chat_template: str | None = Field(
        None, description="Path of a Jinja file that replaces the tokenizer's chat template; saved with the adapter."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository brings along.")
    use_safetensors: bool = Field(True, description="false also loads pickle weights, which can run code.")


class SourceSection(Section):
    """Where rows come from."""

    path: str = Field(
        min_length=1,
        description="File (jsonl, json, csv, tsv, parquet, arrow, txt, conll; compressed too), glob, folder, saved dataset, "
        "URL (https://, s3://, gs://, az://) or hub id. Relative paths: the recipe's folder, then the current one.",
    )
    format: Literal["auto", *FORMATS] = Field("auto", description="How rows are laid out; auto recognises it by the columns.")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(
        {},
        description="Our column name -> the name in the file, such as `prompt: question`; dots lead inwards: `answers.0.text`.",
    )
    template: Annotated[dict[str, str], BeforeValidator(_text_template, json_schema_input_type=str | dict[str, str])] = Field(
        {},
        description="Our column name -> Jinja text over the row's columns, such as `prompt: 'Q: {{ question }}'`; runs in a "
        "sandbox. A single text is the column `text`.",
    )
    split: str | None = Field(None, description="Split of a hub or saved dataset, such as `train`.")
    config: str | None = Field(None, description="Configuration of a hub dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    streaming: bool = Field(
        False, description="Read rows while training instead of before, for what fits neither memory nor disk; needs max_steps."
    )
    weight: PositiveFloat | None = Field(
        None, description="Share of this source in a mixture of several, relative to the others'; default: every row once."
    )
    max_rows: PositiveInt | None = Field(None, description="Use only the first rows, a number of rows.")


Source = Annotated[SourceSection, BeforeValidator(_source_from_text, json_schema_input_type=str | SourceSection)]
Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(_sources_as_list, json_schema_input_type=str | SourceSection | list[str | SourceSection]),
]


class DataSection(Section):
    """The rows and how they become token ids."""

    train: Sources = Field(description="Rows to learn from: a path, a section with path and format, or a list of them.")
    validation: Fraction | Sources | None = Field(
        None,
        description="Rows to evaluate on during training: a fraction of train (0 to 1), or sources like train; a path alone has"
        " the format, columns and template of train.",
    )
    test: Sources | None = Field(None, description="Rows to evaluate on once, at the end.")
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "all_exhausted",
        description="When a mixture with weights ends: with the first source that has no more rows, or with the last one, the "
        "others starting over.",
    )
    max_length: PositiveInt = Field(1024, description="Longest example, in tokens.")
    truncation: Literal["error", "left", "right", "drop", "split"] = Field(
        "error",
        description="What to do with longer examples: stop, cut at the left or right end, leave the row out, or make several "
        "examples of it.",
    )
    train_on: Literal["completion", "all", "last_turn", "assistant"] = Field(
        "completion",
        description="Which tokens are learned: completions and all assistant turns, every token, the last assistant turn "
        "alone, or assistant turns alone (rows without turns are refused).",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="What to do with rows that cannot be trained on: stop, or leave them out, counted and listed."
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Lay rows end to end instead of padding them (CAUSAL_LM): the same loss, without work on padding. Rows "
        "never see each other. true: the rows of a step in sequences of max_length; auto: those of a pass in one sequence, "
        "where the model's attention can run row by row.",
    )
    cache: bool = Field(True, description="Keep tokenised rows (in the hub's cache folder) for the next start.")
    audit_rows: PositiveInt = Field(
        1000, description="Rows of a stream that are checked before training; files are checked whole."
    )
    shuffle_buffer_size: PositiveInt = Field(10_000, description="Rows of a stream that are held to shuffle among them.")
    labels: list[str] | None = Field(
        None, description="Names of the classes (or tags) in order; default: those found in train, sorted."
    )
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = Field(
        "auto",
        description="SEQ_CLS: what a label is. auto: a list of names is multi-label, a number that is not whole is regression, "
        "all else is one class.",
    )
    label_all_tokens: bool = Field(
        False, description="TOKEN_CLS: learn a word's tag at all of its tokens (I- after the first), not at the first alone."
    )
    doc_stride: PositiveInt = Field(
        128, description="QUESTION_ANS: tokens of a long context that two windows share; at most half a window's room for it."
    )
    source_prefix: str | None = Field(
        None, description="SEQ_2_SEQ_LM: text before every source, such as `summarize: `; `infer` puts it there too."
    )
    system_prompt: str | None = Field(None, description="System message for rows that have none.")
    chat_template_kwargs: dict[str, str | int | float | bool] = Field(
        {}, description="Further variables of the chat template, such as `enable_thinking: false`; stored with the adapter."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_alike(cls, data: Any) -> Any:
        """Held-out rows that are a path alone are laid out as the training rows, where those say how they are."""
        train = data.get("train") if isinstance(data, dict) else None
        stated = train if isinstance(train, dict) else {}
        layout = {name: stated[name] for name in ("format", "columns", "template") if name in stated}
        paths = [name for name in ("validation", "test") if layout and isinstance(data.get(name), str)]
        return data | {name: {"path": data[name]} | layout for name in paths} if paths else data

    @property
    def streams(self) -> bool:
        """Whether training rows are read while training."""
        return any(source.streaming for source in self.train)


class TrainingSection(Section):
    """How to train. Names and meanings are those of transformers' TrainingArguments, except batch_size."""

    learning_rate: Literal["auto"] | PositiveFloat = Field("auto", description="Peak learning rate; auto: the method's own.")
    num_train_epochs: PositiveFloat = Field(3.0, description="Passes over the training rows; fractions are allowed.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; replaces num_train_epochs.")
    max_seconds: PositiveFloat | None = Field(
        None,
        description="Stop after so many seconds of training, evaluations included, with a full checkpoint and exit code 75; "
        "`--resume` goes on and has as many again. Loading is not counted.",
    )
    batch_size: PositiveInt = Field(32, description="Sequences per optimizer step, over all processes together.")
    micro_batch_size: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="Sequences per process and forward pass; the rest is accumulated. auto: as many as fit and are of use, on "
        "a CPU at most 8; halved where the largest pass runs out of memory before the first step.",
    )
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
        "adafactor",
        "lorafa",
        "adamw_bnb_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
    ] = Field(
        "adamw_torch_fused",
        description="Optimizer, by transformers' name; *_bnb_* and paged_* need bitsandbytes. lorafa: LoRA-FA "
        "(arXiv:2308.03303), which trains lora_B alone, with corrected gradients.",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay; biases and norms have none.")
    adam_beta1: Share = Field(0.9, description="Adam's decay of the first moment.")
    adam_beta2: Share = Field(0.999, description="Adam's decay of the second moment.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="Adam's epsilon.")
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None, description="LoRA+ (arXiv:2402.12354): learning rate of lora_B over that of lora_A; the paper uses 16."
    )
    loraplus_lr_embedding: PositiveFloat | None = Field(None, description="LoRA+ learning rate of adapted embeddings; 1e-6.")
    warmup_steps: NonNegativeFloat = Field(0.0, description="Steps of warm-up; below 1, a fraction of all steps.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = Field("linear", description="Schedule of the learning rate, by transformers' name.")
    lr_scheduler_kwargs: dict[str, int | float | str] = Field({}, description="Further arguments of the schedule.")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Clip the norm of all gradients to this; null: no clipping.")
    label_smoothing_factor: Share = Field(0.0, description="Label smoothing, 0 to 1.")
    neftune_noise_alpha: PositiveFloat | None = Field(
        None, description="NEFTune (arXiv:2310.05914): noise on the input embeddings; the paper uses 5 to 15."
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="Autocast of the computation. auto: bf16 for bfloat16 weights, fp16 for float16, else no."
    )
    group_by_length: bool = Field(
        True,
        description="Within a step, put rows of like length into one forward pass: less padding, the same rows and loss.",
    )
    fast_paths: bool = Field(
        True,
        description="Take shorter ways to the same numbers, each proven on the model before the first step: logits at targets "
        "alone, attention row by row, layers in fewer passes over memory.",
    )
    gradient_checkpointing: StrictBool | Literal["selective"] | PositiveInt = Field(
        False,
        description="Recompute layers in the backward pass: less memory, more time. true: all layers; a number: so many of "
        "them, the first ones; selective: all, but keep their products of matrices and attention.",
    )
    activation_offloading: bool = Field(
        False, description="Keep what the backward pass needs in the CPU's memory meanwhile (CUDA): less memory, more time."
    )
    torch_compile: bool = Field(
        False, description="Compile the model's layers by torch.compile: the first steps wait for it, later ones are faster."
    )
    logging_steps: PositiveInt = Field(10, description="Write a line every so many steps.")
    eval_steps: PositiveInt | None = Field(None, description="Evaluate every so many steps; default: at the end of each epoch.")
    eval_on_start: bool = Field(False, description="Evaluate before the first step too.")
    save_steps: PositiveInt | None = Field(
        None, description="Checkpoint every so many steps; default: at the end of each epoch."
    )
    save_total_limit: PositiveInt = Field(2, description="Checkpoints kept; older ones are removed.")
    load_best_model_at_end: bool | None = Field(
        None, description="Keep the best adapter, not the last; default: with validation."
    )
    metric_for_best_model: str | None = Field(None, description="Metric that decides; default: the task's own.")
    early_stopping_patience: PositiveInt | None = Field(None, description="Stop after so many evaluations without a new best.")
    early_stopping_threshold: NonNegativeFloat = Field(0.0, description="How much better counts as a new best.")
    seed: Seed = Field(0, description="Seed of adapter, data order and dropout.")


class OutputSection(Section):
    """Where results go."""

    dir: str = Field("runs", description="Folder in which the run directory is made; `--output` names the directory itself.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Trackers that get the metrics too; each needs its package."
    )


if TYPE_CHECKING:
    _TaskName = str  # the names come from a table, which no type checker can follow
else:
    _TaskName = Literal[*TASKS]


def _adapter(value: Any) -> Any:
    """The section of the method that an adapter names: the union of all, without reading the modules of the others."""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise PydanticKnownError("dict_type")
    if "method" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'method'"})
    name = value["method"]
    if not isinstance(name, str) or name not in METHODS:
        allowed = {"discriminator": "'method'", "tag": str(name), "expected_tags": ", ".join(METHODS)}
        raise PydanticKnownError("union_tag_invalid", allowed)
    return METHODS[name].section.model_validate(value)


class Recipe(Section):
    """One training run, as the YAML file says it."""

    name: str | None = Field(None, pattern=r"^[\w.\-]+$", description="Name of the run; default: the name of the recipe file.")
    task: Annotated[_TaskName, BeforeValidator(_upper)] = Field(description="Task type, by PEFT's name, in any case.")
    model: ModelSection = Field(description="The base model.")
    adapter: Annotated[Any, BeforeValidator(_adapter)] = Field(description="The adapter method and its fields.")
    data: DataSection | None = Field(None, description="The rows; needed for everything but `params`.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="How to train.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="How to evaluate.")
    embedding: EmbeddingSection = Field(default_factory=EmbeddingSection, description="How texts become vectors.")
    generation: GenerationSection = Field(default_factory=GenerationSection, description="How answers are generated.")
    output: OutputSection = Field(default_factory=OutputSection, description="Where results go.")
