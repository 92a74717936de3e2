"""The one schema of a run. A job file holds only what differs from these defaults.

Every model is frozen and refuses unknown keys. What is said here of a section (its docstring) and of a field (meaning,
unit, default, what it accepts) is what `raynium config` prints, docs/config.md holds and messages quote. A model checks
its own fields; rules that cross parts (batch × ranks, tensor parallelism × heads × cores, memory) are in
`planning/rules.py`.
"""

from typing import Annotated, Literal

from pydantic import Field

from raynium.config.adapter import AdapterSection
from raynium.config.cluster import ClusterSection
from raynium.config.evaluating import EvaluateSection
from raynium.config.families import FAMILIES, Family, FamilyName
from raynium.config.fault import FaultSection
from raynium.config.section import (
    Accepts,
    Bytes,
    Checkpoints,
    Columns,
    Features,
    Fraction,
    FractionBelowOne,
    Heads,
    Identity,
    Layers,
    Location,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    Ranks,
    Seconds,
    Section,
    Sequences,
    Steps,
    Tokens,
    Unit,
)


class RunSection(Section):
    """Who the run is and where it lives. Everything it writes is under `<root>/<name>/`."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$"),
        Accepts("1 to 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first"),
    ]
    """The run's name: the same name goes on with the same run, another begins anew."""
    root: Location = "runs"
    """Where runs are kept; all nodes must see it: s3://bucket/prefix, or NFS."""
    seed: NonNegativeInt = 0
    """Settles the first weights, the order of the samples, and the sampled text."""

    @property
    def place(self) -> str:
        """The folder or prefix of all that the run writes."""
        return f"{self.root.rstrip('/')}/{self.name}"


class RopeScaling(Section):
    """Llama 3.1's frequency scaling (transformers: `rope_type: llama3`)."""

    factor: PositiveFloat
    """By how much the long wavelengths are stretched."""
    low_freq_factor: PositiveFloat
    """Wavelengths above original_max_seq_len / this are stretched in full."""
    high_freq_factor: PositiveFloat
    """Wavelengths below original_max_seq_len / this stay as they are; those between are blended."""
    original_max_seq_len: Tokens
    """The longest sequence before the stretching."""


class ModelSection(Section):
    """A decoder's dimensions. The family settles the architecture's fixed points.

    `preset: llama3-1b` in this section takes the dimensions of a preset; what stands beside it is laid over them.
    `init: ./Qwen3-0.6B` begins with published weights, and takes the dimensions from there.
    """

    family: FamilyName = "llama3"
    """The architecture."""
    vocab_size: Tokens
    """Rows of the embedding: the tokenizer's tokens or more. One that is trained here has these at most."""
    hidden_size: Features
    """Width of the residual stream."""
    num_layers: Layers
    """Decoder blocks."""
    num_heads: Heads
    """Query heads of a block."""
    num_kv_heads: Heads
    """Key and value heads of a block; as num_heads, or fewer that are shared."""
    head_dim: Features
    """Width of one head."""
    ffn_size: Features
    """Inner width of the SwiGLU block."""
    max_seq_len: Tokens
    """The longest sequence that positions (RoPE) are valid for."""
    rope_theta: PositiveFloat = 500_000.0
    """Base of RoPE's wavelengths."""
    rope_scaling: RopeScaling | None = None
    """null: RoPE as it is."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    embeddings: Literal["tied", "untied"] = "untied"
    """Whether input and output share one matrix."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the first weights."""
    init: Location | None = None
    """The weights to begin with, at step 0 and with a fresh optimizer: a Hugging Face folder, local or at s3://, or the
    folder of a run, whose newest checkpoint it is, or that of <run>@<step>; all nodes must see it. What they settle may
    be left out here, data.tokenizer too. null: weights are drawn by run.seed."""
    init_identity: Identity | None = None
    """Of the weights that must be there. null: whatever are; the driver fills it in."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Special tokens that the tokenizer of those weights gets, such as ['<|im_start|>', '<|im_end|>'] for a base model.
    Their rows of embedding and head begin as the mean of the others and are trained like them. vocab_size grows where
    it must, and may be given larger, as a multiple of parallel.tensor."""

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]


