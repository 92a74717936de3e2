"""The NxD engine: neuronx-distributed on torch-xla, for Trainium1 and Trainium2.

Tensor and sequence parallelism are NxD's layers, pipeline parallelism its model wrapper (`nxd_pipeline.py`), data
parallelism its optimizer: ZeRO-1 with float32 master weights on an XLA device, plain replicas in NxD's CPU mode.
Gradients are of the task's objective divided by its count, since NxD clips what it has reduced; so the batch is counted
over the ranks before the first micro-batch.

State has the names, shapes and dtypes of the native engine's: a checkpoint of either engine resumes under the other.
"""

# The library is not on the public package index: no type checker finds it.
# pyright: reportMissingImports=false

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raynium.accelerators.cpu import usable_cores
from raynium.checkpoint.state import Chunk
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Audit, StepResult, Votes
from raynium.engines.nxd_layers import TaskLoss, mark_copies, parallel_decoder
from raynium.engines.nxd_optimizer import Stored, UndoableOptimizer, base_optimizer, moments_of, nxd_optimizer
from raynium.engines.nxd_pipeline import PipelinePasses, StagedDecoder, pipeline_config
from raynium.engines.optim import learning_rate
from raynium.models.decoder import DecoderBlock
from raynium.models.init import init_block
from raynium.models.nxd_layout import (
    KvOrder,
    Piece,
    by_stored,
    heads_of_rank,
    kv_copies,
    pieces,
    zero1_pieces,
    zero1_rows,
)
from raynium.tasks.base import Sums, Task, check_whole_samples, counts_of, loss_of

# Counts travel as base and rest, both exact in float32 on up to 4,096 ranks: Neuron collectives have no float64,
# and more than 2**24 tokens in a step is a batch that people train with.
_COUNT_BASE = 4096
# What activation checkpointing puts into parameter names.
_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


