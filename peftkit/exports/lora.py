"""Whether an adapter is a plain LoRA, which is all that other engines take: linear layers, low-rank matrices, one scale."""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.exports.base import Finding
from peftkit.exports.subject import Subject

MERGE = "export a merged model (`--merged`)"

_SETTINGS = {
    "use_dora": "is a DoRA, whose weights are scaled by column",
    "lora_bias": "has biases in its low-rank matrices (lora_bias)",
    "layer_replication": "replicates layers of its base (layer_replication)",
    "alora_invocation_tokens": "is an activated LoRA, which acts only after its invocation tokens",
    "target_parameters": "adapts parameters that are no layers (target_parameters)",
    "trainable_token_indices": "trains single tokens (trainable_token_indices)",
    "arrow_config": "routes tokens among several adapters (arrow_config)",
    "use_bdlora": "has block-diagonal matrices (use_bdlora)",
}
# These change the base's weights when PEFT loads the adapter, whereas an engine takes them as they are.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_findings(subject: Subject, engine: str, *, takes_embeddings: bool, heads: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Why an engine would refuse an adapter that is no plain LoRA, or answer otherwise with it.

    Args:
        subject: the adapter.
        engine: program and version, for the sentences.
        takes_embeddings: whether it puts a LoRA onto embed_tokens and lm_head.
        heads: modules that may be saved whole.
    """
    method = subject.known_method
    if subject.method != "lora":
        ways = ["`peftkit convert` it to a LoRA"] if method is not None and method.to_lora else []
        ways += [] if any(subject.why_not_merged()) else [MERGE]
        remedy = " or ".join(ways) or "nothing turns it into one, nor can it be merged: serve it by peftkit or PEFT"
        yield Finding(True, f"{engine} takes LoRA adapters; this one is of the method {subject.method}", remedy)
        return
    config = subject.adapter
    for name, what in _SETTINGS.items():
        if config.get(name):
            yield Finding(True, f"{engine} takes no such LoRA: it {what}", MERGE)
    if config.get("bias", "none") != "none":
        yield Finding(True, f"{engine} takes no trained biases (bias: {config['bias']})", MERGE)
    if str(config.get("init_lora_weights")).startswith(_CHANGING_INITS):
        yield Finding(True, f"init_lora_weights {config['init_lora_weights']} changes the base when PEFT loads it", MERGE)
    if whole := [name for name in config.get("modules_to_save") or () if name not in heads]:
        yield Finding(True, f"{engine} takes no modules that were trained whole ({', '.join(whole)})", MERGE)
    yield from _tensors(subject, engine, takes_embeddings)


def _tensors(subject: Subject, engine: str, takes_embeddings: bool) -> Iterator[Finding]:
    parts = {name.partition(".lora_")[2].partition(".")[0] for name in subject.shapes if ".lora_" in name}
    if unknown := sorted(parts - {"A", "B", "embedding_A", "embedding_B", "magnitude_vector"}):
        yield Finding(True, f"{engine} takes no such LoRA: beside A and B it has lora_{unknown[0]}", MERGE)
    embeddings = sorted(targets_of(subject) & {"embed_tokens", "lm_head", "wte"})
    if embeddings and not takes_embeddings:
        yield Finding(True, f"{engine} takes no LoRA on {' and '.join(embeddings)}", MERGE)
    elif embeddings and subject.is_tied:
        yield Finding(
            True, f"{' and '.join(embeddings)} share one matrix in this base, and a LoRA on one of them is none on the other"
        )
    rows = {shape[0] for name, shape in subject.shapes.items() if name.endswith("embed_tokens.weight")}
    if rows and subject.model and rows != {subject.model.get("vocab_size")}:
        yield Finding(
            True, f"{engine} keeps the base's {subject.model.get('vocab_size')} tokens; the adapter brings {max(rows)}", MERGE
        )


def rank_of(subject: Subject) -> int:
    """The largest rank of its layers."""
    patterns = subject.adapter.get("rank_pattern") or {}
    return max([int(subject.adapter.get("r") or 0), *map(int, patterns.values())])


def targets_of(subject: Subject) -> set[str]:
    """Last names of the layers that have a LoRA."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in subject.shapes if ".lora_" in name}
