"""`gguf`: a file for llama.cpp and what is built on it, the merged model or a LoRA beside its base.

Llama-family models are written by the `gguf` package, which llama.cpp's own converter uses too; other models, and types that
only llama.cpp makes, by the converter in a folder that the user names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from peftkit.exports.base import Exporter, Finding, Form
from peftkit.exports.gguf_vocab import UnknownTokenizerError, pre_tokenizer_name
from peftkit.exports.llama_cpp import find_client
from peftkit.exports.lora import lora_findings
from peftkit.exports.subject import Subject
from peftkit.section import Section

WRITTEN_HERE = ("auto", "f32", "f16", "bf16", "q8_0")
# transformers' class -> GGUF's architecture. All have rotary embeddings, RMS norms and a gated SiLU.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

GgufType = Literal[
    "auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k", "iq4_xs"
]


class GgufOptions(Section):
    """Options of the target `gguf`."""

    form: Form = Field("merged", description="adapter: a LoRA that llama.cpp puts onto a GGUF of the base (`--lora`).")
    dtype: GgufType = Field("auto", description="Type of matrices; auto: the base's. Below q8_0 only with `llama_cpp`.")
    llama_cpp: str | None = Field(None, description="Folder of llama.cpp, for models and types that are not written here.")
    client: str | None = Field(
        None, description="Folder whose node_modules has node-llama-cpp, which reads the file back; `none`: nothing does."
    )


def rope_of(model: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings of a config.json, of transformers 5 or 4."""
    old = {"rope_theta": model.get("rope_theta", 10000.0), **(model.get("rope_scaling") or {})}
    rope = {**old, **(model.get("rope_parameters") or {})}
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def lint_gguf(subject: Subject, options: Any) -> Iterator[Finding]:
    """What llama.cpp would say, or what cannot be written; for `gguf` and what is built on it."""
    if options.client not in (None, "none") and find_client(options.client)[0] is None:
        yield Finding(True, find_client(options.client)[1])
    if options.form == "adapter":
        yield from lora_findings(subject, "llama.cpp", takes_embeddings=False)
    if options.llama_cpp is not None:
        yield from _lint_converter(subject, options)
        return
    remedy = "`--set llama_cpp=FOLDER` has llama.cpp's own converter try"
    if options.dtype not in WRITTEN_HERE:
        yield Finding(True, f"{options.dtype} is made by llama.cpp alone", remedy.replace("converter try", "quantizer do it"))
    if not subject.model:
        yield Finding(False, f"the config.json of {subject.base} is not at hand, so that it cannot be looked at before loading")
        return
    yield from (Finding(True, what, remedy) for what in not_written(subject))


def _lint_converter(subject: Subject, options: Any) -> Iterator[Finding]:
    needs_converter, is_below = any(not_written(subject)), options.dtype not in WRITTEN_HERE
    script = Path(options.llama_cpp) / ("convert_hf_to_gguf.py" if options.form == "merged" else "convert_lora_to_gguf.py")
    if not needs_converter and not is_below:
        yield Finding(True, "llama_cpp has no effect: this model and type are written without it", "leave it out")
    if needs_converter and not script.is_file():
        yield Finding(True, f"there is no {script}", "name a folder of llama.cpp's sources")
    if is_below and (options.form == "adapter" or find_quantizer(Path(options.llama_cpp)) is None):
        yield Finding(True, f"{options.dtype} needs a merged model and llama-quantize in {options.llama_cpp}", "build it there")


def find_quantizer(folder: Path) -> Path | None:
    """llama-quantize in a folder of llama.cpp, where it was built."""
    places = (folder / "build" / "bin" / "llama-quantize", folder / "bin" / "llama-quantize", folder / "llama-quantize")
    return next((place for place in places if place.is_file()), None)


def not_written(subject: Subject) -> Iterator[str]:
    """What a config.json and tokenizer.json have that is not written here."""
    model = dict(subject.model)
    if subject.architecture not in ARCHITECTURES:
        yield f"{subject.architecture or subject.model_type} is none of {', '.join(ARCHITECTURES)}, which are written here"
        return
    if model.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {model['hidden_act']}; llama.cpp computes silu for this architecture"
    rope = rope_of(model)["rope_type"]
    if rope not in ROPE_TYPES:
        yield f"its rotary embedding is of the type {rope}; {', '.join(ROPE_TYPES)} are written here"
    tokenizer = subject.read("tokenizer.json")
    if tokenizer is None:
        yield "it has no tokenizer.json, from which the vocabulary is written"
        return
    try:
        pre_tokenizer_name(tokenizer)
    except UnknownTokenizerError as error:
        yield f"its tokenizer {error}"


GGUF = Exporter(
    name="gguf",
    summary="a file for llama.cpp: the merged model (f32, f16, bf16, q8_0) or a LoRA beside its base",
    section=GgufOptions,
    module="peftkit.exports.gguf_torch",
    tasks=("CAUSAL_LM",),
    lint=lint_gguf,
    requires={"gguf": "gguf"},
)