class NxdPlace(NamedTuple):
    """This rank's place, as NxD laid the ranks out. stage: of the pipeline."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    stage: int
    num_stages: int
    kv_order: KvOrder

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1


def build_nxd_engine(
    config: Config, world: World, task: Task, *, weights: Literal["first", "loaded"] = "first"
) -> "NxdEngine":
    """Model and optimizer of this rank, at step 0. All ranks call it, after `init_process_group`, of one rank too.

    The environment is set before: PJRT's for Trainium, or NXD_CPU_MODE=1 for NxD's own mode on a CPU. float32 weights
    of a rank never exceed its own and one more of its parameters. weights, ConfigError: as in `build_native_engine`.
    """
    check_whole_samples(task, config)
    assert config.adapter.rank is None, "planning.rules refuses it"
    import neuronx_distributed as nxd
    from neuronx_distributed.utils import get_device

    assert dist.is_initialized(), "NxD needs a process group"
    assert config.engine.dtype != "auto", "the driver settles it"
    dtype = getattr(torch, config.engine.dtype)
    zero1 = get_device().type == "xla"
    assert zero1 or dtype == torch.float32, f"{dtype} needs master weights: NxD has them in its ZeRO-1 optimizer only"

    modules: dict[nn.Module, str] = {}

    def model() -> nn.Module:
        # NxD would give each parameter memory and values first, and then take them away.
        with torch.device("meta"):
            decoder = parallel_decoder(config.model, tensor_size=place.tensor_size, dtype=dtype)
            whole = decoder if place.num_stages == 1 else StagedDecoder(decoder, task, num_stages=place.num_stages)
        modules.update({module: name for name, module in whole.named_modules()})
        return whole

    def first_weights(module: nn.Module, device: torch.device) -> None:
        """NxD calls it for each module in turn, when its parameters have got memory."""
        if weights == "loaded":
            return
        for leaf, parameter in module.named_parameters(recurse=False):
            # A tied head is not there: its place is taken by the embedding.
            for piece in stored.get(f"{modules[module]}.{leaf}".removeprefix("."), ()):
                parameter[piece.row : piece.row + piece.shape[0]].copy_(_first_values(piece, config))

    nxd_config = nxd.neuronx_distributed_config(
        tensor_parallel_size=world.tensor,
        pipeline_parallel_size=world.pipeline,
        pipeline_config=pipeline_config(config, world, task),
        optimizer_config={
            "zero_one_enabled": zero1,
            "grad_clipping": True,
            "max_grad_norm": config.optimizer.clip_norm,
        },
        activation_checkpoint_config=[DecoderBlock] if config.engine.activation_checkpointing == "full" else None,
        sequence_parallel=world.tensor > 1,
        model_init_config={"meta_device_init": True, "param_init_fn": first_weights},
        # Set by the accelerator on Trainium2: NxD lays tensor groups along other links with two cores in one.
        lnc_size=int(os.environ.get("NEURON_LOGICAL_NC_CONFIG", "1")),
    )
    place = _nxd_place(config, world)
    where = {"tensor_rank": place.tensor_rank, "tensor_size": place.tensor_size, "kv_order": place.kv_order}
    stored = by_stored(pieces(config.model, **where))
    if config.model.embeddings == "tied" and place.num_stages > 1 and place.is_last_stage:
        # Of one parameter NxD makes two here, sums their gradients, and counts one in the norm.
        stored["head.weight"] = [piece._replace(first_holder=False) for piece in stored["embedding.weight"]]
    nxd_model = nxd.initialize_parallel_model(nxd_config, model)
    if place.num_stages == 1:
        # NxD overlooks parameters that children of the root share (0.18.0): each has memory.
        nxd_model.module.tie()
    mark_copies(nxd_model.original_module(), is_copy=heads_of_rank(config.model, **where).copy > 0)
    optimizer = nxd_optimizer(nxd_config, nxd_model, config, zero1=zero1)
    found = _stored(nxd_model, optimizer, stored, place, zero1=zero1)
    if dtype != torch.float32 and weights == "first":
        with torch.no_grad():
            # NxD made the masters of weights that were already rounded.
            for each in found:
                for piece in each.pieces:
                    each.view(each.master, piece).copy_(_first_values(piece, config))
    return NxdEngine(config, world, task, place, nxd_model, optimizer, found, device=get_device(), zero1=zero1)


class Counted(NamedTuple):
    """What all ranks counted before the first micro-batch, on the device.

    numbers: float32, base and rest of each count, then how many ranks wished for each vote. divisor_or_1: what the
    objective is divided by; 1 where nothing counts.
    """

    names: tuple[str, ...]
    numbers: Tensor
    divisor_or_1: Tensor


class Passes(Protocol):
    """The micro-batches of one step or evaluation call through the model. Collective: all ranks call it."""

    def train(self, batch: Batch, scale: Tensor) -> Tensor:
        """Adds the gradient of scale times the summed objective, and returns the task's sums, float32.

        They are of this data rank's rows, equal on the ranks of a tensor group; 0 on all stages but the last.
        """
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """The task's sums, likewise."""
        ...

    def row_log_probs(self, batch: Batch) -> Tensor:
        """float32 [B]; 0 on all stages but the last."""
        ...


class WholePasses:
    """On the whole model, an NxDModel, one micro-batch after the other."""

    def __init__(self, model: Any, task: Task, *, micro_batch_size: int, device: torch.device):
        from neuronx_distributed.utils import mark_step

        self._model = model
        self._loss = TaskLoss(task)
        self._micro_batch_size = micro_batch_size
        self._device = device
        self._end_graph = mark_step

    def train(self, batch: Batch, scale: Tensor) -> Tensor:
        self._loss.begin(scale)
        for micro_batch in self._micro_batches(batch):
            self._forward(micro_batch).backward()
            # Ended here, the graph is the same for every micro-batch.
            self._end_graph()
        return self._loss.sums()

    def evaluate(self, batch: Batch) -> Tensor:
        self._without_gradients(batch, keep_rows=False)
        return self._loss.sums()

    def row_log_probs(self, batch: Batch) -> Tensor:
        self._without_gradients(batch, keep_rows=True)
        return self._loss.rows(len(batch.tokens_BT))

    def _without_gradients(self, batch: Batch, *, keep_rows: bool) -> None:
        self._loss.begin(torch.ones((), device=self._device), keep_rows=keep_rows)
        for micro_batch in self._micro_batches(batch):
            self._forward(micro_batch)
            self._end_graph()

    def _forward(self, batch: Batch) -> Tensor:
        logits_TBV = self._model(batch.tokens_BT, batch.documents_BT)
        return self._loss(logits_TBV, batch.tokens_BT, batch.labels_BT, *batch.others.values())

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        return [micro_batch.to(self._device) for micro_batch in batch.split(self._micro_batch_size)]