class MixedStore(Section):
    """One store of a mixture."""

    store: Location
    """Its folder or s3:// URL, or its name: of `<run.root>/data/<name>`."""
    weight: PositiveFloat
    """Its share is this, of the sum of all."""
    identity: Identity | None = None
    """As data.identity."""

    @property
    def name(self) -> str:
        """By which stages and metrics know it: the last part of its place."""
        return self.store.rstrip("/").rpartition("/")[2]


class MixtureStage(Section):
    """Weights from a step on."""

    from_step: Steps
    """The first step with these weights."""
    weights: dict[str, NonNegativeFloat]
    """Of every store, by the last part of its place."""


class RecordFields(Section):
    """Columns of the source, by what they are to a record; a.b is b in the object a.

    Of several columns the texts are joined by an empty line, without those that are empty or null:
    `{prompt: [instruction, input], completion: output}`. A chat has messages, or else a prompt and a completion.
    """

    messages: Columns | None = None
    """Of chats: a list of messages, each with role and content."""
    tools: Columns | None = None
    """Of chats, where there are any: a list of the tools' JSON schemas, or that as a text."""
    system: Columns | None = None
    """Of a chat that has a prompt: its system message, where there is one."""
    prompt: Columns | None = None
    """Of completions and preferences, and of chats without messages: a text, or messages."""
    completion: Columns | None = None
    """What follows the prompt, and is learned."""
    chosen: Columns | None = None
    """Of preferences: the better answer."""
    rejected: Columns | None = None
    """Of preferences: the worse answer."""


