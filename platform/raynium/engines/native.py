"""The native engine: FSDP and DTensor tensor parallelism of stock torch, for cpu/gloo, cuda/nccl and neuron/neuron.

One optimizer step is: micro-batches forward and backward with gradients of the task's objective, a *sum*; one
all-reduce of a few numbers (sums, counts, squared gradient norm, votes); then one scale for all gradients, which
divides by what was counted and clips, and AdamW. The scale stays on the device, so a GPU is not waited for until the
step is over.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

# The first optimizer loads torch._dynamo, in 0.5 s: loaded here, a warm template has it before it forks ranks.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raynium.accelerators import Accelerator, native_fsdp
from raynium.accelerators.cpu import usable_cores
from raynium.checkpoint.state import MODEL_PREFIX, Chunk
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Audit, StepResult, Votes
from raynium.engines.collectives import GradientWatch, Waiting, checksum, refuse_simple_fsdp
from raynium.engines.head import Finish, PiecewiseHead, counted_places
from raynium.engines.optim import decays, learning_rate
from raynium.engines.parallelize import (
    apply_fsdp,
    apply_tensor_parallel,
    fits_gathered,
    fsdp_modules,
    mesh_of,
    parameter_names,
    wrap_blocks,
)
from raynium.engines.recompute import with_recompute_marks
from raynium.engines.simple_fsdp import gather_in_forward, shard_parameters
from raynium.engines.torch_compiles import Backend
from raynium.models.adapter import is_adapters
from raynium.models.decoder import Decoder
from raynium.models.init import init_block
from raynium.models.lora import Dropout, adapt, row_keys
from raynium.models.plan import divided_sizes, layer_of
from raynium.tasks.base import Sums, Task, check_whole_samples, counts_of, loss_of


class MeshPlace(NamedTuple):
    """This rank's place on the mesh. mesh is None for one rank that needs no process group."""

    mesh: DeviceMesh | None
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int


class HeldPart(NamedTuple):
    """This rank's part of one parameter, and where it lies in the whole.

    parameter: the model's, a DTensor when there is a mesh. local: aliases the parameter's memory; float32, or the
    compute dtype where it does not learn. first_holder: of the ranks that hold the same part, this is the one that
    counts and saves it.
    """

    name: str
    parameter: Tensor
    local: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    first_holder: bool


class Held(NamedTuple):
    """What this rank trains. parts: those with elements here; a parameter that needs no gradient does not learn."""

    model: Decoder
    parts: list[HeldPart]
    dropout: Dropout | None


class Total(NamedTuple):
    """What all ranks added up, on the device.

    names: of the task's sums, then of what was counted; sums has one for each. square_norm: of the gradient. votes: how
    many ranks wished for each.
    """

    names: tuple[str, ...]
    sums: Tensor
    square_norm: Tensor
    votes: Tensor


def build_native_engine(
    config: Config,
    world: World,
    accelerator: Accelerator,
    task: Task,
    *,
    compile_backend: Backend | None = None,
    weights: Literal["first", "loaded"] = "first",
    base: Literal["first", "loaded"] = "first",
) -> "NativeEngine":
    """Model and optimizer of this rank, at step 0. All ranks call it, after `accelerator.set_device`.

    compile_backend: what torch.compile is given, the accelerator's own if None. weights: "loaded" leaves what learns as
    memory was, for a state that is loaded next; the first ones take a core 12 s for each billion of them that the rank
    holds. base: the same of the model's own parameters, as apart from an adapter's; "loaded": of `frozen_state` too.
    Raises ConfigError if a micro-batch would part the rows of a sample.

    torch.distributed must be initialised when there is more than one rank. One rank works without: in float32 it is
    plain torch; in bfloat16 FSDP does the casting, for the same math as on many ranks, over a one-rank group that the
    engine opens.
    """
    assert config.engine.dtype != "auto", "the driver settles it"
    check_whole_samples(task, config)
    dtype = getattr(torch, config.engine.dtype)
    assert world.size == 1 or dist.is_initialized(), f"{world.size} ranks and no process group"
    sharded = world.size > 1 or dtype != torch.float32
    opens_group = sharded and not dist.is_initialized()
    if opens_group:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(accelerator.process_group_backend, store=store, rank=0, world_size=1)
    place = _mesh_place(world, accelerator) if sharded else MeshPlace(None, 0, 1, 0, 1)
    gathered = fits_gathered(config, accelerator)
    backend = compile_backend or accelerator.compile_backend
    dropout = _dropout(config, accelerator)
    model, parts = _build_model(config, accelerator, place, dtype, backend, gathered=gathered, dropout=dropout)
    for part in parts:
        wanted = is_adapters(part.name) or base == "first"
        if wanted and (weights == "first" or not part.parameter.requires_grad):
            part.local.copy_(_first_values(part, config))
    held = Held(model, parts, dropout)
    return NativeEngine(config, accelerator, task, place, held, gathered=gathered, opened_group=opens_group)


