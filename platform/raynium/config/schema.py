"""The one schema of a run. A job file holds only what differs from these defaults.

Every model is frozen and refuses unknown keys. A model checks its own fields here; rules that cross parts
(batch × ranks, tensor parallelism × heads × cores, memory) are in `planning/rules.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raynium.config.families import FAMILIES, Family, FamilyName

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[str, Field(min_length=1, description="a folder, a file or a URL")]


class Section(BaseModel):
    """A frozen part of the config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class RunSection(Section):
    """Who the run is and where it lives. Everything it writes is under `<root>/<name>/`."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
            description="1 to 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first",
        ),
    ]
    root: Location = "runs"  # folder or URL (s3://bucket/prefix); shared by all nodes
    seed: NonNegativeInt = 0


class ClusterSection(Section):
    """The machines. One Ray Train worker (the node agent) per node forks `ranks_per_node` ranks."""

    accelerator: Literal["auto", "cpu", "cuda", "neuron", "neuron_xla"] = "auto"
    instance_type: str | None = None  # a name of the hardware catalogue; None: not checked against one
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt = 1  # one rank per NeuronCore, GPU, or CPU slot


class RopeScaling(Section):
    """Llama 3.1's frequency scaling (transformers: `rope_type: llama3`)."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_seq_len: PositiveInt


class ModelSection(Section):
    """A decoder's dimensions. `family` settles the architecture's fixed points (`config/families.py`)."""

    family: FamilyName = "llama3"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_size: PositiveInt  # inner width of the SwiGLU block
    max_seq_len: PositiveInt  # the longest sequence RoPE is valid for
    rope_theta: PositiveFloat = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    embeddings: Literal["tied", "untied"] = "untied"
    init_std: PositiveFloat = 0.02

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]


class DataSection(Section):
    """A document store: token shards and a manifest under `path`.

    If `path` holds no store yet and `source` is given, the driver makes one before training.
    """

    path: Location  # folder or s3:// URL of the document store
    # Of the content that must be there (`identity` in its manifest.json). None: whatever is; the driver fills it in, so
    # that a run goes on with the same content only, wherever it lies.
    identity: Annotated[
        str | None, Field(pattern=r"^[0-9a-f]{64}$", description="the identity of a document store, 64 hex digits")
    ] = None
    source: Location | None = None  # "python-stdlib", or a folder or file of .txt / .py / .md / .jsonl
    tokenizer: Location | None = None  # tokenizer.json to use; None: train a byte-level BPE on the source
    end_of_document: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="the token that ends a document, of data.tokenizer; null: what the files beside it say "
        "(tokenizer_config.json, config.json, generation_config.json)",
    )
    max_left_out: Fraction = Field(
        0.1,
        description="the share of the source's text that may be left out (not UTF-8, kinds that are not read, null) "
        "before that is refused, 0 to 1",
    )
    heldout_fraction: FractionBelowOne = 0.05  # of documents, chosen by a hash of their names
    seq_len: PositiveInt


class ParallelSection(Section):
    """How the ranks are laid out. Data parallel (FSDP, or ZeRO-1 under nxd) takes what the others leave."""

    tensor: PositiveInt = 1  # tensor parallel degree; sequence parallelism comes with it
    pipeline: PositiveInt = 1  # number of stages, each with an equal share of the layers; engine.kind nxd only


class EngineSection(Section):
    """How a step is computed."""

    kind: Literal["native", "nxd"] = "native"
    # Of compute; master weights and optimizer are float32. auto: bfloat16 where the device multiplies it natively.
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: Literal["none", "block"] = "none"  # "block": torch.compile each decoder block
    # How the native engine shards over data ranks. fsdp2: hooks gather ahead of each block. simple: SimpleFSDP, the
    # compiled blocks hold their own gathers and reductions. auto: simple for compiled blocks on neuron, else fsdp2.
    fsdp: Literal["auto", "fsdp2", "simple"] = "auto"


class OptimizerSection(Section):
    """AdamW with decoupled weight decay on matrices only, and the learning-rate schedule."""

    learning_rate: PositiveFloat = 3e-4
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: PositiveFloat = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_fraction: Fraction = 0.2  # wsd: the share of all steps spent in the final decay
    final_learning_rate_ratio: Fraction = 0.1  # of the peak, reached at the last step


class TrainSection(Section):
    """How long, and how much per step. Batch sizes count sequences of `data.seq_len` tokens."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1  # per data-parallel rank and forward pass


class CheckpointSection(Section):
    """When to save, what to keep (for any one of the reasons), and what to do when that does not go well."""

    every_steps: PositiveInt = 100
    # "never": nothing is kept, also not at the end, for runs that only measure or compile.
    save: Literal["steps", "never"] = "steps"
    # Both of a rank's images are still being uploaded when the next save is due: wait for one, or leave that save out.
    if_busy: Literal["wait", "skip"] = "wait"
    # The newest checkpoint proves damaged: end with the cause, or set it aside and go on from the next older one.
    if_damaged: Literal["stop", "use_older"] = "stop"
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None  # also those of steps that are multiples of it, for ever
    keep_best: NonNegativeInt = 0  # also so many with the lowest held-out loss, among those that were evaluated
    best_metric: Literal["eval/loss", "eval/bits_per_byte"] = "eval/loss"


class EvaluateSection(Section):
    """Held-out loss in bits per byte."""

    every_steps: PositiveInt = 100
    max_documents: PositiveInt = 64


class TrackingSection(Section):
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else SQLite at <root>/mlflow.db
    experiment: str = "raynium"


class FaultSection(Section):
    """What a failure may cost before the run gives up."""

    max_restarts_without_progress: NonNegativeInt = 3  # generations that failed with no new checkpoint between
    max_node_failures_without_progress: NonNegativeInt = 8  # lost nodes and agents with no new checkpoint between
    # An upload of which nothing moves for so long is given up: training goes on without that checkpoint.
    upload_silence_seconds: PositiveFloat = 300.0
    # Ranks that have not saved and ended so long after the run was asked to stop are killed.
    stop_seconds: PositiveFloat = 900.0


class PreflightSection(Section):
    """Checks of the nodes before their ranks start; `raynium preflight` makes all of them without a run."""

    # all: with a trial of the ranks (products, all-reduces); host: what shows without one. auto: all on accelerators,
    # on CPU host, and none where the run has one CPU node, since training itself says as much within a second.
    before_run: Literal["auto", "all", "host", "none"] = "auto"
    seconds: PositiveFloat = 180.0  # from when the nodes are there; it ends when all have answered


class SampleSection(Section):
    """Text drawn from the model when the run ends."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: PositiveInt = 120
    temperature: Annotated[float, Field(ge=0)] = 0.8


class Config(Section):
    """A whole run. Its resolved form is printed, logged to MLflow, kept in the run record, and runs again as it is."""

    run: RunSection
    cluster: ClusterSection = ClusterSection()
    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    fault: FaultSection = FaultSection()
    preflight: PreflightSection = PreflightSection()
    sample: SampleSection = SampleSection()

    @property
    def tokens_per_step(self) -> int:
        """Tokens that contribute to one optimizer step, over all ranks."""
        return self.train.global_batch_size * self.data.seq_len
