"""`sglang`: an adapter folder (or merged model) that SGLang serves, with the command that does.

The rules are those of SGLang 0.5.23: sglang/srt/lora/lora_config.py, lora_manager.py (validate_new_adapter), lora.py and
utils.py. Its scale is lora_alpha / r for every layer, whatever `use_rslora` and the patterns say: they are rewritten here.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.lora import MERGE, lora_findings, rank_of, targets_of
from peftkit.exports.serving import ServingOptions, base_findings
from peftkit.exports.subject import Subject

VERSION = "SGLang 0.5.23"
_TARGETS = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "in_proj", "embed_tokens", "lm_head"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
    )
)


def _lint(subject: Subject, options: ServingOptions) -> Iterator[Finding]:
    yield from base_findings(subject, options)
    if options.form == "merged":
        return
    yield from lora_findings(subject, VERSION, takes_embeddings=True)
    if unknown := sorted(targets_of(subject) - _TARGETS):
        yield Finding(True, f"{VERSION} puts no LoRA onto {', '.join(unknown)}; it knows {', '.join(sorted(_TARGETS))}", MERGE)
    config = subject.adapter
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        yield Finding(
            False, f"{VERSION} computes lora_alpha / r for every layer: rsLoRA and patterns are rewritten to that, exactly"
        )


def launch(subject: Subject, options: ServingOptions) -> list[str]:
    """The words of the command; `$here` is the exported folder."""
    program = ["python", "-m", "sglang.launch_server"]
    if options.form == "merged":
        return [*program, "--model-path", "$here", "--served-model-name", options.name]
    revision = ["--revision", subject.revision] if subject.revision else []
    has_template = (subject.folder / "chat_template.jinja").is_file()
    template = ["--chat-template", "$here/chat_template.jinja"] if has_template else []
    adapter = ["--enable-lora", "--lora-paths", f"{options.name}=$here", "--max-lora-rank", str(rank_of(subject))]
    return [*program, "--model-path", subject.base, *revision, *adapter, *template]


SGLANG = Exporter(
    name="sglang",
    summary="an adapter folder for SGLang (or a merged model), with the command that serves it",
    section=ServingOptions,
    module="peftkit.exports.serving_torch",
    tasks=("CAUSAL_LM",),
    lint=_lint,
    launch=launch,
)
