"""`vllm`: an adapter folder (or merged model) that vLLM serves, with the command that does.

The rules are those of vLLM 0.33.0: vllm/lora/peft_helper.py (settings), lora_model.py and utils.py (names of tensors),
vllm/config/lora.py (ranks), the classes that implement SupportsLoRA (architectures). Older releases refuse more: every
`modules_to_save`, and they pass over patterns of ranks in silence, so that these are rewritten here.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.lora import MERGE, lora_findings, rank_of
from peftkit.exports.serving import ServingOptions, base_findings
from peftkit.exports.subject import Subject

VERSION = "vLLM 0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_HEADS = ("classifier", "score")
_WITHOUT_LORA = (
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "MambaForCausalLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "RobertaForTokenClassification",
    "StableLmForCausalLM",
)


def _lint(subject: Subject, options: ServingOptions) -> Iterator[Finding]:
    yield from base_findings(subject, options)
    if options.form == "merged":
        return
    yield from lora_findings(subject, VERSION, takes_embeddings=True, heads=_HEADS)
    if rank_of(subject) > RANKS[-1]:
        yield Finding(True, f"{VERSION} takes ranks up to {RANKS[-1]} (--max-lora-rank); this one is {rank_of(subject)}", MERGE)
    if subject.architecture in _WITHOUT_LORA:
        yield Finding(True, f"{VERSION} takes no LoRA for {subject.architecture}", MERGE)
    if subject.adapter.get("modules_to_save"):
        yield from _heads(subject)


def _heads(subject: Subject) -> Iterator[Finding]:
    """A head that was trained whole takes the place of one that the base must have."""
    others = [name for name in subject.shapes if ".lora_" not in name]
    allowed = tuple(f".{head}.{kind}" for head in _HEADS for kind in ("weight", "bias"))
    if unknown := [name for name in others if not name.endswith(allowed)]:
        yield Finding(
            True, f"{VERSION} has no place for {unknown[0]}: its heads are one linear layer, {' or '.join(_HEADS)}", MERGE
        )
    elif subject.model and not subject.architecture.endswith("Classification"):
        yield Finding(True, f"the base is a {subject.architecture}, which has no head that the adapter's could replace", MERGE)
    else:
        yield Finding(False, f"{VERSION} is the first known here to take a trained head; older ones refuse modules_to_save")


def max_rank(rank: int) -> int:
    """What --max-lora-rank is told for adapters up to this rank."""
    return next(known for known in RANKS if known >= rank)


def pooling_words(task: str) -> list[str]:
    """The part of its command line that says that nothing is generated."""
    pooling = {"SEQ_CLS": "classify", "TOKEN_CLS": "classify", "FEATURE_EXTRACTION": "embed"}.get(task)
    return ["--runner", "pooling", "--convert", pooling] if pooling else []


def launch(subject: Subject, options: ServingOptions) -> list[str]:
    """The words of the command; `$here` is the exported folder."""
    kind = pooling_words(subject.task)
    if options.form == "merged":
        return ["vllm", "serve", "$here", "--served-model-name", options.name, *kind]
    revision = ["--revision", subject.revision] if subject.revision else []
    adapter = ["--enable-lora", "--lora-modules", f"{options.name}=$here", "--max-lora-rank", str(max_rank(rank_of(subject)))]
    files = {"--chat-template": "chat_template.jinja", "--generation-config": "generation_config.json"}
    # A folder for the one, a file for the other.
    places = {"--chat-template": "$here/chat_template.jinja", "--generation-config": "$here"}
    beside = [word for flag, name in files.items() if (subject.folder / name).is_file() for word in (flag, places[flag])]
    return ["vllm", "serve", subject.base, *revision, *adapter, *beside, *kind]


VLLM = Exporter(
    name="vllm",
    summary="an adapter folder for vLLM (or a merged model), with the command that serves it",
    section=ServingOptions,
    module="peftkit.exports.serving_torch",
    tasks=("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"),
    lint=_lint,
    launch=launch,
)
