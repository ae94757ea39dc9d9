"""CAUSAL_LM: predict the next token."""

from peftkit.tasks.base import Task
from peftkit.tasks.generations import GENERATION_KEYS

LANGUAGE_METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}

CAUSAL_LM = Task(
    name="CAUSAL_LM",
    summary="language model that continues text; instruction and chat tuning, continued pretraining",
    auto_class="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    reads=(
        ("messages",),
        ("prompt", "completion"),
        ("text",),
        ("segments",),
        ("chosen", "rejected"),  # learns the chosen answer
        ("input_ids", "labels"),
    ),
    metrics=LANGUAGE_METRICS,
    default_metric="loss",
    generates=True,
    uses_chat_template=True,
    learns_tokens=True,
    has_head=False,
    has_labels=False,
    train_on=("completion", "all", "last_turn", "assistant"),
    truncations=("error", "left", "right", "drop", "split"),
    packs=True,
    own_keys=("data.chat_template_kwargs", "data.packing", *GENERATION_KEYS),
    runtime_module="peftkit.tasks.causal_lm_torch",
)
