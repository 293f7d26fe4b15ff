"""Which numbers of neurons the experts of a mixture can have."""

from transformers import PreTrainedModel

from ..foreign.transformers import computes_experts_together
from .units import Family

# PyTorch's grouped matrix product needs rows of a multiple of so many bytes.
_ROW_BYTES = 16


def row_divisor(family: Family, model: PreTrainedModel) -> int:
    """What a number of units must be a multiple of, so that the model can compute what is left of its experts.

    1 but for neurons of fused experts that are computed in one grouped matrix product.
    """
    parts = [part for group in family.groups for part in group.all_parts if part.expert is not None]
    if family.structure != "neurons" or not parts or not computes_experts_together(model.config):
        return 1
    return max(_ROW_BYTES // model.get_parameter(parts[0].name).element_size(), 1)
