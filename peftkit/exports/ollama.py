"""`ollama`: a GGUF and the Modelfile that makes an Ollama model of it, with the chat template of training as a Go template."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.gguf import GgufOptions, lint_gguf
from peftkit.exports.llama_cpp import find_go
from peftkit.exports.subject import Subject
from peftkit.section import PositiveInt

MOST_CONTEXT = 8192  # tokens, where num_ctx is not set: Ollama keeps memory for all of them


class OllamaOptions(GgufOptions):
    """Options of the target `ollama`: those of `gguf`, and what its Modelfile says."""

    from_model: str | None = Field(None, description="With `form: adapter`: the base in Ollama, a name or a GGUF file.")
    name: str = Field("adapter", pattern=r"^[\w.\-/:]+$", description="What the model is called in Ollama.")
    num_ctx: PositiveInt | None = Field(None, description="Context in tokens; default: the model's, at most 8,192.")
    go: str | None = Field(None, description="The `go` program, which renders the template; `none`: nothing does.")


def _lint(subject: Subject, options: OllamaOptions) -> Iterator[Finding]:
    yield from lint_gguf(subject, options)
    if options.go not in (None, "none") and find_go(options.go) is None:
        yield Finding(True, f"there is no program {options.go}", "leave it out where there is no Go")
    if options.form == "adapter" and options.from_model is None:
        yield Finding(True, "Ollama puts an adapter onto a base of its own", "name that with `--set from_model=NAME_OR_FILE`")
    if options.form == "merged" and options.from_model is not None:
        yield Finding(True, "from_model has no effect on a merged model", "leave it out, or add `--set form=adapter`")


def launch(subject: Subject, options: OllamaOptions) -> list[str]:
    """The words of the command that makes the model; `$here` is the exported folder."""
    return ["ollama", "create", options.name, "-f", "$here/Modelfile"]


OLLAMA = Exporter(
    name="ollama",
    summary="a GGUF and its Modelfile, with the chat template of training as a Go template",
    section=OllamaOptions,
    module="peftkit.exports.ollama_torch",
    tasks=("CAUSAL_LM",),
    lint=_lint,
    launch=launch,
    requires={"gguf": "gguf"},
)
