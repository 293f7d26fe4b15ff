"""How `from_pretrained` opens packed models once hf_prune is imported: dense in memory, as if never packed.

transformers knows packed weights as a quantisation, `quant_method: hf_prune` in config.json. The opened model has none:
it is trained, saved and exported as any other. Without `import hf_prune`, transformers does not know the method, and
stops at blocks of bytes that do not have the shapes of the weights.
"""

from types import ModuleType
from typing import Any

from ..errors import PackedError
from ..foreign.transformers import HfQuantizer, QuantizationConfigMixin, dtypes_kept, is_deepspeed_zero3_enabled
from .block import VERSION
from .config_text import METHOD


def register(quantizers: ModuleType) -> None:
    """Make `transformers.quantizers.auto` know the packed format."""
    if METHOD not in quantizers.AUTO_QUANTIZER_MAPPING:
        quantizers.register_quantization_config(METHOD)(PackedConfig)
        quantizers.register_quantizer(METHOD)(PackedQuantizer)


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed model. Raises PackedError for a format of another version."""

    def __init__(self, format_version: int = VERSION, embeddings: str | None = None, **others: Any):
        if format_version != VERSION:
            raise PackedError(
                f"expected packed weights of version {VERSION}, got {format_version!r}; update hf-prune to open them"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.embeddings = embeddings  # what they were rounded to, before they were packed
        self.dequantize = True  # what transformers calls a model that is dense once it is open


class PackedQuantizer(HfQuantizer):
    """Unpacks each tensor of a packed model when it is loaded."""

    requires_calibration = True  # transformers then refuses to "quantise" a dense model with it: hf-prune pack does

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to open a model that DeepSpeed shards while it is loaded."""
        if is_deepspeed_zero3_enabled():
            raise PackedError("expected dense weights under ZeRO-3, got packed ones; write them with hf-prune unpack")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtypes = dtypes_kept(model, kwargs.get("dtype") or model.dtype)
        self._wanted = {
            name: (tensor.shape, next((kept for expression, kept in dtypes if expression.search(name)), tensor.dtype))
            for name, tensor in model.state_dict().items()
        }
        return model

    def get_weight_conversions(self) -> list[Any]:
        """The conversion of all tensors that the model's own conversions leave alone."""
        from .conversion import unpack_alone

        return [unpack_alone(self._wanted)]

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """The model's own conversions, such as merging experts, each after unpacking; then all other tensors."""
        from .conversion import unpack_first

        found = [unpack_first(conversion, self._wanted) for conversion in weight_conversions]
        return found + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check what was loaded, and leave the model's own conversions alone, which saving reverts."""
        from .conversion import without_unpacking

        for name, tensor in model.state_dict().items():
            shape, dtype = self._wanted[name]
            if tensor.shape != shape or tensor.dtype.is_floating_point != dtype.is_floating_point:
                raise PackedError(
                    f"{name}: expected weights of shape {tuple(shape)}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}; the file belongs to another config.json"
                )
        without_unpacking(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """An open model is dense, and saved as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An open model is dense, and can be trained."""
        return True