class NativeEngine:
    """See `engines/base.py`, Engine."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        task: Task,
        place: MeshPlace,
        held: Held,
        *,
        gathered: bool,
        opened_group: bool,
    ):
        """gathered: see `fits_gathered`."""
        self.data_rank, self.data_size = place.data_rank, place.data_size
        self._config = config
        # Without an index: on Neuron only the bare name is right.
        self._device = torch.device(accelerator.device_type)
        self._sum_dtype: torch.dtype = getattr(torch, accelerator.sum_dtype)
        self._static_shapes = accelerator.static_shapes
        self._task = task
        self._place = place
        self._model, self._dropout = held.model, held.dropout
        self._parts = [part for part in held.parts if part.parameter.requires_grad]
        self._frozen = [part for part in held.parts if not part.parameter.requires_grad]
        self._opened_group = opened_group
        self._optimizer = _build_optimizer(config, self._parts)
        group = place.mesh.get_group("tensor") if place.mesh is not None and place.tensor_size > 1 else None
        self._head = PiecewiseHead(task, vocabulary_group=group, sum_dtype=self._sum_dtype)
        # With whole gradients kept between micro-batches, only the last one talks to other ranks. (FSDP2 only: under
        # SimpleFSDP the reduction is part of the graph, so every micro-batch reduces, into this rank's rows.)
        self._syncs_last_only = gathered
        self._waiting, modules = Waiting(accelerator.device_type), list(fsdp_modules(self._model))
        self._watch = GradientWatch(modules, self._waiting, device_type=accelerator.device_type)
        self._knows_waiting = bool(modules) and self.data_size > 1

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        self._waiting.taken()
        counts = counts_of(self._task, batch)
        accumulate = partial(self._accumulate_gradients, batch, step=step, data_rank=self.data_rank)
        if audit is None:
            sums = accumulate()
        else:
            sums, found = self._watch.of(accumulate)
            audit(found)
        gradients = self._local_gradients()
        total = self._sum_over_ranks(sums, counts, square_norm=self._square_norm(gradients), votes=votes)

        # A step in which nothing counts has loss 0 and a gradient of zeros, not NaN.
        divisor = total.sums[total.names.index(self._task.divisor)]
        divisor_or_1 = divisor.where(divisor != 0, 1)
        norm = total.square_norm.sqrt() / divisor_or_1
        left_out = self._left_out(norm, total)
        scale = (self._config.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1) / divisor_or_1
        torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
            [gradient for _, gradient in gradients], scale.float()
        )

        rate = learning_rate(self._config.optimizer, step=step, total_steps=self._config.train.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for part, gradient in gradients:
            part.local.grad = gradient
        # What torch's GradScaler sets: where it is 1, the fused kernel touches neither parameters nor moments, and its
        # count of updates stays.
        self._optimizer.found_inf = left_out.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        for part in self._parts:
            part.local.grad = part.parameter.grad = None

        # The step's one wait for the device.
        flags = left_out.to(norm.dtype).reshape(1)
        masked, norm, *numbers = torch.cat((flags, norm.reshape(1), total.sums, total.votes)).tolist()
        named = dict(zip(total.names, numbers, strict=False))
        agreed = Votes(*(count > 0 for count in numbers[len(named) :]))
        loss, waited = loss_of(self._task, named), self._waiting.taken() if self._knows_waiting else None
        return StepResult(loss, norm, named, rate, agreed, updated=not masked, waited_seconds=waited)

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        sums = self._accumulate_gradients(batch, step=step, data_rank=self.data_rank)
        # Of all parameters: on another rank one without elements here may have some.
        names = list(dict.fromkeys(layer_of(name) for name in parameter_names(self._model)))
        squares = torch.zeros(len(names), dtype=self._sum_dtype, device=self._device)
        for part, gradient in self._local_gradients():
            squares[names.index(layer_of(part.name))] += self._square_norm([(part, gradient)])
            part.parameter.grad = None
        total = self._sum_over_ranks(sums, counts_of(self._task, batch), square_norm=0.0, votes=Votes())
        if dist.is_initialized():
            dist.all_reduce(squares)
        divisor = total.sums[total.names.index(self._task.divisor)]
        norms = (squares.sqrt() / divisor.where(divisor != 0, 1)).tolist()
        return dict(zip(names, norms, strict=True))

    def _left_out(self, norm: Tensor, total: Total) -> Tensor:
        """Bool on the device, equal on all ranks: whether this step must not change anything."""
        unwanted = total.votes[Votes._fields.index("leave_out")] > 0
        return unwanted | ~(norm.isfinite() & total.sums.isfinite().all())

    def _accumulate_gradients(self, batch: Batch, *, step: int, data_rank: int) -> Tensor:
        """Forward and backward of every micro-batch; returns the task's sums over that data rank's rows, the batch."""
        micro_batches = list(self._micro_batches(batch))
        sums = torch.zeros(len(self._task.sums), dtype=self._sum_dtype, device=self._device)
        for index, (micro_batch, places_C) in enumerate(micro_batches):
            if self._syncs_last_only and isinstance(self._model, FSDPModule):
                last = index == len(micro_batches) - 1
                self._model.set_requires_gradient_sync(last)
                self._model.set_reshard_after_backward(last)
                self._model.set_is_last_backward(last)
            if self._dropout is not None:
                first = (data_rank * len(micro_batches) + index) * len(self._dropout.keys_B)
                rows = range(first, first + len(self._dropout.keys_B))
                self._dropout.keys_B.copy_(row_keys(seed=self._config.run.seed, step=step, rows=rows))
            objective, sums_here = self._finished(micro_batch, self._head.learning(micro_batch, places_C))
            objective.backward()
            sums += sums_here
        return sums

    def _local_gradients(self) -> list[tuple[HeldPart, Tensor]]:
        """This rank's parts with the gradients of the objective's sum, summed over data ranks."""
        gradients = []
        for part in self._parts:
            gradient = part.parameter.grad
            assert gradient is not None, f"{part.name} took no part in the forward pass"
            gradients.append((part, _local(gradient)))
        return gradients

    def _square_norm(self, gradients: list[tuple[HeldPart, Tensor]]) -> Tensor:
        """Of this rank's contribution: a part counts on its first holder."""
        norm = torch.nn.utils.get_total_norm([gradient for part, gradient in gradients if part.first_holder])
        return norm.to(self._sum_dtype).square()

    def _sum_over_ranks(self, sums: Tensor, counts: Sums, *, square_norm: Tensor | float, votes: Votes) -> Total:
        """In one all-reduce, in float64, or float32 where the device has no wider: then counts are exact up to 2**24.

        sums, counts: the task's, of this data rank. Each number is contributed once: these by one rank of a tensor
        group. A rank that dies here leaves the others waiting until the agents end the generation.
        """
        counts_here = self._place.tensor_rank == 0
        names = (*self._task.sums, *counts)
        numbers = [*(0 for _ in sums), *(count * counts_here for count in counts.values()), 0, *votes]
        mine = torch.tensor(numbers, dtype=self._sum_dtype, device=self._device)
        mine[: len(sums)], mine[len(names)] = sums * counts_here, square_norm
        if dist.is_initialized():
            with self._waiting.counts():
                dist.all_reduce(mine)
        return Total(names, mine[: len(names)], mine[len(names)], mine[len(names) + 1 :])

    # ---- audits: see `train/audit.py`, Auditable ---------------------------------------------------------------------

    def rehearse(self, batch: Batch, *, step: int, data_rank: int) -> int:
        accumulate = partial(self._accumulate_gradients, batch, step=step, data_rank=data_rank)
        _, found = self._watch.of(accumulate, reduces=False)
        for part in self._parts:
            part.parameter.grad = None
        return found

    def replicas(self) -> int:
        held = [part for part in self._parts if isinstance(part.parameter, DTensor)]
        alike = [part.local for part in held if not _split_over_tensor(part.parameter)]
        return int(checksum(alike)) if alike and self._place.tensor_size > 1 else 0

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Sums:
        counts = counts_of(self._task, batch)
        sums = torch.zeros(len(self._task.sums), dtype=self._sum_dtype, device=self._device)
        for micro_batch, places_C in self._micro_batches(batch):
            sums += self._finished(micro_batch, self._head.evaluating(micro_batch, places_C))
        self._reshard()
        total = self._sum_over_ranks(sums, counts, square_norm=0.0, votes=Votes())
        return dict(zip(total.names, total.sums.tolist(), strict=True))

    @torch.no_grad()
    def row_log_probs(self, batch: Batch) -> Tensor:
        rows = [
            self._finished(micro_batch, self._head.row_log_probs(micro_batch, places_C))
            for micro_batch, places_C in self._micro_batches(batch)
        ]
        self._reshard()
        return torch.cat(rows).float().cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        mine = (values * (self._place.tensor_rank == 0)).to(self._device)
        if dist.is_initialized():
            dist.all_reduce(mine)
        return mine.cpu()

    def _reshard(self) -> None:
        """Where no backward will: the whole parameters would outlive a load of new ones."""
        for module in fsdp_modules(self._model):
            module.reshard()

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, Tensor | None]]:
        """Each on the device, with the places of its labels that count, if others need no logits."""
        rows = self._config.train.micro_batch_size
        for here, on_device in zip(batch.split(rows), batch.to(self._device).split(rows), strict=True):
            places_C = None if self._static_shapes else counted_places(here.labels_BT)
            yield on_device, None if places_C is None else places_C.to(self._device, non_blocking=True)

    def _finished(self, batch: Batch, finish: Finish) -> Any:
        return self._model(batch.tokens_BT, batch.documents_BT, finish=finish)

    # ---- state -------------------------------------------------------------------------------------------------------

    def state(self) -> list[Chunk]:
        chunks = []
        for part in self._parts:
            moments = self._optimizer.state[part.local]
            for prefix, tensor in (
                ("model", part.local),
                ("optimizer/exp_avg", moments["exp_avg"]),
                ("optimizer/exp_avg_sq", moments["exp_avg_sq"]),
            ):
                name = f"{prefix}/{part.name}"
                chunks.append(Chunk(name, part.global_shape, part.offsets, tensor, saved_here=part.first_holder))
        return chunks

    def frozen_state(self) -> list[Chunk]:
        return [
            Chunk(f"{MODEL_PREFIX}{part.name}", part.global_shape, part.offsets, part.local, saved_here=False)
            for part in self._frozen
        ]

    def set_updates(self, updates: int) -> None:
        for moments in self._optimizer.state.values():
            moments["step"].fill_(updates)

    def close(self) -> None:
        if self._opened_group:
            dist.destroy_process_group()


