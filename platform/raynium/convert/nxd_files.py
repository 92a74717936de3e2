"""Reads a checkpoint folder of neuronx-distributed: one torch file a rank, without executing what they pickle.

`<tag>/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt` is a rank's state dict; `<tag>/optim/dp_rank_DD_tp_…` its optimizer:
a data rank's rows of each parameter under ZeRO-1, else whole. Which parameter an optimizer's number means is not
written; it follows from the order of the model's, which shapes confirm.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, some

# A rank's, by the names of `models/nxd_layout.py`, Piece.stored.
Tensors = dict[str, Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")

_FILE = re.compile(r"dp_rank_(\d+)_tp_rank_(\d+)_pp_rank_(\d+)\.pt", re.ASCII)
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")

# Names of the Llama that comes with neuronx-distributed → ours. Our engine's own names stand for themselves.
_THEIRS = {
    r"model\.embed_tokens\.weight": "embedding.weight",
    r"model\.norm\.weight": "final_norm.weight",
    r"lm_head\.weight": "head.weight",
}
_THEIRS_IN_BLOCK = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.qkv.weight_q",
    "self_attn.k_proj.weight": "attention.qkv.weight_k",
    "self_attn.v_proj.weight": "attention.qkv.weight_v",
    "self_attn.qkv_proj.weight_q": "attention.qkv.weight_q",
    "self_attn.qkv_proj.weight_k": "attention.qkv.weight_k",
    "self_attn.qkv_proj.weight_v": "attention.qkv.weight_v",
    **{f"self_attn.{each}_proj.bias": f"attention.qkv.bias_{each}" for each in "qkv"},
    **{f"self_attn.qkv_proj.bias_{each}": f"attention.qkv.bias_{each}" for each in "qkv"},
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "self_attn.o_proj.weight": "attention.o.weight",
    "mlp.gate_up_proj.weight": "ffn.gate_up.weight",
    "mlp.down_proj.weight": "ffn.down.weight",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class RankState:
    """What one tensor rank holds. Moments are empty, and the step is 0, if no optimizer was read.

    masters: float32 weights where the optimizer saved them: it goes on from these, unlike from rounded weights.
    moments: "exp_avg", "exp_avg_sq" → by parameter. step: optimizer steps taken.
    """

    weights: Tensors
    masters: Tensors
    moments: Mapping[str, Tensors]
    step: int


class NxdFiles:
    """The files of one tag. Opening looks at names only."""

    def __init__(self, folder: Path, *, with_optimizer: bool):
        self.folder = folder
        self._model = _ranks(folder / "model")
        if any(data_rank != 0 for data_rank, _, _ in self._model):
            raise CheckpointMismatch(f"{folder}/model has files of several data ranks: experts are not supported")
        self.tensor_size = 1 + max(tensor_rank for _, tensor_rank, _ in self._model)
        self._stages = 1 + max(stage for _, _, stage in self._model)
        self._optimizer = _ranks(folder / "optim") if with_optimizer else {}
        self._data_size = 1 + max((data_rank for data_rank, _, _ in self._optimizer), default=0)
        self._check_all_there("model", self._model, data_size=1)
        if with_optimizer:
            self._check_all_there("optim", self._optimizer, data_size=self._data_size)

    def read(self, tensor_rank: int) -> RankState:
        """All that this tensor rank's files hold, of all pipeline stages, mapped and not yet read where that goes."""
        weights: Tensors = {}
        masters: Tensors = {}
        moments: dict[str, Tensors] = {kind: {} for kind in MOMENTS} if self._optimizer else {}
        steps: set[int] = set()
        for stage in range(self._stages):
            path = self._model[0, tensor_rank, stage]
            found = _model_tensors(load_tensors(path), where=path)
            weights |= found
            if self._optimizer:
                paths = [self._optimizer[data_rank, tensor_rank, stage] for data_rank in range(self._data_size)]
                optimizer = _Optimizer([load_tensors(path) for path in paths], found, where=paths[0])
                masters |= optimizer.masters()
                for kind in MOMENTS:
                    moments[kind] |= optimizer.tensors(kind)
                steps |= optimizer.steps()
        return RankState(weights, masters, moments, self.one_step(steps))

    def one_step(self, steps: Set[int]) -> int:
        """The step that all files are of; 0 without an optimizer."""
        if len(steps) > 1:
            raise CheckpointDamaged(
                f"{self.folder}/optim has files of the steps {sorted(steps)}, which are of different saves: copy the "
                "whole checkpoint of one"
            )
        return next(iter(steps), 0)

    def _check_all_there(self, kind: str, files: Mapping[tuple[int, int, int], Path], *, data_size: int) -> None:
        expected = {
            (data_rank, tensor_rank, stage)
            for data_rank in range(data_size)
            for tensor_rank in range(self.tensor_size)
            for stage in range(self._stages)
        }
        if missing := sorted(expected - files.keys()):
            names = ["dp_rank_{:02d}_tp_rank_{:02d}_pp_rank_{:02d}.pt".format(*ranks) for ranks in missing]
            raise CheckpointDamaged(f"{self.folder}/{kind} lacks {some(names)}: copy the whole checkpoint")