class DataSection(Section):
    """A document store, token shards and a manifest, under `path`; or several, in a `mixture`.

    If `path` holds no store yet and `source` is given, the driver makes one before training.
    """

    path: Location | None = None
    """Folder or s3:// URL of the document store. Where only a source is given: `<run.root>/data/<its last part>`,
    so that runs share it. null: there is a mixture."""
    mixture: tuple[MixedStore, ...] = ()
    """In place of path: several stores, each with a weight, any positive number: its share of the samples is that of
    the weights' sum. A store is a folder, an s3:// URL, or a name without a slash: `<run.root>/data/<name>`. Every
    beginning of the run holds each store in proportion to within two samples. identity: as data.identity."""
    stages: tuple[MixtureStage, ...] = ()
    """Other weights from a step on, until the next stage: each names all stores of the mixture, by the last part of
    their places, and 0 takes one out."""
    leave_out_steps: tuple[Steps, ...] = ()
    """Steps that are not learned from: their samples pass, and parameters, moments and the count of updates stay as
    they are, as at a step whose loss is not finite."""
    max_epochs: PositiveFloat | None = None
    """How often a store may be gone through, at most; checked before anything starts. null: as often as it takes."""
    identity: Identity | None = None
    """Of the content that must be there (`identity` in its manifest.json). null: whatever is; the driver fills it
    in, so that a run goes on with the same content only, wherever it lies."""
    source: Location | None = None
    """Text to make the store of: a folder, a file or a glob, also at s3://, of .txt, .md, .py, .jsonl, .json (each also
    .gz or .zst), .parquet or .arrow files; a dataset that `datasets` saved to disk; `python-stdlib`; or
    `made-chats` and `made-preferences`, short ones of sums and look-ups, to try fine-tuning with."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Where the source's records have their text; `a.b` is the field b of the object in its field a."""
    dedup: Literal["none", "exact"] = "none"
    """exact: of equal documents of the source only the first stays."""
    aws_profile: Annotated[str, Field(min_length=1)] | None = None
    """Of the AWS configuration where the driver runs, to read a source at s3:// with, which may be another account's.
    null: the environment's credentials, as everything else."""
    tokenizer: Location | None = None
    """The tokenizer.json to use, a path or an s3:// URL. null: a byte-level BPE is trained on the source."""
    end_of_document: Annotated[str, Field(min_length=1)] | None = None
    """The token that ends a document, of data.tokenizer. null: what the files beside it say
    (tokenizer_config.json, config.json, generation_config.json)."""
    records: Annotated[
        str, Field(min_length=1), Accepts("text, chats, completions, preferences, or package.module:Class")
    ] = "text"
    """What a record of the source is, and so what of it is learned; docs/tasks.md. text: a text, all of it. chats:
    messages, those of the assistant. completions: a text, and another that follows it and is learned. preferences: two
    answers. package.module:Class: a format of your own. Another task than pretraining says which, where this does
    not."""
    fields: RecordFields | None = None
    """Where a record of the source has what is asked for. null: under the same names."""
    chat_template: Location | None = None
    """A file with the chat template (Jinja), or chatml for that one. null: the one that lies with data.tokenizer."""
    train_on: Literal["all", "last"] = "all"
    """Of a chat's assistant turns, those that are learned."""
    max_left_out: Fraction = 0.1
    """Share of the source's text that may be left out (not UTF-8, kinds that are not read, null)
    before it is refused."""
    heldout_fraction: ProperFraction = 0.05
    """Share of the documents that only evaluation sees, chosen by a hash of their names."""
    seq_len: Tokens = 1024
    """Length of one sequence of the batch."""
    packing: Literal["stream", "documents"] = "stream"
    """How sequences are made. stream: windows over the text, whose documents follow one another and see those before
    them. documents: whole documents packed side by side; a token sees only its own; what records make takes that, and
    has it unless this says otherwise."""
    too_long: Literal["split", "cut", "leave_out", "refuse"] = "split"
    """With packing documents, what becomes of one that is longer than seq_len. split: it goes on in another row. cut:
    what is over is dropped. leave_out: all of it is. refuse: the run does not start. Each is counted."""
    shuffle: Literal["rows", "blocks"] = "rows"
    """The order of a store's rows; each comes once an epoch. rows: any row may follow any other. blocks: neighbours in
    the text stay in blocks, of which shuffle_lanes are read at a time, so that one request to S3 serves many rows."""
    shuffle_lanes: Annotated[PositiveInt, Unit("blocks")] = 64
    """With shuffle blocks: the blocks that samples are taken from by turns, a row each."""
    shuffle_block_bytes: Bytes = 4 * 2**20
    """With shuffle blocks: the tokens of one, as they are stored. With packing documents it is at least 8 windows that
    documents are packed in, each of 2**19 tokens or 128 rows, whichever is more."""
    access: Literal["auto", "copy", "stream"] = "auto"
    """copy: every node copies the store to its disk first. stream: it fetches what the coming steps read, which takes
    shuffle blocks. auto: a local folder is used in place, a URL is copied unless shuffle is blocks and it is larger
    than cache_bytes. The samples and their order are the same."""
    cache_bytes: Bytes = 16 * 2**30
    """With access stream: the most that a node keeps of all stores, what is just being fetched included."""

    @property
    def stores(self) -> tuple[MixedStore, ...]:
        """Of the mixture, or the one under `path`."""
        return self.mixture or (MixedStore(store=self.place, weight=1.0, identity=self.identity),)

    @property
    def place(self) -> str:
        """Of the one store, where there is no mixture."""
        assert self.path is not None, "neither data.path nor data.mixture: reading a config refuses that"
        return self.path

    def of_each_store(self) -> "list[DataSection]":
        """The same settings for each store alone."""
        alone = {"mixture": (), "stages": ()}
        return [self.model_copy(update=alone | {"path": s.store, "identity": s.identity}) for s in self.stores]

    def identified(self, identities: "list[str | None]") -> "DataSection":
        """With the identities of the stores, in their order."""
        if not self.mixture:
            return self.model_copy(update={"identity": identities[0]})
        stores = zip(self.mixture, identities, strict=True)
        mixture = tuple(store.model_copy(update={"identity": identity}) for store, identity in stores)
        return self.model_copy(update={"mixture": mixture})