# ---- Building --------------------------------------------------------------------------------------------------------


def _mesh_place(world: World, accelerator: Accelerator) -> MeshPlace:
    mesh = mesh_of(world, accelerator.device_type)
    return MeshPlace(mesh, mesh.get_local_rank("data"), world.data, mesh.get_local_rank("tensor"), world.tensor)


def _build_model(
    config: Config,
    accelerator: Accelerator,
    place: MeshPlace,
    dtype: torch.dtype,
    compile_backend: Backend | str,
    *,
    gathered: bool,
    dropout: Dropout | None,
) -> tuple[Decoder, list[HeldPart]]:
    """The parallelised decoder, its weights as memory was.

    On the meta device until it is sharded: no rank ever holds more than its parts and, on the CPU, one of them again.
    """
    with torch.device("meta"):
        model = Decoder(config.model)
        adapt(model, config.adapter, frozen_dtype=dtype, dropout=dropout)
    if place.tensor_size > 1:
        assert place.mesh is not None
        for field, size in divided_sizes(config.model, seq_len=config.data.seq_len).items():
            assert size % place.tensor_size == 0, f"{field} {size} is not a multiple of {place.tensor_size}"
        apply_tensor_parallel(model, place.mesh["tensor"])
    simple_mesh = place.mesh if _fsdp(config, accelerator) == "simple" else None
    if simple_mesh is not None:
        refuse_simple_fsdp(config)
    data_group = None if simple_mesh is None else simple_mesh.get_group("data").group_name
    compile_backend = with_recompute_marks(compile_backend, data_group=data_group, keep_gathered=gathered)
    wrap_blocks(model, config.engine, compile_backend=compile_backend, whole_graphs=simple_mesh is not None)
    if simple_mesh is not None:
        shard_parameters(model, simple_mesh)
    elif place.mesh is not None:
        apply_fsdp(model, place.mesh["data"], compute_dtype=dtype, gathered=gathered)
    model.to_empty(device=accelerator.device_type)
    # to_empty gave embedding and head memory of their own.
    model.tie()
    if simple_mesh is not None:
        gather_in_forward(model, simple_mesh, compute_dtype=dtype)

    parts = [_held_part(name, parameter, place) for name, parameter in parameter_names(model).items()]
    return model, [part for part in parts if part.local.numel() > 0]