def load_tensors(path: Path) -> dict[Any, Any]:
    """A torch file's dict of tensors and plain values; anything else in it is refused, not run."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # The unpickler's own errors, and those of zip files.
    except Exception as error:
        raise CheckpointError(
            f"{path} was not read: {str(error).splitlines()[0][:300]} It must be a torch file of tensors and plain "
            "values alone, since reading others can run code; save it again with save_checkpoint(use_xser=False)"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointDamaged(f"{path} holds a {type(found).__name__} instead of a state dict")
    return found


def _ranks(folder: Path) -> dict[tuple[int, int, int], Path]:
    """(data rank, tensor rank, pipeline stage) → file."""
    if any(folder.glob("*.tensors")):
        raise CheckpointError(
            f"{folder} was saved with use_xser=True, whose index files pickle classes, and reading those can run code: "
            "save it again with save_checkpoint(use_xser=False)"
        )
    found = {}
    for path in sorted(folder.glob("*.pt")):
        if match := _FILE.fullmatch(path.name):
            data_rank, tensor_rank, stage = map(int, match.groups())
            found[data_rank, tensor_rank, stage] = path
    if not found:
        raise CheckpointError(
            f"{folder} holds no file named like dp_rank_00_tp_rank_00_pp_rank_00.pt: give the folder of one tag of a "
            "neuronx-distributed checkpoint"
        )
    return found


# ---- weights ------------------------------------------------------------------------------------------------------


def _model_tensors(state: Mapping[Any, Any], *, where: Path) -> Tensors:
    """In the file's order, which is the model's."""
    found: Tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointDamaged(f"{where} holds {name!r}, which is no named tensor")
        if not _IGNORED.fullmatch(name):
            found[_our_name(name, where=where)] = tensor
    return found


def _our_name(name: str, *, where: Path) -> str:
    for theirs, ours in _THEIRS.items():
        if re.fullmatch(theirs, name):
            return ours
    if match := _BLOCK.fullmatch(name):
        layer, rest = match.groups()
        if rest not in _THEIRS_IN_BLOCK:
            raise CheckpointMismatch(
                f"{where} holds {name}, which has no place in a model of ours: matrices that can be imported "
                f"are {', '.join(_THEIRS_IN_BLOCK)}"
            )
        return f"blocks.{layer}.{_THEIRS_IN_BLOCK[rest]}"
    return name


# ---- optimizer ----------------------------------------------------------------------------------------------------


class _Optimizer:
    """One tensor rank's AdamW of one pipeline stage, from the files of all its data ranks."""

    def __init__(self, files: Sequence[Mapping[Any, Any]], weights: Tensors, *, where: Path):
        self._where = where
        self._weights = weights
        self._zero1 = "base_state" in files[0]
        self._files = files
        states = [file["base_state" if self._zero1 else "state"] for file in files]
        self._states = states
        self._names = self._order(files[0])

    def steps(self) -> set[int]:
        """Of all data ranks; one, if they were saved together."""
        return {int(state[0]["step"]) for state in self._states}

    def masters(self) -> Tensors:
        if "sharded_master_weights" not in self._files[0]:
            return {}
        shards = [file["sharded_master_weights"] for file in self._files]
        return {name: self._whole(name, [shard[index] for shard in shards]) for index, name in self._names.items()}

    def tensors(self, kind: str) -> Tensors:
        return {
            name: self._whole(name, [state[index][kind] for state in self._states])
            for index, name in self._names.items()
        }

    def _whole(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """The rows of all data ranks, without the padding at their end."""
        shape = self._weights[name].shape
        whole = torch.cat([*shards])[: shape[0]] if self._zero1 else shards[0]
        if whole.shape != shape:
            raise CheckpointMismatch(
                f"{self._where}: {name} is {list(shape)} in the model and {list(whole.shape)} in the optimizer"
            )
        return whole

    def _order(self, file: Mapping[Any, Any]) -> dict[int, str]:
        """The optimizer's numbers → names: all in the model's order, or matrices before the rest, as groups say."""
        names = [name for name in self._weights if name != "head.weight" or not self._tied(file)]
        matrices = [name for name in names if self._weights[name].ndim > 1]
        others = [name for name in names if self._weights[name].ndim <= 1]
        sizes = [len(group["params"]) for group in file["param_groups"] if group["params"]]
        if sizes == [len(names)]:
            return dict(enumerate(names))
        if sizes == [len(matrices), len(others)]:
            return dict(enumerate(matrices + others))
        raise CheckpointMismatch(
            f"{self._where} has groups of {sizes} parameters, and the model {len(matrices)} matrices and {len(others)} "
            "others: which is which cannot be told; import without the optimizer"
        )

    def _tied(self, file: Mapping[Any, Any]) -> bool:
        """Whether the head is the embedding: then a state dict has it twice, and an optimizer once."""
        return sum(len(group["params"]) for group in file["param_groups"]) == len(self._weights) - 1
