"""How a run's parameters begin: each value a pure function of (seed, name, shape, place), so a rank makes only its own.

A matrix is cut into tiles, and each tile has a stream of random numbers of its own. Whatever the layout, a rank draws
the tiles that its block meets and gets the bits that the whole matrix has there.
"""

import hashlib
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

# By name: numpy loads the module late, and a forked rank should not.
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor

from raynium.config.schema import ModelSection
from raynium.models.adapter import DOWN, UP

Draw = Literal["normal", "uniform"]

# Part of what a seed means: other tiles are other weights. A tile is large enough that its numbers take 10 times the
# work about it, and small enough that few lie across the edges of a rank's blocks: on 64 ranks it draws up to 3 % more
# than it holds; on 1,024, where a rank of Llama 3 70B has 8 rows of a matrix, twice that, in 2 s.
TILE_ROWS, TILE_COLUMNS = 32, 256
# Of a tile's 100 µs about 10 are under the interpreter's lock.
MOST_THREADS = 8


def init_block(
    name: str,
    *,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    shape: tuple[int, ...],
    seed: int,
    config: ModelSection,
    threads: int = 1,
) -> Tensor:
    """The block of `shape` that begins at `offsets` of parameter `name` (e.g. "blocks.0.ffn.up.weight").

    float32 on the CPU, in new memory; bit by bit that part of `init_parameter`, on any number of threads. It may have
    no elements. Drawn are the tiles that the block meets, less their rows below it.

    Norm weights are 1, biases 0. Everything else is normal(0, init_std), and the two matrices of a layer that write
    into the residual stream are smaller by sqrt(2 * num_layers), so that its variance does not grow with depth (GPT-2).
    Of an adapter, A is uniform over ±1/sqrt(inputs), as PEFT begins (kaiming_uniform of sqrt(5)), and B is 0.
    """
    ends = (begin + size for begin, size in zip(offsets, shape, strict=True))
    assert all(end <= size for end, size in zip(ends, global_shape, strict=True)), f"{name}: {offsets} + {shape}"
    if len(global_shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    assert len(global_shape) == 2, f"{name}: first weights are vectors or matrices, not {global_shape}"
    if name.endswith(f".{UP}"):
        return torch.zeros(shape)
    block = torch.empty(shape)
    if block.numel() == 0:
        return block
    std = config.init_std
    draw: Draw = "normal"
    if name.endswith(f".{DOWN}"):
        draw, std = "uniform", 1 / math.sqrt(global_shape[1])
    if name.endswith(("attention.o.weight", "ffn.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    # A band is a row of tiles.
    bands = range(offsets[0] // TILE_ROWS, (offsets[0] + shape[0] - 1) // TILE_ROWS + 1)
    threads = min(threads, len(bands), MOST_THREADS)

    def fill(first: int) -> None:
        mine = bands[first::threads]
        _fill_bands(block.numpy(), mine, offsets, num_columns=global_shape[1], key=key, draw=draw, scale=std)

    if threads == 1:
        fill(0)
    else:
        # numpy draws without the interpreter lock.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))
    return block


def _fill_bands(
    block: NDArray[np.float32],
    bands: Iterable[int],
    offsets: tuple[int, ...],
    *,
    num_columns: int,
    key: int,
    draw: Draw,
    scale: float,
) -> None:
    """What `block` has of some rows of tiles. num_columns: of the whole parameter, at whose edge tiles are narrower.
    scale: the standard deviation of normals, or the bound of numbers that are uniform on both sides of 0.

    Tile (i, j) is the numbers, row by row, of Philox with the parameter's key from counter i * 2**128 + j * 2**192 on.
    Two tiles share no random bit: that takes 2**128 counts, and each gives four words where a normal rarely takes two.
    numpy's Philox and not torch's generator: torch draws other bits on CPUs with other vector units.
    """
    (first_row, first_column), (num_rows, width) = offsets, block.shape
    philox = Philox(key=key)
    numbers = Generator(philox)
    state = philox.state
    counter = state["state"]["counter"]
    room = np.empty(TILE_ROWS * TILE_COLUMNS, np.float32)
    tiles = range(first_column // TILE_COLUMNS, (first_column + width - 1) // TILE_COLUMNS + 1)
    for i in bands:
        # Of the block, where the tile begins: negative if that is above it.
        row = i * TILE_ROWS - first_row
        top, bottom = max(row, 0), min(row + TILE_ROWS, num_rows)
        for j in tiles:
            column = j * TILE_COLUMNS - first_column
            tile_width = min(TILE_COLUMNS, num_columns - j * TILE_COLUMNS)
            left, right = max(column, 0), min(column + tile_width, width)
            counter[2:] = i, j
            # This takes 0.8 µs; another generator would take 7.
            philox.state = state
            tile = room[: (bottom - row) * tile_width].reshape(bottom - row, tile_width)
            if draw == "normal":
                numbers.standard_normal(dtype=np.float32, out=tile)
            else:
                numbers.random(dtype=np.float32, out=tile)
                np.subtract(np.multiply(tile, 2, out=tile), 1, out=tile)
            held = tile[top - row :, left - column : right - column]
            np.multiply(held, scale, out=block[top:bottom, left:right])


def init_parameter(name: str, *, shape: tuple[int, ...], seed: int, config: ModelSection) -> Tensor:
    """The whole parameter `name`: `init_block` of everything."""
    return init_block(name, global_shape=shape, offsets=(0,) * len(shape), shape=shape, seed=seed, config=config)