class ParallelSection(Section):
    """How the ranks are laid out. Data parallel (FSDP, or ZeRO-1 under nxd) takes what the others leave."""

    tensor: Ranks = 1
    """Tensor parallel degree; sequence parallelism comes with it."""
    pipeline: PositiveInt = 1
    """Pipeline stages, each with an equal share of the layers; engine.kind nxd only."""


class EngineSection(Section):
    """How a step is computed."""

    kind: Literal["native", "nxd"] = "native"
    """native: torch's own parallelism; nxd: neuronx-distributed on torch-xla."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of compute; master weights and optimizer are float32. auto: bfloat16 where the device multiplies it
    natively."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: a block's activations are computed again in the backward pass, which saves memory."""
    compile: Literal["none", "block"] = "none"
    """block: torch.compile on each decoder block."""
    fsdp: Literal["auto", "fsdp2", "simple"] = "auto"
    """How the native engine shards over data ranks. fsdp2: hooks gather ahead of each block. simple: SimpleFSDP,
    the compiled blocks hold their own gathers and reductions. auto: simple for compiled blocks on neuron, else
    fsdp2."""


class OptimizerSection(Section):
    """AdamW with decoupled weight decay on matrices only, and the learning-rate schedule."""

    learning_rate: PositiveFloat = 3e-4
    """At the schedule's peak, per step."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to the second moment's root."""
    weight_decay: NonNegativeFloat = 0.1
    """Share of a matrix taken off per step, times the rate."""
    clip_norm: PositiveFloat = 1.0
    """Norm over all gradients above which they are scaled down to it."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up. cosine: down to the last step; wsd: constant, then a linear decay; constant."""
    warmup_steps: Annotated[NonNegativeInt, Unit("steps")] = 0
    """Over which the rate rises to its peak, linearly."""
    decay_fraction: Fraction = 0.2
    """wsd: the share of all steps spent in the final decay."""
    final_learning_rate_ratio: Fraction = 0.1
    """Of the peak, reached at the last step."""


class TrainSection(Section):
    """How long, and how much per step.

    A step is one update of the weights from `global_batch_size` sequences of `data.seq_len` tokens. A rank computes
    `micro_batch_size` of them at a time and adds up gradients (accumulation) until its share is done: passes per step =
    global_batch_size / (micro_batch_size × data-parallel ranks), where data-parallel ranks = cluster.nodes ×
    cluster.ranks_per_node / (parallel.tensor × parallel.pipeline). It must come out whole; there is no setting for it.

    epochs = steps × global_batch_size × data.seq_len / training tokens (the `data:` line says how many), or, where rows
    are packed, steps × global_batch_size / rows. When all samples were seen they come again in another order.

    Every step is logged to MLflow, sent together every two seconds, with x = step; the terminal and the driver's log
    show the newest. Evaluation and saving have their own `every_steps` and always come after the last step, too.
    """

    steps: Steps | None = None
    """Updates of the weights, counted from the run's beginning, not from a resume. null: as many as epochs makes."""
    epochs: PositiveFloat | None = None
    """In place of steps: how often all rows are gone through. Settled when the data is there, as
    steps = epochs × rows / global_batch_size, rounded up."""
    global_batch_size: Sequences
    """Sequences of one step, over all ranks and accumulated passes."""
    micro_batch_size: Sequences = 1
    """Sequences that a data-parallel rank computes at a time: it changes memory and speed, no result."""

    @property
    def num_steps(self) -> int:
        """Once epochs are settled."""
        assert self.steps is not None, "the run has neither steps nor epochs: reading a config refuses that"
        return self.steps


