"""What a training or evaluation step is given.

B: sequences of one data-parallel rank, T: tokens of a sequence (`data.seq_len`).
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's own default for "not counted"


class Batch(NamedTuple):
    """int64 CPU tensors; the label at [b, t] is the token that follows the one at [b, t]."""

    tokens_BT: "Tensor"
    labels_BT: "Tensor"  # IGNORED_LABEL: this position is not counted
