"""Training batches: what sample i holds is a pure function of (manifest, seed, i), so the whole state is the step.

The training stream is cut into windows of seq_len + 1 tokens, each beginning on the last token of the one before: every
token but the first is a label once per epoch (fewer than seq_len tokens at the stream's end are left out). Epoch e is
samples [e·n, (e+1)·n) of the n windows, in a shuffle of its own. Step s, counted from 1, takes samples [(s-1)·B, s·B).

B: sequences per step over all ranks, T: seq_len.
"""

import numpy as np
import torch

from raynium.data.batch import Batch
from raynium.data.permutation import shuffled
from raynium.data.store import DocumentStore
from raynium.errors import DataError

# Window numbers are computed in blocks: one numpy call costs the same for 1 as for 1,000 samples.
BLOCK_SAMPLES = 4096


class Loader:
    """One data-parallel rank's batches. Ranks of one tensor-parallel group pass the same `data_rank`.

    The global batch is the ranks' batches in rank order, the same at every `data_size`. Not thread-safe; no collective.
    """

    def __init__(
        self,
        store: DocumentStore,
        *,
        seq_len: int,
        global_batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
    ):
        """Raises DataError if the training stream is shorter than one window."""
        assert 0 <= data_rank < data_size and global_batch_size % data_size == 0
        self._stream = store.train_stream()
        if len(self._stream) < seq_len + 1:
            raise DataError(
                f"data.seq_len = {seq_len}: document store {store.path} holds {len(self._stream)} training tokens, "
                f"and one sample takes seq_len + 1; set data.seq_len to {len(self._stream) - 1} or less, or add text"
            )
        self.samples_per_epoch = (len(self._stream) - 1) // seq_len
        self._seq_len, self._seed = seq_len, seed
        self._global_batch_size, self._rank_batch_size = global_batch_size, global_batch_size // data_size
        self._data_rank = data_rank
        self._block, self._block_windows = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """This rank's share of a step: contiguous int64 tensors [B / data_size, T] on the CPU."""
        starts = self.sample_ids(step) * self._seq_len
        rows = self._stream.gather(starts, self._seq_len + 1)
        return Batch(
            tokens_BT=torch.from_numpy(rows[:, :-1].astype(np.int64)),
            labels_BT=torch.from_numpy(rows[:, 1:].astype(np.int64)),
        )

    def sample_ids(self, step: int) -> np.ndarray:
        """int64 [B / data_size]: the windows of this rank's rows, by their place in the stream."""
        assert step >= 1
        first = (step - 1) * self._global_batch_size + self._data_rank * self._rank_batch_size
        return self._windows(first, first + self._rank_batch_size)

    def _windows(self, begin: int, end: int) -> np.ndarray:
        """Windows of samples [begin, end), counted over all epochs."""
        pieces = []
        while begin < end:
            block, offset = divmod(begin, BLOCK_SAMPLES)
            if block != self._block:
                self._block_windows = self._compute_block(block)
                self._block = block
            pieces.append(self._block_windows[offset : offset + end - begin])
            begin += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _compute_block(self, block: int) -> np.ndarray:
        samples = np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES)
        epochs, positions = np.divmod(samples, self.samples_per_epoch)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = shuffled(
                positions[chosen], length=self.samples_per_epoch, seed=self._seed, epoch=int(epoch)
            )
        return windows
