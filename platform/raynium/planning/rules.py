"""Rules that cross parts of a config: batch × ranks, tensor parallelism × heads × cores, stages × layers, memory.

`check` runs on the submitting machine, before any node is paid for, and reports every problem at once. A rule is a
plain function that yields messages; each message says field, value, rule and what to set. A rule that depends on an
earlier one (memory needs a whole data-parallel size) yields nothing where that one already speaks.
"""

import difflib
from collections.abc import Iterator, Mapping

from raynium.config.judged import STORE_NAME
from raynium.config.schema import Config
from raynium.config.section import Section
from raynium.hardware.catalog import INSTANCES, Instance
from raynium.models.adapter import ALL_LINEAR, TARGETS, unknown_targets
from raynium.models.plan import divided_sizes
from raynium.planning.faults import audits, left_out, snapshots
from raynium.planning.fewer_nodes import fewer_nodes, min_nodes
from raynium.planning.judges import judged_by
from raynium.planning.memory import GIB, USABLE_FRACTION, estimate_memory

# A document store keeps token ids as uint16 or, from 65,537 ids on, uint32.
MAX_VOCAB_SIZE = 2**32


def check(config: Config, hardware: Mapping[str, Instance] = INSTANCES) -> list[str]:
    """Every problem of a config that crosses its parts, each with its remedy; [] when it may run.

    hardware: instance types by name. Rules that need one are left out when cluster.instance_type is null.
    """
    problems = [message for rule in RULES for message in rule(config)]
    name = config.cluster.instance_type
    if name is None:
        return problems
    if name not in hardware:
        near = difflib.get_close_matches(name, hardware, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join(hardware)
        problems.append(
            f"cluster.instance_type is {name!r}, which is not in the hardware catalogue: {hint}"
            f"Known are {known}; null skips the checks against an instance"
        )
        return problems
    return problems + [message for rule in HARDWARE_RULES for message in rule(config, hardware[name])]


def doubts(config: Config, hardware: Mapping[str, Instance] = INSTANCES) -> list[str]:
    """What may fail on the instances that a config names, and what to do then. hardware: as in `check`."""
    instance = hardware.get(config.cluster.instance_type or "")
    per_node = config.cluster.ranks_per_node
    found = []
    if config.fault.audit_every_steps is not None and _data_parallel(config) == 1:
        found.append(
            f"fault.audit_every_steps is {config.fault.audit_every_steps} and the run has one data rank, which has no "
            "neighbour to be compared with: no step is audited"
        )
    if instance is None or per_node not in instance.unproven_blocks:
        return found
    return [
        *found,
        f"cluster.ranks_per_node is {per_node}: nobody has reported the collectives to run on so many of the "
        f"{instance.cores} {instance.name_of_core}s of {instance.name}, nor to refuse them; if the ranks end at their "
        f"first collective operation, set {_choices(instance.core_blocks)}",
    ]


# ------------------------------------------------------------------------------------------------- model


def head_counts(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads is {model.num_heads} and model.num_kv_heads {model.num_kv_heads}: every key/value head "
            f"serves the same number of query heads, so set num_kv_heads to {_choices(_divisors(model.num_heads))}"
        )
    if model.head_dim % 2:
        yield (
            f"model.head_dim is {model.head_dim}: rotary embeddings turn pairs of its elements, so it must be even; "
            f"set {_choices(sorted({max(2, model.head_dim - 1), model.head_dim + 1}))}"
        )


def mixture(config: Config) -> Iterator[str]:
    data = config.data
    if not data.mixture:
        if data.stages:
            yield "data.stages is given without data.mixture: it changes a mixture's weights; give one, or leave it out"
        return
    for name, value in (("path", data.path), ("source", data.source), ("identity", data.identity)):
        if value is not None:
            yield (
                f"data.{name} is {value!r}, with data.mixture: it is for one store alone, and a mixture's are built "
                f"before; take out data.{name} (null, where a preset gives it), or data.mixture"
            )
    names = [store.name for store in data.mixture]
    for number, (store, name) in enumerate(zip(data.mixture, names, strict=True)):
        if not STORE_NAME.fullmatch(name):
            yield (
                f"data.mixture[{number}].store is {store.store!r}: stages and metrics know it by the last part, "
                f"{name!r}, which must be 1 to 64 of letters, digits, '.', '_' and '-'; rename the store"
            )
        if (first := names.index(name)) < number:
            yield (
                f"data.mixture[{number}].store is {store.store!r}, and data.mixture[{first}].store "
                f"{data.mixture[first].store!r}: stages and metrics know both as {name!r}; give a store once, with the "
                "weights added, or rename one of two"
            )


def source_settings(config: Config) -> Iterator[str]:
    for name in ("text_field", "dedup", "aws_profile") if config.data.source is None else ():
        if (value := getattr(config.data, name)) != type(config.data).model_fields[name].default:
            yield (
                f"data.{name} is {value!r} without data.source, whose setting it is: give a source, or take it out. A "
                "store that is there was made with its own (`raynium data show`)"
            )


def stages(config: Config) -> Iterator[str]:
    names, last = [store.name for store in config.data.mixture], 0
    for number, stage in enumerate(config.data.stages if names else ()):
        label = f"data.stages[{number}]"
        if stage.from_step <= last:
            yield (
                f"{label}.from_step is {stage.from_step}, and the stage before it begins at {last}: put stages in the "
                "order of their steps, one for each"
            )
        last = stage.from_step
        if unknown := [name for name in stage.weights if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield f"{label}.weights names {unknown[0]!r}, no store of data.mixture: {hint}They are {', '.join(names)}"
        elif absent := [name for name in names if name not in stage.weights]:
            yield f"{label}.weights leaves out {', '.join(absent)}: give each store of data.mixture one, 0 for none"
        elif not any(stage.weights.values()):
            yield f"{label}.weights are all 0: nothing would be trained on; give one store or more a weight above 0"


def streaming(config: Config) -> Iterator[str]:
    data = config.data
    if data.access == "stream" and data.shuffle != "blocks":
        yield (
            f"data.access is stream and data.shuffle {data.shuffle}: a row alone is not worth a request, so streaming "
            "takes blocks of rows: set data.shuffle to blocks, or data.access to copy"
        )


def sequence_length(config: Config) -> Iterator[str]:
    if config.data.seq_len > config.model.max_seq_len:
        yield (
            f"data.seq_len is {config.data.seq_len}, longer than model.max_seq_len {config.model.max_seq_len}, the "
            "longest sequence the rotary embeddings are valid for: lower data.seq_len or raise model.max_seq_len"
        )
    scaling = config.model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor is {scaling.low_freq_factor:g} and high_freq_factor "
            f"{scaling.high_freq_factor:g}: low must be below high, as Llama 3.1's 1 and 4"
        )


def vocabulary(config: Config) -> Iterator[str]:
    if config.model.vocab_size > MAX_VOCAB_SIZE:
        yield (
            f"model.vocab_size is {config.model.vocab_size}: a document store keeps token ids in at most 32 bits, so "
            f"set {MAX_VOCAB_SIZE} or less"
        )
    if config.model.add_tokens and config.model.init is None:
        yield (
            f"model.add_tokens names {list(config.model.add_tokens)} without model.init: tokens are added to the "
            "tokenizer of weights to begin with; set model.init, or give a tokenizer that has them as data.tokenizer"
        )


# ------------------------------------------------------------------------------------------------- layout and batch


def tensor_parallel(config: Config) -> Iterator[str]:
    tensor, per_node = config.parallel.tensor, config.cluster.ranks_per_node
    sizes = divided_sizes(config.model, seq_len=config.data.seq_len)
    if config.engine.kind == "nxd" and tensor % config.model.num_kv_heads == 0:
        # The nxd engine gives several ranks a copy of the same key/value head.
        del sizes["model.num_kv_heads"]
        if tensor > config.model.num_kv_heads and config.model.traits.qkv_biases:
            yield (
                f"parallel.tensor is {tensor} with engine.kind nxd, and the model has {config.model.num_kv_heads} "
                "key/value heads, with biases: neuronx-distributed does not sum the gradients of the biases of a head "
                f"that ranks share; set parallel.tensor to {config.model.num_kv_heads} or less"
            )
    undivided = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    legal = [degree for degree in _divisors(per_node) if not any(size % degree for size in sizes.values())]
    if undivided:
        yield (
            f"parallel.tensor is {tensor}, which does not divide {', '.join(undivided)}: every rank of a tensor group "
            f"holds an equal share, so set parallel.tensor to {_choices(legal)}"
        )
    if per_node % tensor:
        yield (
            f"parallel.tensor is {tensor} and cluster.ranks_per_node {per_node}: tensor groups stay within a node, "
            f"where the links are fast, and fill it evenly, so set parallel.tensor to {_choices(legal)}"
        )


def pipeline_parallel(config: Config) -> Iterator[str]:
    parallel, num_layers = config.parallel, config.model.num_layers
    if parallel.pipeline == 1:
        return
    if config.engine.kind != "nxd":
        yield (
            f"parallel.pipeline is {parallel.pipeline} with engine.kind {config.engine.kind}, which has no pipeline "
            "parallelism: set parallel.pipeline to 1, or engine.kind to nxd"
        )
    size = _world_size(config)
    ranks = size // parallel.tensor

    def fits(degree: int) -> bool:
        # Odd numbers: NxD joins neighbours in two sets of pairs, and around an odd ring the pairs of a set overlap.
        return not num_layers % degree and not ranks % degree and (degree == 1 or degree % 2 == 0)

    if not fits(parallel.pipeline):
        yield (
            f"parallel.pipeline is {parallel.pipeline}: the stages take equal shares of model.num_layers {num_layers} "
            f"and of {ranks} ranks (world size {size} / parallel.tensor {parallel.tensor}), and their "
            f"number is even, since they talk in pairs; set parallel.pipeline to "
            f"{_choices([degree for degree in _divisors(num_layers) if fits(degree)])}"
        )


def batch_size(config: Config) -> Iterator[str]:
    if (data_parallel := _data_parallel(config)) is None:
        return
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = data_parallel * micro
    parallel = config.parallel
    if batch % unit:
        below = batch // unit * unit
        stages = f" / parallel.pipeline {parallel.pipeline}" if parallel.pipeline > 1 else ""
        yield (
            f"train.global_batch_size is {batch}: it must be a multiple of {unit} = {data_parallel} data-parallel "
            f"ranks (world size {_world_size(config)} / parallel.tensor {parallel.tensor}{stages}) × "
            f"train.micro_batch_size {micro}; set {f'{below} or ' if below else ''}{below + unit}"
        )
    elif (micro_batches := batch // unit) < parallel.pipeline:
        yield (
            f"parallel.pipeline is {parallel.pipeline} with {micro_batches} micro-batches a step "
            f"(train.global_batch_size {batch} / {data_parallel} data-parallel ranks / train.micro_batch_size "
            f"{micro}): with fewer than stages some always wait; set global_batch_size to {unit * parallel.pipeline} "
            "or more, or a smaller micro_batch_size or pipeline"
        )


# ------------------------------------------------------------------------------------------------- schedule and engine


def schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.steps
    if config.train.epochs is not None and config.data.mixture:
        yield (
            f"train.epochs is {config.train.epochs:g} with data.mixture, whose stores have epochs of their own: set "
            "train.steps, and data.max_epochs to bound them"
        )
    if steps is None:
        # Asked again once epochs are settled.
        return
    if optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps is {optimizer.warmup_steps} of train.steps {steps}: the learning rate would never "
            f"reach its peak; set warmup_steps below {steps}, for example {steps // 10}"
        )
    elif optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_fraction * steps > steps:
        room = (steps - optimizer.warmup_steps) / steps
        yield (
            f"optimizer.warmup_steps {optimizer.warmup_steps} and optimizer.decay_fraction "
            f"{optimizer.decay_fraction:g} of train.steps {steps} overlap: set decay_fraction to at most {room:.3g}, "
            "or fewer warmup_steps"
        )
    if optimizer.schedule == "wsd" and optimizer.decay_fraction == 0:
        yield (
            "optimizer.schedule is wsd with optimizer.decay_fraction 0, which never decays: set schedule to constant, "
            "or decay_fraction above 0 (0.2 is usual)"
        )


def engine(config: Config) -> Iterator[str]:
    kind, accelerator = config.engine.kind, config.cluster.accelerator
    if kind == "nxd" and accelerator != "neuron_xla":
        yield (
            f"engine.kind is nxd with cluster.accelerator {accelerator}: neuronx-distributed runs on torch-xla only; "
            "set cluster.accelerator to neuron_xla, or engine.kind to native"
        )
    if kind == "nxd" and config.engine.compile != "none":
        yield (
            f"engine.compile is {config.engine.compile} with engine.kind nxd: torch-xla compiles every step whole, and "
            "torch.compile does not run under it; set engine.compile to none"
        )
    if kind == "nxd" and config.engine.fsdp != "auto":
        yield (
            f"engine.fsdp is {config.engine.fsdp} with engine.kind nxd, which shards the optimizer by ZeRO-1 instead: "
            "set engine.fsdp to auto, or engine.kind to native"
        )
    if kind == "native" and config.engine.fsdp == "simple" and config.engine.compile == "none":
        yield (
            "engine.fsdp is simple with engine.compile none: only a compiler starts its gathers ahead of their use and "
            "frees them between forward and backward; set engine.compile to block, or engine.fsdp to fsdp2"
        )
    if kind == "native" and accelerator == "neuron_xla":
        yield (
            "cluster.accelerator is neuron_xla with engine.kind native, which runs on cpu, cuda and neuron: set "
            "engine.kind to nxd, or on Trainium2 cluster.accelerator to neuron"
        )


# ------------------------------------------------------------------------------------------------- hardware


def accelerator_of_instance(config: Config, instance: Instance) -> Iterator[str]:
    accelerator = config.cluster.accelerator
    if accelerator == "auto" and instance.accelerators == ("neuron_xla",) and config.engine.kind == "native":
        yield (
            f"engine.kind is native with cluster.accelerator auto, but {instance.name} ({instance.chip}) is driven by "
            "neuron_xla only: set cluster.accelerator to neuron_xla and engine.kind to nxd"
        )
    if accelerator == "auto" or accelerator in instance.accelerators:
        return
    if accelerator == "neuron" and instance.chip == "trainium1":
        remedy = "Trainium1 needs torch-xla: set cluster.accelerator to neuron_xla and engine.kind to nxd"
    else:
        remedy = (
            f"set cluster.accelerator to {instance.accelerators[0]}, or choose another cluster.instance_type "
            "(null for a machine of your own)"
        )
    yield (
        f"cluster.accelerator is {accelerator}, but {instance.name} ({instance.chip}) is driven by "
        f"{' or '.join(instance.accelerators)}: {remedy}"
    )


def core_count(config: Config, instance: Instance) -> Iterator[str]:
    """How many cores of a node a job may take: a block that the collectives' hardware routes accept."""
    nodes, per_node = config.cluster.nodes, config.cluster.ranks_per_node
    core = instance.name_of_core
    if per_node > instance.cores:
        yield (
            f"cluster.ranks_per_node is {per_node}, but {instance.name} has {instance.cores} {core}s, one a rank: "
            f"set {instance.cores}, or more cluster.nodes"
        )
    elif per_node not in instance.core_blocks + instance.unproven_blocks:
        yield (
            f"cluster.ranks_per_node is {per_node}: on {instance.name} the collectives accept "
            f"{_choices(instance.core_blocks)} of its {instance.cores} {core}s; set one of these"
        )
    elif nodes > 1 and instance.is_neuron and per_node != instance.cores:
        yield (
            f"cluster.ranks_per_node is {per_node} with cluster.nodes {nodes}: a job over several {instance.name} "
            f"takes whole nodes; set ranks_per_node to {instance.cores}, or nodes to 1"
        )
    elif nodes > 1 and instance.is_neuron and instance.efa_interfaces == 0:
        yield (
            f"cluster.nodes is {nodes}: {instance.name} has no EFA, and NeuronCores reach those of another node by "
            f"nothing else; set nodes to 1, or take a type with EFA"
        )


def tensor_groups(config: Config, instance: Instance) -> Iterator[str]:
    """NxD's own list of groups that Trainium2's links do not join (parallel_state.py, get_logic_chosen, NxD 0.18)."""
    if config.engine.kind == "nxd" and instance.chip == "trainium2" and config.parallel.tensor == 8:
        yield (
            f"parallel.tensor is 8 with engine.kind nxd on {instance.name}: neuronx-distributed does not support "
            "groups of 8 there, since the links between the chips do not join them; set parallel.tensor to 4 or 16"
        )


def memory_fit(config: Config, instance: Instance) -> Iterator[str]:
    """Also on the fewest nodes that the run may come down to."""
    usable = instance.memory_gib_per_core * USABLE_FRACTION * GIB
    for nodes in (config.cluster.nodes, *fewer_nodes(config)[:1]):
        if (data_parallel := _data_parallel(config, nodes=nodes)) is None:
            return
        estimate = estimate_memory(config, data_parallel=data_parallel)
        if estimate.total <= usable:
            continue
        fewer = f" on {nodes} node(s) (cluster.min_nodes)" if nodes < config.cluster.nodes else ""
        yield (
            f"memory: by estimate this needs{fewer} {estimate.in_words()}, and {instance.name} has "
            f"{usable / GIB:.2f} GiB usable of {instance.memory_gib_per_core:g} GiB a {instance.name_of_core}; "
            f"{'raise cluster.min_nodes; or ' if fewer else ''}{_memory_remedies(config)}"
        )
        return


def _memory_remedies(config: Config) -> str:
    remedies = []
    if config.engine.activation_checkpointing == "none":
        remedies.append("set engine.activation_checkpointing to full (activations)")
    if config.engine.dtype == "float32":
        remedies.append("set engine.dtype to bfloat16 (activations, logits, gathered blocks)")
    if config.train.micro_batch_size > 1:
        remedies.append("lower train.micro_batch_size (activations, logits)")
    remedies.append("raise parallel.tensor (activations, logits, gathered blocks)")
    remedies.append("add cluster.nodes or cluster.ranks_per_node (parameters, gradients, optimizer)")
    remedies.append("lower data.seq_len (activations, logits)")
    return "; or ".join(remedies)


def adapter(config: Config) -> Iterator[str]:
    section = config.adapter
    if section.rank is None:
        if given := [name for name in sorted(section.model_fields_set - {"rank"}) if _differs(section, name)]:
            yield (
                f"adapter.{given[0]} is set and adapter.rank is null, so that there is no adapter: set adapter.rank "
                "(16 is usual), or leave the section out"
            )
        return
    if unknown := unknown_targets(section):
        near = difflib.get_close_matches(unknown[0], TARGETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield (
            f"adapter.targets has {unknown[0]!r}, and no matrix of a block is named so: {hint}They are "
            f"{', '.join(TARGETS)}, and {ALL_LINEAR} for all of them"
        )
    if not section.targets:
        yield f"adapter.targets names no matrix: give some of {', '.join(TARGETS)}, or {ALL_LINEAR}"
    tables = {"embedding"} if config.model.embeddings == "tied" else {"embedding", "head"}
    if config.model.add_tokens and not (tables <= set(section.train_also) or (len(tables) == 1 and section.train_also)):
        yield (
            f"model.add_tokens has {len(config.model.add_tokens)} tokens, whose rows would stay as they begin under an "
            f"adapter: set adapter.train_also to [{', '.join(sorted(tables))}]"
        )
    if config.engine.kind == "nxd":
        yield (
            f"adapter.rank is {section.rank} with engine.kind nxd, whose layers hold q, k and v, and gate and up, as "
            "one matrix: an adapter of each has no place there; set engine.kind to native, or adapter.rank to null"
        )


def _differs(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


RULES = (
    judged_by,
    *(
        head_counts,
        mixture,
        source_settings,
        stages,
        sequence_length,
        streaming,
        vocabulary,
        tensor_parallel,
        pipeline_parallel,
    ),
    *(batch_size, min_nodes, schedule, engine, adapter, audits, snapshots, left_out),
)
HARDWARE_RULES = (accelerator_of_instance, core_count, tensor_groups, memory_fit)


def _world_size(config: Config) -> int:
    return config.cluster.nodes * config.cluster.ranks_per_node


def _data_parallel(config: Config, *, nodes: int | None = None) -> int | None:
    """Ranks that see different samples; None where another rule says that they are no whole number.

    nodes: another number of them than the config wants.
    """
    tensor, pipeline, per_node = config.parallel.tensor, config.parallel.pipeline, config.cluster.ranks_per_node
    size = (config.cluster.nodes if nodes is None else nodes) * per_node
    return None if per_node % tensor or size % (tensor * pipeline) else size // (tensor * pipeline)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _choices(numbers: list[int] | tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
