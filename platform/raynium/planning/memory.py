"""How much device memory a rank needs: an *estimate* by arithmetic, before any node is paid for.

What it counts, for the native engine (FSDP2 over the data-parallel ranks × tensor and sequence parallelism):

- parameters, gradients and AdamW's two moments: float32, each sharded over all ranks (norms over the FSDP ranks only);
- with an adapter: the model's own weights in the compute type, sharded the same way, without gradients or moments
  ("parameters" counts them too); A and B, float32, over the FSDP ranks;
- gathered blocks: FSDP holds the block at work and the one fetched ahead in the compute type, with the gradients of the
  one at work; the embedding and the output head, which begin and end the pass, stay gathered through it;
- activations saved for the backward pass, after Korthikanti et al. 2022 (arXiv 2205.05198, §4), with their terms
  recounted for this decoder: RMSNorm, grouped-query attention by a fused kernel (no seq × seq scores), SwiGLU, no
  dropout. DTensor keeps the gathered input of a column-parallel layer: that term is not divided by the tensor degree;
- logits: those of a piece of the tokens (models/pieces.py), once, in the compute type, because the loss turns them into
  their gradient in place; with more than one piece, the gradient of the head's weight too, summed in float32. Under nxd
  they are whole, and float32 beside.

With pipeline parallelism it is the stages' worst parts together: an equal share of the blocks; of a table and the final
norm what the first or last stage has; activations as without, because the first stage holds as many micro-batches as
there are stages, each in its share of the blocks (one-forward-one-backward); the logits of the last stage.

Not counted: the compiler's scratch space, collective buffers, fragmentation. `USABLE_FRACTION` leaves room for them.
"""

from dataclasses import dataclass, fields, replace

from raynium.config.images import copy_slots, image_slots
from raynium.config.schema import Config, ModelSection
from raynium.config.world import World
from raynium.models.adapter import learns_whole
from raynium.models.flops import learned_count, norms_per_block, parameter_count
from raynium.models.pieces import tokens_of_a_piece

GIB = 2**30
FLOAT32_BYTES = 4
# auto: bfloat16 on every device that has a memory to be planned for.
BYTES_OF_DTYPE = {"auto": 2, "float32": 4, "bfloat16": 2}
# As in models/attention.py, which imports torch.
ATTENTION_BLOCK = 128
# An assumption, not a measurement: what a plan may fill of a core's nominal memory.
USABLE_FRACTION = 0.9


@dataclass(frozen=True)
class ParameterParts:
    """A decoder's parameters by how they are sharded; the parts add up to `models.flops.parameter_count`.

    embeddings: the token embedding, and the output head where it is untied; they and matrices_per_block are split by
    tensor parallelism. norms_per_block: whole on every tensor-parallel rank.
    """

    embeddings: int
    matrices_per_block: int
    norms_per_block: int
    final_norm: int
    num_blocks: int

    @property
    def split(self) -> int:
        return self.embeddings + self.num_blocks * self.matrices_per_block

    @property
    def norms(self) -> int:
        return self.num_blocks * self.norms_per_block + self.final_norm


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes a rank holds at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    gathered_blocks: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def in_words(self) -> str:
        """Each part in GiB, for messages and tables."""
        parts = ", ".join(f"{p.name.replace('_', ' ')} {getattr(self, p.name) / GIB:.2f}" for p in fields(self))
        return f"{self.total / GIB:.2f} GiB a rank ({parts})"


def parameter_parts(model: ModelSection) -> ParameterParts:
    """Exact counts, in numbers of parameters."""
    embeddings = model.vocab_size * model.hidden_size * (2 if model.embeddings == "untied" else 1)
    norms = model.num_layers * norms_per_block(model) + model.hidden_size
    return ParameterParts(
        embeddings=embeddings,
        matrices_per_block=(parameter_count(model).total - embeddings - norms) // model.num_layers,
        norms_per_block=norms_per_block(model),
        final_norm=model.hidden_size,
        num_blocks=model.num_layers,
    )


