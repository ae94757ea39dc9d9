"""NEFTune: noise on the input embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.integrations.neftune import neftune_post_forward_hook


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float | None) -> Iterator[None]:
    """A model that adds noise of size `alpha` / sqrt(tokens x width) for as long as the context lasts; None: no noise."""
    if alpha is None:
        yield
        return
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        handle.remove()
        del embeddings.neftune_noise_alpha
