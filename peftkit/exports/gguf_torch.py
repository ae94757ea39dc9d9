"""The files of the target `gguf`, and llama.cpp as the client that reads them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from peftkit.errors import LoadError, RecipeError
from peftkit.exports.base import Check, Dtype, Material
from peftkit.exports.gguf import ARCHITECTURES, WRITTEN_HERE, GgufOptions, find_quantizer, not_written, rope_of
from peftkit.exports.gguf_vocab import read_vocabulary
from peftkit.exports.llama_cpp import name_added_tokens
from peftkit.exports.llama_cpp_torch import check_with_llama_cpp
from peftkit.exports.lora_torch import read_layers, uniform
from peftkit.exports.renderings import kept_renderings

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
_DTYPES: dict[str, Dtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}
_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # gguf.LlamaFileType, of most of the tensors
_PERMUTED = ("attn_q", "attn_k")


def write(material: Material, options: GgufOptions, folder: Path) -> None:
    """Write model.gguf or adapter.gguf."""
    if options.llama_cpp is not None:
        _convert(material, options, folder)
    elif options.form == "adapter":
        write_lora(material, folder / ADAPTER)
        _copy_template(material, folder)
    else:
        write_model(material.merged(_DTYPES.get(options.dtype, "auto")), folder / MODEL, options.dtype)


def check(material: Material, options: GgufOptions, folder: Path) -> Check:
    """Have llama.cpp read it."""
    if options.form == "merged":
        kind = _stored_type(material.merged("auto")) if options.dtype == "auto" else options.dtype
        return check_with_llama_cpp(material, options.client, kind, folder / MODEL)
    if material.subject.quantization is not None:
        return Check.not_here("the adapter was trained on a quantised base, which a GGUF of the base does not round alike")
    base = material.base_dir()
    if base is None:
        return Check.not_here(f"the files of {material.subject.base} are not on this machine")
    if not any(not_written(material.subject)):
        write_model(base, material.work_dir / "base.gguf", "f32")
    elif options.llama_cpp is not None:
        source = _with_special_tokens(base, material.work_dir / "base")
        _convert_model(Path(options.llama_cpp), source, "f32", material.work_dir / "base.gguf")
    else:
        return Check.not_here(f"no GGUF of the base {material.subject.base} can be written to put it onto")
    return check_with_llama_cpp(material, options.client, "f32", material.work_dir / "base.gguf", folder / ADAPTER)


def _copy_template(material: Material, folder: Path) -> None:
    """The chat template of training, which a GGUF of the base need not have: `llama-server --chat-template-file`."""
    if material.runtime.tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(material.runtime.tokenizer.chat_template, encoding="utf-8")


def write_model(source: Path, target: Path, kind: str) -> None:
    """Write a transformers folder of a Llama-family model as a GGUF, one tensor at a time.

    Args:
        source: folder with config.json, safetensors and tokenizer.json.
        target: file to write.
        kind: type of matrices; `auto`: that of the stored weights. Vectors are in float32, as llama.cpp wants them.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind = _stored_type(source) if kind == "auto" else kind
    architecture = ARCHITECTURES[config["architectures"][0]]
    names = _names(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, architecture)
    _add_facts(writer, config, kind)
    _add_vocabulary(writer, source, config)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    stored = list(_stored_tensors(source, bool(config.get("tie_word_embeddings"))))
    for _, name, shape in stored:
        _announce(writer, _gguf_name(names, name), shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for path, name, shape in stored:
        with safe_open(path, "pt") as handle:
            data = _ordered(handle.get_tensor(name).float(), _gguf_name(names, name), architecture, config).numpy()
        writer.write_tensor_data(gguf.quants.quantize(data, _type_of(shape, kind)))
    writer.close()


def write_lora(material: Material, target: Path) -> None:
    """Write a LoRA for llama.cpp, whose scale is alpha / rank: that of rsLoRA and patterns become one number."""
    subject = material.subject
    config = dict(subject.model)
    architecture = ARCHITECTURES[subject.architecture]
    names = _names(architecture, config["num_hidden_layers"])
    layers, _, alpha = uniform(read_layers(subject))
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer in layers:
        name = _gguf_name(names, f"{layer.name}.weight")
        writer.add_tensor(f"{name}.lora_a", layer.a.float().numpy())
        writer.add_tensor(f"{name}.lora_b", _ordered(layer.b.float(), name, architecture, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_type(source: Path) -> str:
    """The type of a folder's weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return _OF_DTYPE[str(config.get("dtype") or config.get("torch_dtype") or "float32")]


def _names(architecture: str, num_layers: int) -> gguf.TensorNameMap:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, num_layers)


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise LoadError(f"the tensor {name} has no place in a GGUF of this architecture")
    return found


def _stored_tensors(source: Path, is_tied: bool) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every tensor; no output layer where it is the input embedding."""
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                if not (is_tied and name == "lm_head.weight"):
                    yield path, name, tuple(handle.get_slice(name).get_shape())


def _type_of(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor: vectors stay in float32; rows that do not fill blocks of 32 are in float16, as in llama.cpp."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    quantised = _type_of(shape, kind)
    if quantised in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if quantised == gguf.GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        return
    in_bytes = gguf.quants.quant_shape_to_byte_shape(shape, quantised)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), raw_dtype=quantised)


def _ordered(tensor: torch.Tensor, name: str, architecture: str, config: dict[str, Any]) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order for `llama`: pairs that are rotated together lie side by side there."""
    part = next((part for part in _PERMUTED if f".{part}." in name), None)
    if architecture != "llama" or part is None:
        return tensor
    heads = config["num_attention_heads"]
    heads = heads if part == "attn_q" else config.get("num_key_value_heads") or heads
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _add_facts(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    heads, rope = config["num_attention_heads"], rope_of(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def _rope_factors(config: dict[str, Any]) -> Any:
    """What Llama 3.1 divides rotary frequencies by (transformers.modeling_rope_utils, `llama3`); None for other types."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float64) / size)
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((old / lengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    """Tokens, the ends that stop an answer, and the chat template, as transformers' tokenizer has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    vocabulary = read_vocabulary(json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), config["vocab_size"])
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(begins_with_bos(source, tokenizer))
    writer.add_add_eos_token(False)  # an answer follows every prompt
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, _turn_end(source, tokenizer)),
    ):
        if number is not None:
            add(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def begins_with_bos(source: Path, tokenizer: Any) -> bool:
    """Whether texts begin with BOS as they did in training or, where no rows of it are kept, by the tokenizer's own rule.

    llama.cpp adds it, or not, whatever the chat template writes.
    """
    rows = kept_renderings(source)
    ids = rows[0]["input_ids"][0] if rows else tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _turn_end(source: Path, tokenizer: Any) -> int | None:
    """The second token that ends an answer, where generation_config.json names one."""
    path = source / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    others = [end for end in ends if end != tokenizer.eos_token_id] if isinstance(ends, list) else []
    return others[0] if others else None


def _convert(material: Material, options: GgufOptions, folder: Path) -> None:
    """Have llama.cpp's converter write what is not written here, and its quantizer what is below q8_0."""
    tools = Path(options.llama_cpp or "")
    if options.form == "adapter":
        _convert_lora(material, tools, "f32" if options.dtype == "auto" else options.dtype, folder / ADAPTER)
        _copy_template(material, folder)
        return
    plain = options.dtype if options.dtype in WRITTEN_HERE else "auto"
    target = folder / MODEL if plain == options.dtype else material.work_dir / "plain.gguf"
    source = material.merged(_DTYPES.get(plain, "auto"))
    if any(not_written(material.subject)):
        _convert_model(tools, source, plain, target)
    else:
        write_model(source, target, plain)
    if plain != options.dtype:
        _run([str(find_quantizer(tools)), str(target), str(folder / MODEL), options.dtype.upper()])


def _convert_model(tools: Path, source: Path, kind: str, target: Path) -> None:
    _run([sys.executable, str(tools / "convert_hf_to_gguf.py"), str(source), "--outfile", str(target), "--outtype", kind])


def _with_special_tokens(base: Path, folder: Path) -> Path:
    """A folder of links to the base's files, whose tokenizer names its special tokens to the converter."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = folder / "tokenizer_config.json"
    if config.exists() and (folder / "tokenizer.json").exists():
        text = config.read_text(encoding="utf-8")
        config.unlink()  # the link
        config.write_text(text, encoding="utf-8")
        name_added_tokens(folder)
    return folder


def _convert_lora(material: Material, tools: Path, kind: str, target: Path) -> None:
    base = material.base_dir()
    if base is None:
        raise RecipeError(f"--set llama_cpp: its converter needs the base {material.subject.base} on this machine")
    arguments = [str(material.subject.folder), "--base", str(base), "--outfile", str(target), "--outtype", kind]
    _run([sys.executable, str(tools / "convert_lora_to_gguf.py"), *arguments])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise LoadError(f"{Path(command[1] if len(command) > 1 else command[0]).name} has failed:\n{last}")
