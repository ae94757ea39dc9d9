"""The torch side: the only folder that imports torch, transformers and peft at module level."""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# oneDNN, which multiplies bfloat16 on CPUs, and torch's wrapper of it keep kernels for the last 1,024 shapes they met. Rows
# have every length, so that no shape comes again soon: a 41M model held 1.8 GiB after 40 steps, and 0.9 with 64 of them.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

import torch

# Said at import, on every CPU, about kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Notes of the libraries to each other's authors; their warnings for users (UserWarning) stay.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)


@contextlib.contextmanager
def _compiling_when_called() -> Iterator[None]:
    """What is imported meanwhile and decorated by torch.compile is compiled when it is called first."""
    own = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: own(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = own


# peft imports it, and it has four functions compiled: reading torch's compiler is a fifth of all the time until the first step.
with _compiling_when_called(), contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401
