"""Pipeline parallelism of the NxD engine: the decoder as neuronx-distributed cuts it into stages, and its passes.

NxD traces the model once, cuts the graph behind given blocks, and each rank keeps the modules of its own stage; the
others stay without memory on the meta device. It then runs one-forward-one-backward over the micro-batches of a step.
Tokens and labels are read on every stage, so only hidden states travel between them. Shapes: see `nxd_layers.py`.
"""

# The library is not on the public package index: no type checker finds it.
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor, nn

from raynium.config.schema import Config, ModelSection
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.nxd_layers import summed_nats
from raynium.models.decoder import Decoder, DecoderBlock, RMSNorm, Rope, rope_tables


class StagedDecoder(nn.Module):
    """A decoder with its loss, in a form that torch.fx can trace; parameters have the decoder's names.

    Each stage makes the rotary tables anew from its own tokens: a table made once would be sent from stage to stage.
    """

    def __init__(self, decoder: Decoder, *, num_stages: int):
        super().__init__()
        self.embedding = decoder.embedding
        self.blocks = decoder.blocks
        self.final_norm = decoder.final_norm
        self.head = decoder.head
        self.positions = Positions(decoder.config)
        self.loss = ScaledNats()
        self._blocks_per_stage = len(decoder.blocks) // num_stages

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: BT; NxD gives them by these names, and torch.fx makes names lower-case."""
        hidden_TBD = self.embedding(tokens)
        rope = None
        for index, block in enumerate(self.blocks):
            if index % self._blocks_per_stage == 0:
                rope = self.positions(tokens)
            hidden_TBD = block(hidden_TBD, rope=rope)
        return self.loss(self.head(self.final_norm(hidden_TBD)), labels)


class Positions(nn.Module):
    """Rotary tables of the given tokens; a module because the tracer then looks no further."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self._config = config

    def forward(self, tokens_BT: Tensor) -> Rope:
        return rope_tables(self._config, num_tokens=tokens_BT.shape[1], device=tokens_BT.device)


class ScaledNats(nn.Module):
    """Summed nats of a micro-batch times `scale`, which is set before each step: it counts all ranks' labels."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Not on the meta device that the decoder is built on, and no part of the model's state.
        self.register_buffer("scale", torch.ones((), device="cpu"), persistent=False)

    def forward(self, logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
        return summed_nats(logits_TBV, labels_BT) * self.scale


def pipeline_config(config: Config, world: World) -> dict[str, Any] | None:
    """NxDPPModel's arguments, equal numbers of blocks a stage; None without pipeline parallelism."""
    num_stages = world.pipeline
    if num_stages == 1:
        return None
    per_stage = config.model.num_layers // num_stages
    return {
        "transformer_layer_cls": DecoderBlock,
        "num_microbatches": world.num_micro_batches,
        "pipeline_cuts": [f"blocks.{stage * per_stage - 1}" for stage in range(1, num_stages)],  # last of each stage
        "input_names": ["tokens", "labels"],
        "leaf_module_cls": [kind.__name__ for kind in (RMSNorm, Positions, ScaledNats)],  # NxD compares names
        "output_loss_value_spec": True,
        "return_mb_loss": True,  # as they are: NxD's mean over micro-batches would go by way of the host
        "use_optimizer_wrapper": True,  # which reduces the gradients over data ranks; NxDPPModel else does, too
    }


class PipelinePasses:
    """All micro-batches of a step through the stages, in NxD's order. See `nxd.Passes`."""

    def __init__(self, model: Any, *, micro_batch_size: int, num_micro_batches: int, device: torch.device):
        self._model = model  # an NxDModel around an NxDPPModel
        self._rows = micro_batch_size * num_micro_batches
        self._num_micro_batches = num_micro_batches
        self._device = device

    def train(self, batch: Batch, scale: Tensor) -> Tensor:
        # NxD divides each micro-batch's loss by their number.
        return self._run(self._model.run_train, batch, scale * self._num_micro_batches)

    def evaluate(self, batch: Batch) -> Tensor:
        return self._run(self._model.run_eval, batch, torch.ones((), device=self._device))

    def _run(self, schedule: Any, batch: Batch, scale: Tensor) -> Tensor:
        """All stages come here together. The first call exchanges shapes through the process group's store.

        A rank that dies in it leaves its neighbours waiting until the agents end the generation.
        """
        rows = len(batch.tokens_BT)
        assert rows == self._rows, f"{rows} rows: the stages exchanged shapes once, for {self._rows} rows a call"
        is_last = self._model.module.is_last_stage()
        if is_last:
            self._model.original_module().loss.scale.copy_(scale)
        losses = schedule(tokens=batch.tokens_BT, labels=batch.labels_BT)  # from the CPU: NxD moves them
        return torch.stack(losses).sum() / scale if is_last else torch.zeros((), device=self._device)
