"""The errors that opening a saved model can raise."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# What from_pretrained raises for files that are missing, damaged, or of something else.
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