def estimate_memory(config: Config, *, data_parallel: int) -> MemoryEstimate:
    """Estimated peak bytes per rank; data_parallel: ranks that see different samples (`World.data`)."""
    parts = _parts_of_stage(config)
    compute_bytes = BYTES_OF_DTYPE[config.engine.dtype]
    tensor = config.parallel.tensor
    own_parameters = _per_rank(parts, tensor, data_parallel)
    learned, frozen_bytes = own_parameters, 0
    if config.adapter.rank is not None:
        count = learned_count(config.model, config.adapter)
        # A or B of each matrix is whole on every tensor rank: counted as if both were.
        learned = -(-count.adapter // data_parallel) + -(-count.whole // (tensor * data_parallel))
        frozen_bytes = (own_parameters - count.whole // (tensor * data_parallel)) * compute_bytes
    return MemoryEstimate(
        parameters=learned * FLOAT32_BYTES + frozen_bytes,
        gradients=learned * FLOAT32_BYTES,
        optimizer=learned * 2 * FLOAT32_BYTES,
        gathered_blocks=_gathered_bytes(config, parts, data_parallel, compute_bytes),
        activations=_activation_bytes(config, compute_bytes),
        logits=_logit_bytes(config, compute_bytes),
    )


def shared_memory_bytes(config: Config) -> int:
    """Estimated bytes of one node's /dev/shm: parameters and both moments of each rank, in each of its own images and
    of the copies that the node holds of another's.
    """
    estimate = estimate_memory(config, data_parallel=World.of(config).data)
    images = image_slots(config.fault) + copy_slots(config)
    return images * config.cluster.ranks_per_node * (estimate.parameters + estimate.optimizer)


def _parts_of_stage(config: Config) -> ParameterParts:
    whole, num_stages = parameter_parts(config.model), config.parallel.pipeline
    if num_stages == 1:
        return whole
    # Tied or not, a stage has one: the other is on another stage.
    one_table = config.model.vocab_size * config.model.hidden_size
    return replace(whole, embeddings=one_table, num_blocks=-(-whole.num_blocks // num_stages))


def _per_rank(parts: ParameterParts, tensor: int, data_parallel: int) -> int:
    """Parameters one rank keeps: matrices over all ranks, norms over the FSDP ranks, rounded up."""
    split = -(-parts.split // (tensor * data_parallel))
    return split + -(-parts.norms // data_parallel)


def _gathered_bytes(config: Config, parts: ParameterParts, data_parallel: int, compute_bytes: int) -> int:
    tensor = config.parallel.tensor
    # One data-parallel rank still casts to the compute type what it keeps in float32; what is frozen it keeps as it is.
    if data_parallel == 1 and (compute_bytes == FLOAT32_BYTES or config.adapter.rank is not None):
        return 0
    block = parts.matrices_per_block // tensor + parts.norms_per_block
    # The block at work, the one fetched ahead, and the gradients of the one at work, if it has any.
    held_blocks = min(2, parts.num_blocks) + (config.adapter.rank is None)
    return (held_blocks * block + 2 * parts.embeddings // tensor) * compute_bytes


def _activation_bytes(config: Config, compute_bytes: int) -> int:
    """Saved activations: of every block, or with checkpointing every block's input and one block while it is redone."""
    model, tensor = config.model, config.parallel.tensor
    tokens = config.train.micro_batch_size * config.data.seq_len
    query_size = model.num_heads * model.head_dim
    key_value_size = model.num_kv_heads * model.head_dim
    # Per token and block. Every norm keeps its input, in float32, and the normalised input: split over the tensor axis
    # along the tokens (norms of q and k: along the heads).
    normed_elements = 2 * model.hidden_size
    if model.traits.head_norms:
        normed_elements += query_size + key_value_size
    norms = normed_elements * (FLOAT32_BYTES + compute_bytes) / tensor
    # The inputs of q/k/v and of gate/up, whole on every rank.
    gathered = 2 * model.hidden_size * compute_bytes
    # q, k, v and the output.
    attention = (2 * query_size + 2 * key_value_size) * compute_bytes / tensor
    # gate, up, silu(gate), and their product.
    feed_forward = 4 * model.ffn_size * compute_bytes / tensor
    block = norms + gathered + attention + feed_forward
    mask = _mask_bytes(config, compute_bytes) if config.data.packing == "documents" else 0
    if config.engine.activation_checkpointing == "full":
        inputs = model.num_layers * model.hidden_size * compute_bytes / tensor
        # Compiled blocks keep attention's output too: engines/recompute.py.
        if config.engine.compile == "block":
            inputs += model.num_layers * query_size * compute_bytes / tensor
        return int(tokens * (inputs + block)) + mask
    return int(tokens * model.num_layers * block) + mask


def _mask_bytes(config: Config, compute_bytes: int) -> int:
    """Of rows of several documents, one for all layers: models/attention.py."""
    rows, seq_len = config.train.micro_batch_size, config.data.seq_len
    if config.cluster.accelerator == "cuda":
        # Numbers of blocks in four orders, int32.
        return rows * 4 * 4 * (-(-seq_len // ATTENTION_BLOCK)) ** 2
    return rows * seq_len**2 * compute_bytes


def _logit_bytes(config: Config, compute_bytes: int) -> int:
    tokens = config.train.micro_batch_size * config.data.seq_len
    vocabulary = config.model.vocab_size // config.parallel.tensor
    if config.engine.kind == "nxd":
        # Its cross-entropy takes float32, and makes none where they are.
        return tokens * vocabulary * (compute_bytes + (FLOAT32_BYTES if compute_bytes != FLOAT32_BYTES else 0))
    head_learns = learns_whole("head.weight", config.model, config.adapter)
    widens = head_learns and compute_bytes != FLOAT32_BYTES
    sum_bytes = vocabulary * config.model.hidden_size * FLOAT32_BYTES if widens else 0
    piece = tokens_of_a_piece(tokens, token_bytes=vocabulary * compute_bytes, sum_bytes=sum_bytes)
    return piece * vocabulary * compute_bytes + (sum_bytes if piece < tokens else 0)
