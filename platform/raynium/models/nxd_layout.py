"""Where our parameters lie in a neuronx-distributed model: which rank holds which rows of what. Needs torch only.

NxD keeps other matrices than the decoder does: gate and up of a layer are one, and a rank's key and value heads may be
copies of another rank's. Both directions go through `pieces`: the engine's state and the import of NxD's own files.
"""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch

from raynium.config.schema import ModelSection
from raynium.models.decoder import Decoder
from raynium.models.plan import Split, tensor_parallel_plan

# Which ranks of a tensor group hold copies of the same key/value head, for 2 heads on 4 ranks:
#   interleaved  0 1 0 1  Trainium1      adjacent  0 0 1 1  Trainium2
KvOrder = Literal["interleaved", "adjacent"]

# The dim of a weight that a split divides; None: every rank has all of it.
_DIM_OF_SPLIT: dict[Split, int | None] = {
    **{"vocabulary": 0, "column": 0, "logits": 0, "row": 1},
    **{"sequence": None, "heads": None, "gather": None},
}


class Piece(NamedTuple):
    """One rank's block of one of our parameters: rows `row` to `row + shape[0]` of a parameter of the NxD model.

    name: ours, e.g. "blocks.0.ffn.up.weight". stored: in the NxD model, e.g. "blocks.0.ffn.gate_up.weight". offsets:
    where the block begins in our parameter. first_holder: of the tensor ranks that hold the same block this one saves
    it.
    """

    name: str
    stored: str
    row: int
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    first_holder: bool

    def rows(self, begin: int, end: int) -> "Piece | None":
        """What rows begin..end of the stored parameter hold of this block; None if nothing."""
        low, high = max(begin, self.row), min(end, self.row + self.shape[0])
        if low >= high:
            return None
        return self._replace(
            row=low,
            shape=(high - low, *self.shape[1:]),
            offsets=(self.offsets[0] + low - self.row, *self.offsets[1:]),
        )


class Heads(NamedTuple):
    """The attention heads of one tensor rank.

    copy: which copy of its key/value heads this rank holds; 0: the one that counts.
    """

    first_query: int
    num_query: int
    first_kv: int
    num_kv: int
    copy: int


def kv_copies(model: ModelSection, tensor_size: int) -> int:
    """How many ranks of a tensor group hold each key/value head (NxD's kv_size_multiplier); 1: no rank shares."""
    assert model.num_kv_heads % tensor_size == 0 or tensor_size % model.num_kv_heads == 0
    return max(1, tensor_size // model.num_kv_heads)


def heads_of_rank(model: ModelSection, *, tensor_rank: int, tensor_size: int, kv_order: KvOrder) -> Heads:
    """Query heads go where their key/value head is, so under "interleaved" a rank's are not the rank-th of all."""
    copies = kv_copies(model, tensor_size)
    num_query, num_kv = model.num_heads // tensor_size, model.num_kv_heads * copies // tensor_size
    if copies == 1:
        return Heads(tensor_rank * num_query, num_query, tensor_rank * num_kv, num_kv, copy=0)
    if kv_order == "interleaved":
        copy, head = divmod(tensor_rank, model.num_kv_heads)
    else:
        head, copy = divmod(tensor_rank, copies)
    return Heads((head * copies + copy) * num_query, num_query, head, num_kv, copy)


def pieces(model: ModelSection, *, tensor_rank: int, tensor_size: int, kv_order: KvOrder) -> list[Piece]:
    """Every parameter's block on one tensor rank, in the order of the decoder's parameters; tied ones once."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Decoder(model).named_parameters()}
    plan = tensor_parallel_plan(model)
    heads = heads_of_rank(model, tensor_rank=tensor_rank, tensor_size=tensor_size, kv_order=kv_order)
    found = []
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        split: Split = next(rule.split for rule in plan if fnmatchcase(module, rule.module))
        dim = _DIM_OF_SPLIT[split]
        offsets, local = [0] * len(shape), list(shape)
        if dim is not None:
            offsets[dim], local[dim] = _part(
                module, model, heads, whole=shape[dim], tensor_rank=tensor_rank, tensor_size=tensor_size
            )
        is_kv = module.endswith(("attention.k", "attention.v"))
        first_holder = tensor_rank == 0 if dim is None else not is_kv or heads.copy == 0
        stored, row = _stored(name, rows=local[0])
        found.append(Piece(name, stored, row, tuple(local), shape, tuple(offsets), first_holder))
    return found


def _part(
    module: str, model: ModelSection, heads: Heads, *, whole: int, tensor_rank: int, tensor_size: int
) -> tuple[int, int]:
    """(begin, size) of this rank's part of the divided dim."""
    match module.rpartition(".attention.")[2]:
        case "q" | "o":
            return heads.first_query * model.head_dim, heads.num_query * model.head_dim
        case "k" | "v":
            return heads.first_kv * model.head_dim, heads.num_kv * model.head_dim
        case _:
            assert whole % tensor_size == 0, f"{module}: {whole} is not a multiple of {tensor_size}"
            return tensor_rank * (whole // tensor_size), whole // tensor_size


def _stored(name: str, *, rows: int) -> tuple[str, int]:
    """(parameter of the NxD model, first row in it) of this rank's block of our parameter."""
    module, _, leaf = name.rpartition(".")
    attention, _, projection = module.rpartition(".")
    if attention.endswith("attention") and projection in ("q", "k", "v"):
        return f"{attention}.qkv.{leaf}_{projection}", 0
    for index, half in enumerate(("gate", "up")):
        if name.endswith(f"ffn.{half}.weight"):
            return name.replace(f"ffn.{half}.weight", "ffn.gate_up.weight"), index * rows
    return name, 0


def by_stored(found: list[Piece]) -> dict[str, list[Piece]]:
    """The same pieces under the NxD parameter that holds them."""
    grouped: dict[str, list[Piece]] = {}
    for piece in found:
        grouped.setdefault(piece.stored, []).append(piece)
    return grouped


def zero1_rows(rows: int, *, data_rank: int, data_size: int) -> tuple[int, int]:
    """Rows [begin, end) of a parameter that ZeRO-1 gives a data rank: equal chunks, the last ones padded or empty."""
    chunk = math.ceil(rows / data_size)
    return min(rows, data_rank * chunk), min(rows, (data_rank + 1) * chunk)


def zero1_pieces(found: list[Piece], *, rows: int, data_rank: int, data_size: int) -> Iterator[Piece]:
    """What a data rank's shard of one NxD parameter of `rows` rows holds; each `row` still counts in the whole."""
    begin, end = zero1_rows(rows, data_rank=data_rank, data_size=data_size)
    for piece in found:
        part = piece.rows(begin, end)
        if part is not None:
            yield part
