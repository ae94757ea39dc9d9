"""The torch side: the only folder that imports torch, transformers and peft at module level."""

import logging
import warnings

# Said at import, on every CPU, about kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Notes of the libraries to each other's authors; their warnings for users (UserWarning) stay.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