class NxdEngine:
    """See `engines/base.py`, Engine. model: an NxDModel; optimizer: an NxDOptimizer."""

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        place: NxdPlace,
        model: Any,
        optimizer: Any,
        stored: Sequence[Stored],
        *,
        device: torch.device,
        zero1: bool,
    ):
        from neuronx_distributed.utils import mark_step

        self.data_rank, self.data_size = place.data_rank, place.data_size
        self._config = config
        self._task = task
        self._place = place
        self._model = model
        self._passes: Passes
        micro_batch_size = config.train.micro_batch_size
        if place.num_stages > 1:
            self._passes = PipelinePasses(model, task, config, num_micro_batches=world.num_micro_batches, device=device)
        else:
            self._passes = WholePasses(model, task, micro_batch_size=micro_batch_size, device=device)
        self._optimizer = optimizer
        self._stored = stored
        self._device = device
        self._zero1 = zero1
        # torch-xla compiles and runs what was traced since the last one.
        self._end_graph = mark_step
        self._moments = moments_of(base_optimizer(optimizer, zero1=zero1), stored)
        self._undoable = UndoableOptimizer(optimizer, stored, self._moments, zero1=zero1)
        # The parameters are older than the masters once a checkpoint was loaded into these.
        self._masters_are_newer = False

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        assert audit is None, "planning.rules refuses it"
        self._refresh_parameters()
        counted = self._counts(batch, votes)
        # NxD takes the mean over data ranks: times their number, it is the sum.
        sums = self._passes.train(batch, self.data_size / counted.divisor_or_1)

        rate = learning_rate(self._config.optimizer, step=step, total_steps=self._config.train.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums = self._sum_over_ranks(sums)
        unwanted = counted.numbers[Votes._fields.index("leave_out") - len(Votes._fields)] > 0
        norm, left_out = self._undoable.step(unwanted | ~sums.isfinite().all())
        self._optimizer.zero_grad(set_to_none=True)
        numbers = torch.cat((left_out, norm, sums, counted.numbers))
        self._end_graph()

        # The step's one wait for the device.
        masked, norm, *rest = numbers.tolist()
        if masked:
            self._undoable.uncount()
        named, agreed = self._named(rest, counted.names)
        loss = loss_of(self._task, named)
        return StepResult(loss=loss, grad_norm=norm, sums=named, learning_rate=rate, agreed=agreed, updated=not masked)

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        """None: NxD sums gradients over the data ranks inside its optimizer's step, which keeps them to itself."""
        return {}

    def _counts(self, batch: Batch, votes: Votes) -> Counted:
        """Over all ranks, in one all-reduce.

        A rank that dies here leaves the others waiting until the agents end the generation.
        """
        # The ranks of a tensor group and the stages of a pipeline have the same rows.
        counts_here = self._place.tensor_rank == 0 and self._place.stage == 0
        counts = counts_of(self._task, batch)
        parts = [part * counts_here for count in counts.values() for part in divmod(count, _COUNT_BASE)]
        numbers = torch.tensor([*parts, *votes], dtype=torch.float32).to(self._device)
        dist.all_reduce(numbers)
        at = 2 * list(counts).index(self._task.divisor)
        divisor = numbers[at] * _COUNT_BASE + numbers[at + 1]
        return Counted(tuple(counts), numbers, divisor.where(divisor != 0, 1.0))

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Over data ranks, from what `Passes` return."""
        total = sums * (self._place.tensor_rank == 0 and self._place.is_last_stage)
        dist.all_reduce(total)
        return total

    def _named(self, numbers: list[float], counts: tuple[str, ...]) -> tuple[Sums, Votes]:
        """Of the task's sums and `Counted.numbers`, on the host."""
        named: Sums = dict(zip(self._task.sums, numbers, strict=False))
        numbers = numbers[len(named) :]
        bases, rests, votes = (
            numbers[: 2 * len(counts) : 2],
            numbers[1 : 2 * len(counts) : 2],
            numbers[2 * len(counts) :],
        )
        for name, base, rest in zip(counts, bases, rests, strict=True):
            named[name] = base * _COUNT_BASE + rest
        return named, Votes(*(count > 0 for count in votes))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Sums:
        self._refresh_parameters()
        counted = self._counts(batch, Votes())
        numbers = torch.cat((self._sum_over_ranks(self._passes.evaluate(batch)), counted.numbers))
        self._end_graph()
        return self._named(numbers.tolist(), counted.names)[0]

    @torch.no_grad()
    def row_log_probs(self, batch: Batch) -> Tensor:
        self._refresh_parameters()
        rows_B = self._passes.row_log_probs(batch)
        self._end_graph()
        return rows_B.cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        total = self._sum_over_ranks(values.to(self._device))
        self._end_graph()
        return total.cpu()

    # ---- state -------------------------------------------------------------------------------------------------------

    def state(self) -> list[Chunk]:
        chunks = []
        for stored, moments in zip(self._stored, self._moments, strict=True):
            for prefix, tensor in (
                ("model", stored.master),
                ("optimizer/exp_avg", moments["exp_avg"]),
                ("optimizer/exp_avg_sq", moments["exp_avg_sq"]),
            ):
                for piece in stored.pieces:
                    saved_here = piece.first_holder and (self._zero1 or self.data_rank == 0)
                    block = stored.view(tensor.detach(), piece)
                    chunks.append(Chunk(f"{prefix}/{piece.name}", piece.global_shape, piece.offsets, block, saved_here))
        return chunks

    def frozen_state(self) -> list[Chunk]:
        return []

    def set_updates(self, updates: int) -> None:
        for moments in self._moments:
            moments["step"].fill_(updates)
        self._masters_are_newer = self._zero1

    def _refresh_parameters(self) -> None:
        """After a load: under ZeRO-1 the parameters are gathered from the masters. All ranks come here together."""
        if not self._masters_are_newer:
            return
        zero1 = self._optimizer.optimizer
        for stored in self._stored:
            # NxD gathers what has a gradient; it makes this buffer itself in the first backward.
            if not hasattr(stored.master, "main_grad"):
                gradient = torch.zeros_like(stored.parameter, dtype=stored.master.dtype)
                for holder in (stored.master, stored.parameter):
                    vars(holder)["main_grad"] = gradient
        self._end_graph()
        zero1.allgather_weights_and_update_full_parameter()
        self._end_graph()
        self._masters_are_newer = False

    def close(self) -> None:
        from neuronx_distributed.parallel_layers import parallel_state

        parallel_state.destroy_model_parallel()


# ---- Building --------------------------------------------------------------------------------------------------------


def _nxd_place(config: Config, world: World) -> NxdPlace:
    from neuronx_distributed.parallel_layers import parallel_state

    # NxD knows by the chip which ranks share a head; the layers make the same groups, if they are not there yet.
    parallel_state.initialize_kv_group(kv_copies(config.model, world.tensor))
    sharing = parallel_state.get_kv_shared_replica_groups()[0]
    adjacent = sharing == list(range(sharing[0], sharing[0] + len(sharing)))
    place = NxdPlace(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_size(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        num_stages=parallel_state.get_pipeline_model_parallel_size(),
        kv_order="adjacent" if adjacent else "interleaved",
    )
    sizes = (place.data_size, place.tensor_size, place.num_stages)
    assert sizes == (world.data, world.tensor, world.pipeline)
    return place


def _masters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _stored(
    model: Any, optimizer: Any, by_name: dict[str, list[Piece]], place: NxdPlace, *, zero1: bool
) -> list[Stored]:
    """In the optimizer's order."""
    names = {parameter: name.replace(_CHECKPOINT_PREFIX, "") for name, parameter in model.named_parameters()}
    found = []
    parameters = _masters(optimizer)
    masters = _masters(base_optimizer(optimizer, zero1=zero1))
    for parameter, master in zip(parameters, masters, strict=True):
        whole, rows = by_name[names[parameter]], parameter.shape[0]
        assert sum(piece.shape[0] for piece in whole) == rows, f"{names[parameter]}: {parameter.shape}"
        if zero1:
            where = {"rows": rows, "data_rank": place.data_rank, "data_size": place.data_size}
            first_row, _ = zero1_rows(**where)
            found.append(Stored(parameter, master, first_row, tuple(zero1_pieces(whole, **where))))
        else:
            found.append(Stored(parameter, master, 0, tuple(whole)))
    return found


def _first_values(piece: Piece, config: Config) -> Tensor:
    return init_block(
        piece.name,
        global_shape=piece.global_shape,
        offsets=piece.offsets,
        shape=piece.shape,
        seed=config.run.seed,
        config=config.model,
        threads=max(1, usable_cores() // config.cluster.ranks_per_node),
    )