class CheckpointSection(Section):
    """When to save, what to keep (for any one of the reasons), and what to do when that does not go well."""

    every_steps: Steps = 100
    """Save after each multiple of it, and at the end."""
    save: Literal["steps", "never"] = "steps"
    """never: nothing is kept, also not at the end, for runs that only measure or compile."""
    if_busy: Literal["wait", "skip"] = "wait"
    """Both of a rank's images are still being uploaded when the next save is due: wait for one, or leave that save
    out (skip)."""
    if_damaged: Literal["stop", "use_older"] = "stop"
    """The newest checkpoint proves damaged: end with the cause, or set it aside and go on from the next older
    one."""
    keep_last: Checkpoints = 2
    """The newest are kept."""
    keep_every_steps: Steps | None = None
    """Also those of steps that are multiples of it, for ever. null: none for that."""
    keep_best: Annotated[NonNegativeInt, Unit("checkpoints")] = 1
    """Also so many with the best best_metric, among those that were evaluated: a run that gets worse does not push the
    best out. While it gets better that is one of the newest."""
    best_metric: Annotated[str, Field(pattern=r"^eval/[\w./-]+$"), Accepts("a metric under eval/")] = "eval/loss"
    """What keep_best compares, and evaluate.patience: any metric of the run's evaluations, as eval/arc/acc."""
    best_mode: Literal["auto", "lowest", "highest"] = "auto"
    """Which value of best_metric is the best. auto: by its name, where that is known."""


class TrackingSection(Section):
    """Where metrics go: MLflow."""

    uri: str | None = None
    """Of the MLflow server. null: MLFLOW_TRACKING_URI, else SQLite at `<run.root>/mlflow.db`."""
    experiment: str = "raynium"
    """MLflow's experiment that the run's page is in."""


class PreferenceSection(Section):
    """What tasks that learn from pairs of answers weigh; names and definitions are TRL's."""

    beta: PositiveFloat = 0.1
    """dpo: how strongly the model is held to its reference, the weights that the run begins with."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: the share of pairs in which people are believed to have confused the answers."""
    weight: PositiveFloat = 0.1
    """orpo: of the odds ratio, beside the cross-entropy of the chosen texts (TRL's beta, the paper's lambda)."""


class PreflightSection(Section):
    """Checks of the nodes before their ranks start; `raynium preflight` makes all of them without a run."""

    before_run: Literal["auto", "all", "host", "none"] = "auto"
    """all: with a trial of the ranks (products, all-reduces); host: what shows without one. auto: all on
    accelerators, on CPU host, and none where the run has one CPU node, since training itself says as much within a
    second."""
    seconds: Seconds = 180.0
    """From when the nodes are there; it ends when all have answered."""


class SampleSection(Section):
    """Text drawn from the model when the run ends."""

    prompts: tuple[str, ...] = ()
    """A text is drawn for each; none: nothing is drawn."""
    max_new_tokens: Tokens = 120
    """Length of each text."""
    temperature: NonNegativeFloat = 0.8
    """0: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability are drawn."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1: tokens that the text already holds become less likely."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end one, and are no part of it."""


class Config(Section):
    """A whole run. Its resolved form is logged to MLflow, kept in the run record, and runs again as it is.

    `extends: llama3-8b` at the top of a file builds on a preset or on another file (its path is relative to the file
    that names it); what the file itself says is laid over that, field by field.
    """

    task: Annotated[str, Field(min_length=1), Accepts("pretraining, sft, dpo, orpo, or package.module:Class")] = (
        "pretraining"
    )
    """What is learned; docs/tasks.md. package.module:Class: a task of your own, which every node can import."""
    run: RunSection
    cluster: ClusterSection = ClusterSection()
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    preference: PreferenceSection = PreferenceSection()
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
