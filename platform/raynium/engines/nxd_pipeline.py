"""Pipeline parallelism of the NxD engine: the decoder as neuronx-distributed cuts it into stages, and its passes.

NxD traces the model once, cuts the graph behind given blocks, and each rank keeps the modules of its own stage; the
others stay without memory on the meta device. It then runs one-forward-one-backward over the micro-batches of a step.
The columns of a batch are read on every stage, so only hidden states travel between them. Shapes: see `nxd_layers.py`.
"""

# The library is not on the public package index: no type checker finds it.
# pyright: reportMissingImports=false

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raynium.config.schema import Config, ModelSection
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.nxd_layers import TaskLoss
from raynium.models.attention import Places, places
from raynium.models.decoder import Decoder, DecoderBlock, RMSNorm
from raynium.tasks.base import Task


class StagedDecoder(nn.Module):
    """A decoder with its loss, in a form that torch.fx can trace; parameters have the decoder's names.

    Each stage makes the places anew from its own columns: made once, they would be sent from stage to stage.
    """

    def __init__(self, decoder: Decoder, task: Task, *, num_stages: int):
        super().__init__()
        self.embedding = decoder.embedding
        self.blocks = decoder.blocks
        self.final_norm = decoder.final_norm
        self.head = decoder.head
        self.places = PlacesOfStage(decoder.config, dtype=decoder.embedding.weight.dtype)
        self.loss = TaskLoss(task)
        self._blocks_per_stage = len(decoder.blocks) // num_stages
        self._num_others = len(task.columns)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        documents: Any = None,
        other_0: Any = None,
        other_1: Any = None,
        other_2: Any = None,
    ) -> Tensor:
        """NxD gives the columns by these names, and sets those to None, in the trace, that batches do not have.

        tokens, labels, documents: BT. The tracer reads the names from this line, so they cannot be the task's.
        """
        hidden_TBD = self.embedding(tokens)
        where = None
        for index, block in enumerate(self.blocks):
            if index % self._blocks_per_stage == 0:
                where = self.places(tokens, documents)
            hidden_TBD = block(hidden_TBD, places=where)
        others = (other_0, other_1, other_2)[: self._num_others]
        return self.loss(self.head(self.final_norm(hidden_TBD)), tokens, labels, *others)


class PlacesOfStage(nn.Module):
    """`places` of the given rows; a module because the tracer then looks no further."""

    def __init__(self, config: ModelSection, *, dtype: torch.dtype):
        super().__init__()
        self._config, self._dtype = config, dtype

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> Places:
        return places(self._config, tokens_BT, documents_BT, dtype=self._dtype)


def _names(task: Task, *, packed: bool) -> dict[str, str]:
    """A batch's columns → the names that `StagedDecoder.forward` has for them."""
    assert len(task.columns) <= 3, "give StagedDecoder.forward more names"
    every_task = ("tokens", "labels", *(["documents"] if packed else []))
    others = {column.name: f"other_{index}" for index, column in enumerate(task.columns)}
    return {name: name for name in every_task} | others


def pipeline_config(config: Config, world: World, task: Task) -> dict[str, Any] | None:
    """NxDPPModel's arguments, equal numbers of blocks a stage; None without pipeline parallelism."""
    num_stages = world.pipeline
    if num_stages == 1:
        return None
    per_stage = config.model.num_layers // num_stages
    return {
        "transformer_layer_cls": DecoderBlock,
        "num_microbatches": world.num_micro_batches,
        # The last block of each stage but the last.
        "pipeline_cuts": [f"blocks.{stage * per_stage - 1}" for stage in range(1, num_stages)],
        "input_names": [*_names(task, packed=config.data.packing == "documents").values()],
        # NxD compares these by name.
        "leaf_module_cls": [kind.__name__ for kind in (RMSNorm, PlacesOfStage, TaskLoss)],
        "output_loss_value_spec": True,
        # The losses as they are: NxD's mean over micro-batches would go by way of the host.
        "return_mb_loss": True,
        # The wrapper reduces the gradients over data ranks; without it NxDPPModel does so, too.
        "use_optimizer_wrapper": True,
    }


class PipelinePasses:
    """All micro-batches of a step through the stages, in NxD's order. See `nxd.Passes`.

    model: an NxDModel around an NxDPPModel.
    """

    def __init__(self, model: Any, task: Task, config: Config, *, num_micro_batches: int, device: torch.device):
        self._model = model
        self._packed = config.data.packing == "documents"
        self._names = _names(task, packed=self._packed)
        self._rows = config.train.micro_batch_size * num_micro_batches
        self._num_micro_batches = num_micro_batches
        self._device = device

    def train(self, batch: Batch, scale: Tensor) -> Tensor:
        # NxD divides each micro-batch's loss by their number.
        return self._run(self._model.run_train, batch, scale * self._num_micro_batches).sums()

    def evaluate(self, batch: Batch) -> Tensor:
        return self._run(self._model.run_eval, batch, torch.ones((), device=self._device)).sums()

    def row_log_probs(self, batch: Batch) -> Tensor:
        one = torch.ones((), device=self._device)
        return self._run(self._model.run_eval, batch, one, keep_rows=True).rows(self._rows)

    def _run(self, schedule: Any, batch: Batch, scale: Tensor, *, keep_rows: bool = False) -> TaskLoss:
        """All stages come here together. The first call exchanges shapes through the process group's store.

        A rank that dies in it leaves its neighbours waiting until the agents end the generation.
        """
        rows = len(batch.tokens_BT)
        assert rows == self._rows, f"{rows} rows: the stages exchanged shapes once, for {self._rows} rows a call"
        loss: TaskLoss = self._model.original_module().loss
        # NxD's first call runs a micro-batch forward for the shapes alone, and keeps no tensor of it alive: a live one
        # would make torch-xla compile a graph with collectives in which the other stages take no part.
        loss.begin(scale, dry_runs=0 if self._model.module.shape_traced else 1, keep_rows=keep_rows)
        if self._packed and batch.documents_BT is None:
            # The stages were cut for batches with documents; of an evaluation each row is one.
            batch = replace(batch, documents_BT=torch.zeros_like(batch.tokens_BT))
        # The columns are on the CPU: NxD moves them.
        schedule(**{self._names[name]: column for name, column in batch.columns().items()})
        return loss
