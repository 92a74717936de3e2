"""What a training or evaluation step is given.

B: sequences of one data-parallel rank, T: tokens of a sequence (`data.seq_len`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch.nn.functional.cross_entropy's own default for "not counted".
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """B rows, from a loader on the CPU; the label at [b, t] is the token that follows the one at [b, t].

    tokens_BT, labels_BT: int64; a position whose label is IGNORED_LABEL is not counted. others: the task's own columns,
    see `tasks/base.py`. documents_BT: int32 or int64, the document that each position belongs to, rising from 0 along
    a row; None: each row is one document. Positions that fill a row up are a document of their own, without a label.
    """

    tokens_BT: "Tensor"
    labels_BT: "Tensor"
    others: "Mapping[str, Tensor]" = field(default_factory=dict)
    documents_BT: "Tensor | None" = None

    @classmethod
    def of(cls, columns: "Mapping[str, Tensor]") -> "Batch":
        """Inverse of `columns`."""
        others = dict(columns)
        tokens_BT, labels_BT = others.pop("tokens"), others.pop("labels")
        documents_BT = others.pop("documents", None)
        return cls(tokens_BT, labels_BT, others, documents_BT)

    def columns(self) -> "dict[str, Tensor]":
        """All by name."""
        packed = {} if self.documents_BT is None else {"documents": self.documents_BT}
        return {"tokens": self.tokens_BT, "labels": self.labels_BT, **packed, **self.others}

    def split(self, rows: int) -> "list[Batch]":
        """Views of `rows` rows each."""
        assert len(self.tokens_BT) % rows == 0, f"{len(self.tokens_BT)} rows do not make whole parts of {rows}"
        parts = {name: column.split(rows) for name, column in self.columns().items()}
        return [Batch.of(dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]

    def to(self, device: "torch.device") -> "Batch":
        return Batch.of({name: column.to(device, non_blocking=True) for name, column in self.columns().items()})
