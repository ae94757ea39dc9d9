"""An adapter folded into the weights of its base, one layer at a time: PEFT's own merge of each, in the dtype they have."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.in_files import Keep
from peftkit.engine.modules import with_conv1d
from peftkit.errors import RecipeError
from peftkit.methods import METHODS


def folded(model: nn.Module, method: str, keep: Keep) -> Any:
    """The plain model that does what base and adapter do; the adapter's model is used up.

    Args:
        model: base and adapter, in the dtype to compute in.
        method: its method, for messages.
        keep: where the new weights go: no more than one layer's are in memory.

    Raises:
        RecipeError: PEFT cannot merge it.
    """
    if not isinstance(model, PeftModel):
        return with_conv1d(model, keep)  # trained in the base's own tensors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties that merging breaks: the comparison of logits decides
            _untie(model.get_base_model(), keep)
            for name, layer in _adapted_layers(model.get_base_model()):
                _put(model.get_base_model(), name, _plain(model, layer, keep))
            return with_conv1d(model.merge_and_unload(), keep)  # of what is left: the config
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise_if_exhausted(error)
        kind = "" if method in METHODS else f" ({method})"
        raise RecipeError(f"--adapter: this adapter cannot be merged{kind}: {error or type(error).__name__}") from error


def _adapted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost layers of PEFT: those in them are merged with them."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found[-1:])
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            found.append((name, module))
    return found


def _plain(model: PeftModel, layer: nn.Module, keep: Keep) -> nn.Module:
    """The layer that stands for one of PEFT's."""
    if isinstance(layer, ModulesToSaveWrapper):  # PEFT 0.21 cannot put all of them into their places
        plain: Any = layer.modules_to_save[layer.active_adapters[0]]
    else:
        alone = nn.Module()
        alone.layer = layer
        tuner = copy.copy(model.base_model)  # the same, but for a model of this layer only
        tuner._modules = {"model": alone}
        plain = tuner.merge_and_unload(safe_merge=True).layer
    for parameter in plain.parameters():
        parameter.data = keep(parameter.data)
    return plain


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _untie(model: Any, keep: Keep) -> None:
    """Give the output embedding weights of its own where one of a tied pair is adapted: merging would change both.

    Trained tokens are left alone: PEFT trains those of a tied pair as one.
    """
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = any(isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer) for layer in pair)
    if adapted and pair[1] is not None and pair[0].weight is pair[1].weight:
        output = pair[1].get_base_layer() if isinstance(pair[1], BaseTunerLayer) else pair[1]
        output.weight = nn.Parameter(keep(output.weight.detach().clone()), requires_grad=False)
        model.config.tie_word_embeddings = False
