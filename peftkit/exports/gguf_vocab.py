"""A tokenizer.json as the vocabulary that llama.cpp reads: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama").

llama.cpp has no regular expressions of a file's own: it knows pre-tokenizers by name (`tokenizer.ggml.pre`, its
src/llama-vocab.cpp), so that only those whose expressions are known here can be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
}


class UnknownTokenizerError(ValueError):
    """A tokenizer that cannot be written for llama.cpp here; the message is the end of a sentence."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF's `tokenizer.ggml` keys hold.

    Attributes:
        model: `gpt2` or `llama`.
        pre: name of the pre-tokenizer.
        tokens: by their ids.
        types: llama.cpp's token types.
        scores: of merging to each token, for `llama`; empty for `gpt2`.
        merges: pairs joined by a space, for `gpt2`; empty for `llama`.
        add_space_prefix: whether a space is put in front of texts.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool


def read_vocabulary(tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, for a model whose embedding has `size` rows.

    Raises:
        UnknownTokenizerError: llama.cpp has no name for it, or none that is known here.
    """
    pre = pre_tokenizer_name(tokenizer)
    model = tokenizer["model"]
    entries = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    if pre == "default":
        entries |= {n: (token, BYTE) for n, (token, _) in entries.items() if token.startswith("<0x") and len(token) == 6}
    for added in tokenizer.get("added_tokens") or []:
        entries[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if model.get("unk_token") in model["vocab"]:
        entries[model["vocab"][model["unk_token"]]] = (model["unk_token"], UNKNOWN)
    if max(entries) >= size:
        raise UnknownTokenizerError(f"has the token {max(entries)}, for which the model of {size} tokens has no row")
    rows = [entries.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    tokens, types = [token for token, _ in rows], [kind for _, kind in rows]
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if pre != "default":
        return Vocabulary("gpt2", pre, tokens, types, [], [" ".join(pair) for pair in merges], False)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    # llama.cpp merges to the token of the highest score first: the merges' own order.
    scores = [float(-ranks[token]) if token in ranks else -1e6 for token in tokens]
    return Vocabulary("llama", pre, tokens, types, scores, [], _adds_space(tokenizer))


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer; `default` for SentencePiece's BPE.

    Raises:
        UnknownTokenizerError: it has none, or none that is known here.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise UnknownTokenizerError(f"is of the kind {model.get('type')}; BPE is written here")
    unusual = {part["type"] for part in _flat(tokenizer.get("normalizer"), "normalizers")} - {"NFC", "Prepend", "Replace"}
    if unusual:
        raise UnknownTokenizerError(f"changes texts first ({', '.join(sorted(unusual))}), which llama.cpp does not")
    parts = list(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    if model.get("byte_fallback") and not any(part["type"] == "ByteLevel" for part in parts):
        return "default"
    steps = tuple(step for part in parts for step in _steps(part))
    if steps not in _PRE_TOKENIZERS or any(part.get("add_prefix_space") for part in parts):
        raise UnknownTokenizerError("splits texts in a way that llama.cpp has no name for, or none that is known here")
    return _PRE_TOKENIZERS[steps]


def _flat(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as its steps."""
    if part is not None:
        yield from part[inner] if part["type"] == "Sequence" else [part]


def _steps(part: Mapping[str, Any]) -> Iterator[str]:
    """What a pre-tokenizer's step does, in a word or as its expression."""
    if part["type"] == "ByteLevel":
        yield from ["bytes"] if part.get("use_regex", True) else []
    elif part["type"] == "Digits":
        yield "digits" if part.get("individual_digits") else "numbers"
    else:
        yield str((part.get("pattern") or {}).get("Regex", part["type"]))


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    prepended = any(part["type"] == "Prepend" for part in _flat(tokenizer.get("normalizer"), "normalizers"))
    metaspace = [part for part in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers") if part["type"] == "Metaspace"]
    return prepended or any(part.get("prepend_scheme", "always") != "never" for part in metaspace)
