"""The errors that opening a saved model can raise, and what they say.

Models are opened with `trust_remote_code=False`: otherwise transformers asks on the terminal whether to run their code.
"""

from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..errors import one_line

# What from_pretrained raises for files that are missing, damaged, or of something else.
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)


def why_not_opened(error: BaseException, text_of: Callable[[BaseException], str] = one_line) -> str:
    """What an error of `from_pretrained` says, in one line: for a model with code of its own, that it is not run."""
    text = text_of(error)
    return "it needs the model's own code, which hf-prune does not run" if "trust_remote_code" in str(error) else text
