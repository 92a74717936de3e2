"""What the first weights cost a rank: python tests/benchmarks/bench_init.py [--ranks llama3-8b:fsdp32 …]

The rank's shard is really made, parameter by parameter, each freed when the next begins: the same calls as the native
engine's, of one rank of a process group that only pretends to have others. Time is CPU time, which neighbours on the
machine disturb little; with two threads it is the clock's. Beside it:
- numpy's bare `standard_normal` into memory that is there, for as many elements: the limit of this generator;
- torch's `normal_` and `trunc_normal_` of the shard alone. torchtitan calls the latter on each parameter after
  `to_empty`. On GPUs it draws there, and DTensor moves each rank to its part of one sequence; other devices, and
  layouts that begin with the same weights, are not in its promise (torch.distributed.tensor._random, read, not run);
- all of the model on each rank, as before blocks could be made alone: computed from the time of one matrix.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from benchmark import heading, parser
from numpy.random import Generator, Philox
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from raynium.config.load import load_config
from raynium.config.schema import ModelSection
from raynium.engines.parallelize import apply_fsdp, apply_tensor_parallel, parameter_names
from raynium.models import init
from raynium.models.decoder import Decoder
from raynium.models.flops import parameter_count
from raynium.models.init import init_block

LAYOUTS = {  # model and layout → (FSDP, TP)
    "llama3-8b:fsdp32": (32, 1),
    "llama3-8b:fsdp8-tp8": (8, 8),
    "llama3-8b:fsdp16-tp4": (16, 4),  # jobs/configs/llama3-8b.yaml
    "llama3-70b:fsdp32": (32, 1),
    "llama3-70b:fsdp8-tp8": (8, 8),
    "llama3-70b:fsdp256-tp4": (256, 4),  # jobs/configs/llama3-70b.yaml
}
MATRIX = (2048, 4096)


class Part(NamedTuple):
    """One parameter's block on the rank."""

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Counting(Generator):
    """Of all matrices together, how many values were drawn: a rank's own and those of tiles across its edges."""

    drawn = 0

    def standard_normal(self, *args: Any, **options: Any) -> Any:
        values = super().standard_normal(*args, **options)
        Counting.drawn += values.size
        return values


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--ranks", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments = options.parse_args()
    heading()
    torch.set_num_threads(1)
    init.Generator = Counting

    print("| one thread, 8 M elements | ns per element |\n|---|---|")
    out, room = np.empty(MATRIX, np.float32), torch.empty(MATRIX)
    model = load_config("llama3-8b").model
    rates = {
        "numpy standard_normal, Philox": lambda: Generator(Philox(1)).standard_normal(dtype=np.float32, out=out),
        "a whole matrix by `init_block`": lambda: whole_matrix(model, threads=1),
        "torch `normal_`": lambda: room.normal_(0, 0.02),
        "torch `trunc_normal_`": lambda: nn.init.trunc_normal_(room, std=0.02),
    }
    ns = {name: min(cpu_seconds(make) for _ in range(5)) / out.size * 1e9 for name, make in rates.items()}
    for name, each in ns.items():
        print(f"| {name} | {each:.1f} |")
    one, two = (min(clock_seconds(lambda t=t: whole_matrix(model, threads=t)) for _ in range(7)) for t in (1, 2))
    print(f"\ntwo threads: {one / two:.2f} times as fast by the clock\n")

    print("| one rank of | holds, M | drawn × | seconds | values/s, M | numpy × | torch trunc_normal_ × "
          "| all on each rank, s | × | largest block, MB | peak memory, MB |\n|" + "---|" * 11)  # fmt: skip
    bare, trunc = ns["numpy standard_normal, Philox"], ns["torch `trunc_normal_`"]
    for layout in ["llama3-70b:fsdp256-tp4"] if arguments.tiny else arguments.ranks:
        preset, _, _ = layout.partition(":")
        model = load_config(preset).model
        parts = parts_of_rank(model, *LAYOUTS[layout])
        held = sum(volume(part) for part in parts)
        Counting.drawn = 0
        seconds = cpu_seconds(lambda parts=parts, model=model: make_all(parts, model))
        everywhere = parameter_count(model).total * ns["a whole matrix by `init_block`"] / 1e9
        cells = [
            layout, f"{held / 1e6:,.0f}", f"{Counting.drawn / held:.2f}",
            f"{seconds:.2f}", f"{held / seconds / 1e6:.0f}",
            f"{seconds / (held * bare / 1e9):.2f}", f"{seconds / (held * trunc / 1e9):.2f}",
            f"{everywhere:,.0f}", f"{everywhere / seconds:.0f}", f"{max(map(volume, parts)) * 4 / 1e6:,.0f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def parts_of_rank(model: ModelSection, data: int, tensor: int) -> list[Part]:
    """Of the last rank, as the native engine lays a model out on the meta device."""
    world_size = data * tensor
    dist.init_process_group("fake", store=FakeStore(), rank=world_size - 1, world_size=world_size)
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        decoder = Decoder(model)
    if tensor > 1:
        apply_tensor_parallel(decoder, mesh["tensor"])
    apply_fsdp(decoder, mesh["data"], compute_dtype=torch.float32, gathered=False)
    parts = []
    for name, parameter in parameter_names(decoder).items():
        assert isinstance(parameter, DTensor)
        place = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        parts.append(Part(name, tuple(parameter.shape), tuple(place[1]), tuple(place[0])))
    dist.destroy_process_group()
    return parts


def make_all(parts: list[Part], model: ModelSection) -> None:
    for part in parts:
        init_block(**part._asdict(), seed=0, config=model)


def volume(part: Part) -> int:
    return int(np.prod(part.shape))


def whole_matrix(model: ModelSection, *, threads: int) -> None:
    place: dict[str, Any] = {"global_shape": MATRIX, "offsets": (0, 0), "shape": MATRIX}
    init_block("head.weight", **place, seed=0, config=model, threads=threads)


def cpu_seconds(make: Callable[[], object]) -> float:
    began = time.process_time()
    make()
    return time.process_time() - began


def clock_seconds(make: Callable[[], object]) -> float:
    began = time.perf_counter()
    make()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
