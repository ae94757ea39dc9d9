"""SEQ_2_SEQ_LM: an encoder reads the prompt, a decoder writes the completion."""

from peftkit.tasks.base import Task
from peftkit.tasks.causal_lm import LANGUAGE_METRICS
from peftkit.tasks.generations import GENERATION_KEYS

SEQ_2_SEQ_LM = Task(
    name="SEQ_2_SEQ_LM",
    summary="encoder-decoder model that turns one text into another; translation, summaries, text labels",
    auto_class="AutoModelForSeq2SeqLM",
    pipeline_tag="text2text-generation",
    reads=(("prompt", "completion"), ("messages",), ("input_ids", "labels")),
    metrics=LANGUAGE_METRICS,
    default_metric="loss",
    generates=True,
    uses_chat_template=False,
    learns_tokens=True,
    has_head=False,
    has_labels=False,
    train_on=(),
    own_keys=("data.source_prefix", *GENERATION_KEYS),
    runtime_module="peftkit.tasks.seq_2_seq_lm_torch",
)