def _dropout(config: Config, accelerator: Accelerator) -> Dropout | None:
    if config.adapter.rank is None or config.adapter.dropout == 0:
        return None
    keys_B = torch.zeros(config.train.micro_batch_size, dtype=torch.int32, device=accelerator.device_type)
    return Dropout(config.adapter.dropout, keys_B)


def _held_part(name: str, parameter: Tensor, place: MeshPlace) -> HeldPart:
    local = _local(parameter.detach())
    if not isinstance(parameter, DTensor):
        return HeldPart(name, parameter, local, tuple(parameter.shape), (0,) * parameter.ndim, first_holder=True)
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(shape) == tuple(local.shape), f"{name}: {shape} expected, {tuple(local.shape)} held"
    first_holder = _split_over_tensor(parameter) or place.tensor_rank == 0
    return HeldPart(name, parameter, local, tuple(parameter.shape), tuple(offsets), first_holder)


def _split_over_tensor(parameter: Tensor) -> bool:
    assert isinstance(parameter, DTensor)
    return any(isinstance(placement, Shard) for placement in parameter.placements[1:])


def _first_values(part: HeldPart, config: Config) -> Tensor:
    return init_block(
        part.name,
        global_shape=part.global_shape,
        offsets=part.offsets,
        shape=tuple(part.local.shape),
        seed=config.run.seed,
        config=config.model,
        threads=max(1, usable_cores() // config.cluster.ranks_per_node),
    )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor that needs no more communication; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert not any(isinstance(placement, Partial) for placement in tensor.placements)
    return tensor.to_local()


def _fsdp(config: Config, accelerator: Accelerator) -> str:
    """The driver settles `auto` for its records; here the same answer for a config that saw no driver."""
    if config.engine.fsdp != "auto":
        return config.engine.fsdp
    return native_fsdp(accelerator.name, compile=config.engine.compile)


def _build_optimizer(config: Config, parts: list[HeldPart]) -> torch.optim.AdamW:
    """AdamW over plain local parts: it works element by element, so it need not know of DTensor, whose dispatch costs
    more than the arithmetic of a small model. Moments exist from the start: a checkpoint of step 0 is complete.
    """
    settings = config.optimizer
    matrices = [part.local for part in parts if decays(part.global_shape)]
    others = [part.local for part in parts if not decays(part.global_shape)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    for part in parts:
        optimizer.state[part.local] = {
            "step": torch.zeros((), dtype=torch.float32, device=part.local.device),
            "exp_avg": torch.zeros_like(part.local),
            "exp_avg_sq": torch.zeros_like(part.local),
        }
    return optimizer
