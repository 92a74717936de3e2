"""Every rule: its message, in full, and the configs on the legal side of it."""

import re

import pytest

from raynium.config.load import load_config
from raynium.errors import ConfigError
from raynium.hardware.catalog import INSTANCES
from raynium.planning.fewer_nodes import nodes_with_room
from raynium.planning.rules import check, doubts

pytestmark = pytest.mark.quick

EIGHT_B = "llama3-8b"  # 64 ranks of trn2.48xlarge, tensor 4, batch 128


def problems(preset, *overrides):
    return check(load_config(preset, overrides))


def only_problem(preset, *overrides):
    found = problems(preset, *overrides)
    assert len(found) == 1, found
    return found[0]


# ------------------------------------------------------------------------------------------------- model


def test_key_value_heads_divide_the_heads():
    assert only_problem("quickstart", "model.num_kv_heads=3") == (
        "model.num_heads is 4 and model.num_kv_heads 3: every key/value head serves the same number of query heads, so "
        "set num_kv_heads to 1, 2 or 4"
    )


@pytest.mark.parametrize(("given", "nearest"), [(63, "62 or 64"), (1, "2")])
def test_head_dim_is_even(given, nearest):
    assert only_problem("quickstart", f"model.head_dim={given}") == (
        f"model.head_dim is {given}: rotary embeddings turn pairs of its elements, so it must be even; set {nearest}"
    )


def test_the_sequence_is_no_longer_than_rope_allows():
    assert problems("quickstart", "data.seq_len=512") == []
    assert only_problem("quickstart", "data.seq_len=513") == (
        "data.seq_len is 513, longer than model.max_seq_len 512, the longest sequence the rotary embeddings are valid "
        "for: lower data.seq_len or raise model.max_seq_len"
    )


def test_streaming_takes_blocks_of_rows():
    assert problems("quickstart", "data.access=stream", "data.shuffle=blocks") == []
    assert only_problem("quickstart", "data.access=stream") == (
        "data.access is stream and data.shuffle rows: a row alone is not worth a request, so streaming takes blocks of "
        "rows: set data.shuffle to blocks, or data.access to copy"
    )


def test_snapshots_are_kept_where_anything_is():
    assert problems("quickstart", "fault.snapshot_every_steps=5") == []
    assert only_problem("quickstart", "fault.snapshot_every_steps=5", "checkpoint.save=never") == (
        "fault.snapshot_every_steps is 5 with checkpoint.save never, which keeps no snapshot either: set "
        "fault.snapshot_every_steps to null, or checkpoint.save to steps"
    )


def test_steps_that_are_left_out_are_named_once_and_come():
    steps = load_config("quickstart").train.steps
    assert problems("quickstart", f"data.leave_out_steps=[3, {steps}]") == []
    assert only_problem("quickstart", "data.leave_out_steps=[7, 3, 7]") == (
        "data.leave_out_steps has 7 more than once: name each step once"
    )
    assert only_problem("quickstart", f"data.leave_out_steps=[3, {steps + 1}]") == (
        f"data.leave_out_steps has {steps + 1}, and train.steps is {steps}: a step that never comes is a mistake; take "
        "it out, or look which step was meant"
    )


@pytest.mark.parametrize("field", ["fault.hang_seconds", "fault.upload_silence_seconds"])
def test_nobody_looks_for_silence_without_a_pause(field):
    assert problems("quickstart", f"{field}=1") == []
    with pytest.raises(ConfigError, match=rf"{field} is 1e-09 \(override.*\): it must be a number of at least 1"):
        load_config("quickstart", [f"{field}=1e-9"])


def test_rope_scaling_has_low_below_high():
    assert only_problem(EIGHT_B, "model.rope_scaling.low_freq_factor=4") == (
        "model.rope_scaling.low_freq_factor is 4 and high_freq_factor 4: low must be below high, as Llama 3.1's 1 and 4"
    )


def test_the_vocabulary_fits_the_token_type():
    assert problems("quickstart", f"model.vocab_size={2**32}") == []
    assert only_problem("quickstart", f"model.vocab_size={2**32 + 1}") == (
        "model.vocab_size is 4294967297: a document store keeps token ids in at most 32 bits, so set 4294967296 or less"
    )


# ------------------------------------------------------------------------------------------------- layout and batch


def test_the_tensor_degree_divides_what_it_splits():
    assert only_problem(EIGHT_B, "parallel.tensor=16") == (
        "parallel.tensor is 16, which does not divide model.num_kv_heads 8: every rank of a tensor group holds an "
        "equal share, so set parallel.tensor to 1, 2, 4 or 8"
    )
    uneven = ("model.ffn_size=14334", "model.vocab_size=128255", "data.seq_len=8190")
    assert only_problem(EIGHT_B, *uneven) == (
        "parallel.tensor is 4, which does not divide model.ffn_size 14334, model.vocab_size 128255, data.seq_len 8190: "
        "every rank of a tensor group holds an equal share, so set parallel.tensor to 1"
    )


@pytest.mark.parametrize("tensor", [8, 16])
def test_a_tensor_group_stays_within_a_node_and_fills_it(tensor):
    degrees = "1 or 2" if tensor == 8 else "1, 2 or 4"
    shape = ("cluster.ranks_per_node=6",) if tensor == 8 else ("cluster.ranks_per_node=4",)
    heads = ("model.num_heads=32", "model.num_kv_heads=32", "cluster.nodes=4", "train.global_batch_size=96")
    assert only_problem("quickstart", f"parallel.tensor={tensor}", *shape, *heads) == (
        f"parallel.tensor is {tensor} and cluster.ranks_per_node {shape[0][-1]}: tensor groups stay within a node, "
        f"where the links are fast, and fill it evenly, so set parallel.tensor to {degrees}"
    )


def test_the_global_batch_is_a_multiple_of_ranks_times_micro_batch():
    eight = ("quickstart", "train.micro_batch_size=8")
    assert problems(*eight, "train.global_batch_size=32") == []
    assert only_problem(*eight, "train.global_batch_size=40") == (
        "train.global_batch_size is 40: it must be a multiple of 16 = 2 data-parallel ranks (world size 2 / "
        "parallel.tensor 1) × train.micro_batch_size 8; set 32 or 48"
    )
    assert only_problem(*eight, "train.global_batch_size=3").endswith("train.micro_batch_size 8; set 16")
    assert "= 16 data-parallel ranks (world size 64 / parallel.tensor 4)" in only_problem(
        EIGHT_B, "train.global_batch_size=100"
    )


def test_a_run_comes_down_to_numbers_of_nodes_that_share_the_batch():
    three = ("quickstart", "cluster.nodes=3", "cluster.ranks_per_node=1", "train.global_batch_size=12")
    for least in ("1", "2", "3", "null"):
        assert problems(*three, f"cluster.min_nodes={least}", "train.micro_batch_size=1") == []
    assert only_problem(*three, "cluster.min_nodes=4", "train.micro_batch_size=1") == (
        "cluster.min_nodes is 4 and cluster.nodes 3: a run comes down from nodes to min_nodes; set 3 or less, or null"
    )
    assert only_problem(
        "quickstart", "cluster.nodes=3", "cluster.ranks_per_node=1", "train.global_batch_size=9",
        "train.micro_batch_size=1", "cluster.min_nodes=2",
    ) == (
        "cluster.min_nodes is 2, but no number of nodes from 2 to 2 shares train.global_batch_size 9 evenly "
        "(micro_batch_size 1, 1 rank(s) a node): set a global_batch_size that one of them divides, a lower min_nodes, "
        "or null"
    )  # fmt: skip


def test_a_run_that_finds_room_on_fewer_nodes_trains_on_the_most_that_share_the_batch():
    eight = ("quickstart", "cluster.nodes=8", "train.global_batch_size=8", "train.micro_batch_size=1")
    on = {least: load_config(eight[0], (*eight[1:], f"cluster.min_nodes={least}")) for least in ("2", "null")}
    assert [nodes_with_room(on["2"], room) for room in range(10)] == [None, None, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [nodes_with_room(on["null"], room) for room in (7, 8)] == [None, 8]


def test_the_fewest_nodes_that_a_run_may_come_down_to_hold_the_model_too():
    problem = only_problem("llama3-70b", "cluster.min_nodes=1")
    assert problem.startswith("memory: by estimate this needs on 1 node(s) (cluster.min_nodes) ")
    assert "a NeuronCore; raise cluster.min_nodes; or " in problem


def test_what_is_said_of_a_source_needs_one():
    for setting in ("data.text_field=body", "data.dedup=exact", "data.aws_profile=research"):
        name, _, value = setting.partition("=")
        assert only_problem(EIGHT_B, setting) == (
            f"{name} is {value!r} without data.source, whose setting it is: give a source, or take it out. A store "
            "that is there was made with its own (`raynium data show`)"
        )
        assert problems("quickstart", setting) == []


NXD = ("engine.kind=nxd", "cluster.accelerator=neuron_xla", "engine.compile=none")


def test_the_native_engine_has_no_pipeline():
    assert only_problem(EIGHT_B, "parallel.pipeline=2") == (
        "parallel.pipeline is 2 with engine.kind native, which has no pipeline parallelism: set parallel.pipeline to "
        "1, or engine.kind to nxd"
    )
    assert problems(EIGHT_B, "parallel.pipeline=2", *NXD) == []


@pytest.mark.parametrize("change", ["parallel.pipeline=3", "parallel.pipeline=32", "model.num_layers=30"])
def test_the_stages_are_even_in_number_and_have_equal_shares(change):
    layers, degrees = ("30", "1 or 2") if "layers" in change else ("32", "1, 2, 4, 8 or 16")
    degree = change.split("=")[1] if "pipeline" in change else "4"
    assert only_problem(EIGHT_B, *NXD, "parallel.pipeline=4", change, "train.global_batch_size=144") == (
        f"parallel.pipeline is {degree}: the stages take equal shares of model.num_layers {layers} and of 16 ranks "
        "(world size 64 / parallel.tensor 4), and their number is even, since they talk in pairs; set "
        f"parallel.pipeline to {degrees}"
    )


def test_an_odd_number_of_stages_is_refused_where_it_divides_everything():
    odd = ("parallel.pipeline=3", "cluster.ranks_per_node=3", "parallel.tensor=1", "train.global_batch_size=12")
    assert "set parallel.pipeline to 1" in only_problem("quickstart", *NXD, *odd)


def test_every_stage_has_a_micro_batch():
    few = (*NXD, "parallel.pipeline=16", "train.global_batch_size=8")
    assert only_problem(EIGHT_B, *few) == (
        "parallel.pipeline is 16 with 8 micro-batches a step (train.global_batch_size 8 / 1 data-parallel ranks / "
        "train.micro_batch_size 1): with fewer than stages some always wait; set global_batch_size to 16 or more, or a "
        "smaller micro_batch_size or pipeline"
    )
    assert problems(EIGHT_B, *few, "train.global_batch_size=16") == []
    assert "= 4 data-parallel ranks (world size 64 / parallel.tensor 4 / parallel.pipeline 4) ×" in only_problem(
        EIGHT_B, *NXD, "parallel.pipeline=4", "train.global_batch_size=130"
    )


# ------------------------------------------------------------------------------------------------- schedule and engine


def test_the_warm_up_ends_before_training_does():
    assert problems("quickstart", "train.steps=200", "optimizer.schedule=cosine", "optimizer.warmup_steps=199") == []
    assert only_problem("quickstart", "train.steps=200", "optimizer.warmup_steps=200") == (
        "optimizer.warmup_steps is 200 of train.steps 200: the learning rate would never reach its peak; set "
        "warmup_steps below 200, for example 20"
    )


def test_the_quickstart_can_be_cut_short_as_the_readme_does():
    assert problems("quickstart", "train.steps=200") == []


def test_warm_up_and_decay_do_not_overlap():
    twentieth = ("quickstart", "train.steps=400", "optimizer.warmup_steps=20")
    assert problems(*twentieth, "optimizer.decay_fraction=0.95") == []
    assert only_problem(*twentieth, "optimizer.decay_fraction=0.96") == (
        "optimizer.warmup_steps 20 and optimizer.decay_fraction 0.96 of train.steps 400 overlap: set decay_fraction to "
        "at most 0.95, or fewer warmup_steps"
    )
    assert problems(*twentieth, "optimizer.decay_fraction=0.96", "optimizer.schedule=cosine") == []


def test_wsd_decays():
    assert only_problem("quickstart", "optimizer.decay_fraction=0") == (
        "optimizer.schedule is wsd with optimizer.decay_fraction 0, which never decays: set schedule to constant, or "
        "decay_fraction above 0 (0.2 is usual)"
    )


def test_the_nxd_engine_runs_on_torch_xla_only():
    assert problems("quickstart", "engine.kind=nxd", "cluster.accelerator=neuron_xla") == []
    assert only_problem("quickstart", "engine.kind=nxd") == (
        "engine.kind is nxd with cluster.accelerator cpu: neuronx-distributed runs on torch-xla only; set "
        "cluster.accelerator to neuron_xla, or engine.kind to native"
    )


def test_the_nxd_engine_has_no_fsdp():
    nxd = ("engine.kind=nxd", "cluster.accelerator=neuron_xla")
    assert only_problem("quickstart", *nxd, "engine.fsdp=fsdp2") == (
        "engine.fsdp is fsdp2 with engine.kind nxd, which shards the optimizer by ZeRO-1 instead: set engine.fsdp to "
        "auto, or engine.kind to native"
    )


def test_simple_fsdp_needs_a_compiler():
    assert problems("quickstart", "engine.fsdp=simple", "engine.compile=block") == []
    assert only_problem("quickstart", "engine.fsdp=simple", "engine.compile=none") == (
        "engine.fsdp is simple with engine.compile none: only a compiler starts its gathers ahead of their use and "
        "frees them between forward and backward; set engine.compile to block, or engine.fsdp to fsdp2"
    )


def test_the_nxd_engine_is_not_compiled_by_torch():
    nxd = ("engine.kind=nxd", "cluster.accelerator=neuron_xla")
    assert only_problem("quickstart", *nxd, "engine.compile=block") == (
        "engine.compile is block with engine.kind nxd: torch-xla compiles every step whole, and torch.compile does not "
        "run under it; set engine.compile to none"
    )


def test_the_nxd_engine_shares_key_value_heads_among_ranks():
    many = ("model.num_kv_heads=2", "parallel.tensor=4", "cluster.ranks_per_node=4", "train.global_batch_size=8")
    assert "does not divide model.num_kv_heads 2" in only_problem("quickstart", *many)
    assert problems("quickstart", *many, "engine.kind=nxd", "cluster.accelerator=neuron_xla") == []
    nxd = ("engine.kind=nxd", "cluster.accelerator=neuron_xla", "model.num_kv_heads=4", "model.num_heads=12")
    odd = ("parallel.tensor=6", "cluster.ranks_per_node=6", "train.global_batch_size=8")
    assert "model.num_kv_heads 4" in "".join(problems("quickstart", *nxd, *odd)), "6 ranks cannot share 4 heads evenly"
    biased = only_problem("quickstart", *many, *nxd[:2], "model.family=qwen2")
    assert biased == (
        "parallel.tensor is 4 with engine.kind nxd, and the model has 2 key/value heads, with biases: "
        "neuronx-distributed does not sum the gradients of the biases of a head that ranks share; set parallel.tensor "
        "to 2 or less"
    )


def test_tokens_are_added_to_weights_that_a_run_begins_with():
    assert only_problem("quickstart", "model.add_tokens=['<|im_start|>']") == (
        "model.add_tokens names ['<|im_start|>'] without model.init: tokens are added to the tokenizer of weights to "
        "begin with; set model.init, or give a tokenizer that has them as data.tokenizer"
    )


def test_the_native_engine_does_not_run_on_torch_xla():
    assert only_problem(EIGHT_B, "cluster.accelerator=neuron_xla") == (
        "cluster.accelerator is neuron_xla with engine.kind native, which runs on cpu, cuda and neuron: set "
        "engine.kind to nxd, or on Trainium2 cluster.accelerator to neuron"
    )


# ------------------------------------------------------------------------------------------------- hardware


def test_an_unknown_instance_type_names_the_nearest():
    problem = only_problem(EIGHT_B, "cluster.instance_type=trn2.48xl")
    assert problem.startswith(
        "cluster.instance_type is 'trn2.48xl', which is not in the hardware catalogue: did you mean trn2.48xlarge or "
        "trn2u.48xlarge? Known are trn1.2xlarge, "
    )
    assert problem.endswith("; null skips the checks against an instance")
    assert "did you mean" not in only_problem(EIGHT_B, "cluster.instance_type=zzz")


def test_the_accelerator_fits_the_instance():
    gpus = ("cluster.instance_type=p5.48xlarge", "cluster.ranks_per_node=8")
    assert problems(EIGHT_B, *gpus, "cluster.accelerator=cuda") == []
    assert problems(EIGHT_B, *gpus, "cluster.accelerator=auto") == []
    assert only_problem(EIGHT_B, *gpus) == (
        "cluster.accelerator is neuron, but p5.48xlarge (h100) is driven by cuda: set cluster.accelerator to cuda, or "
        "choose another cluster.instance_type (null for a machine of your own)"
    )
    assert only_problem("llama3-1b", "cluster.accelerator=cpu").startswith(
        "cluster.accelerator is cpu, but trn2.3xlarge (trainium2) is driven by neuron or neuron_xla: set"
    )
    assert only_problem("llama3-1b", "cluster.instance_type=trn1.2xlarge", "cluster.ranks_per_node=2") == (
        "cluster.accelerator is neuron, but trn1.2xlarge (trainium1) is driven by neuron_xla: Trainium1 needs "
        "torch-xla: set cluster.accelerator to neuron_xla and engine.kind to nxd"
    )


def test_auto_finds_nothing_on_trainium1_that_the_native_engine_could_use():
    small = ("cluster.instance_type=trn1.2xlarge", "cluster.ranks_per_node=2", "cluster.accelerator=auto")
    assert only_problem("llama3-1b", *small, "data.seq_len=1024") == (
        "engine.kind is native with cluster.accelerator auto, but trn1.2xlarge (trainium1) is driven by neuron_xla "
        "only: set cluster.accelerator to neuron_xla and engine.kind to nxd"
    )


def test_a_node_has_as_many_ranks_as_cores_at_most():
    assert only_problem(EIGHT_B, "cluster.ranks_per_node=128") == (
        "cluster.ranks_per_node is 128, but trn2.48xlarge has 64 NeuronCores, one a rank: set 64, or more cluster.nodes"
    )


def test_part_of_a_trainium_node_is_a_block_the_collectives_accept():
    for proven in (16, 32):
        assert problems(EIGHT_B, f"cluster.ranks_per_node={proven}") == []
        assert doubts(load_config(EIGHT_B, [f"cluster.ranks_per_node={proven}"])) == []
    assert only_problem(EIGHT_B, "cluster.ranks_per_node=48", "train.global_batch_size=120") == (
        "cluster.ranks_per_node is 48: on trn2.48xlarge the collectives accept 1, 4, 16, 32 or 64 of its 64 "
        "NeuronCores; set one of these"
    )
    gpus = ("cluster.instance_type=p5.48xlarge", "cluster.accelerator=cuda", "parallel.tensor=1", "data.seq_len=4096")
    assert problems(EIGHT_B, *gpus, "cluster.ranks_per_node=3", "train.global_batch_size=129") == []


def test_a_count_that_nobody_has_reported_is_allowed_and_doubted():
    assert problems(EIGHT_B, "cluster.ranks_per_node=8") == []
    (doubt,) = doubts(load_config(EIGHT_B, ["cluster.ranks_per_node=8"]))
    assert doubt.startswith("cluster.ranks_per_node is 8: nobody has reported") and "set 1, 4, 16, 32 or 64" in doubt
    assert doubts(load_config(EIGHT_B, ["cluster.instance_type=null", "cluster.ranks_per_node=8"])) == []
    assert INSTANCES["trn2.3xlarge"].core_blocks == (1, 2, 4)


def test_several_trainium_nodes_are_taken_whole():
    assert problems(EIGHT_B, "cluster.nodes=2") == []
    assert only_problem(EIGHT_B, "cluster.nodes=2", "cluster.ranks_per_node=16") == (
        "cluster.ranks_per_node is 16 with cluster.nodes 2: a job over several trn2.48xlarge takes whole nodes; set "
        "ranks_per_node to 64, or nodes to 1"
    )


def test_nxd_has_no_tensor_groups_of_eight_on_trainium2():
    on_trn2 = (EIGHT_B, *NXD, "engine.activation_checkpointing=full")
    assert problems(*on_trn2, "parallel.tensor=4") == []
    assert only_problem(*on_trn2, "parallel.tensor=8") == (
        "parallel.tensor is 8 with engine.kind nxd on trn2.48xlarge: neuronx-distributed does not support groups of 8 "
        "there, since the links between the chips do not join them; set parallel.tensor to 4 or 16"
    )
    assert not [each for each in problems(EIGHT_B, "parallel.tensor=8") if "groups of 8" in each]


def test_nodes_without_efa_train_alone():
    """AWS's guide to Trn1 on several nodes: the smaller sizes have no EFA and cannot run such jobs."""

    def found(nodes: int) -> list[str]:
        return problems(
            "llama3-1b", "cluster.instance_type=trn1.2xlarge", "cluster.accelerator=neuron_xla", "engine.kind=nxd",
            "engine.compile=none", "cluster.ranks_per_node=2",
            f"cluster.nodes={nodes}", f"train.global_batch_size={nodes * 16}", "data.seq_len=1024",
        )  # fmt: skip

    assert found(1) == []
    assert found(4) == [
        "cluster.nodes is 4: trn1.2xlarge has no EFA, and NeuronCores reach those of another node by nothing else; set "
        "nodes to 1, or take a type with EFA"
    ]


def test_a_plan_that_does_not_fit_says_what_fills_the_memory_and_what_helps():
    problem = only_problem(
        EIGHT_B, "engine.activation_checkpointing=none", "engine.dtype=float32", "train.micro_batch_size=2"
    )
    assert re.fullmatch(
        r"memory: by estimate this needs [\d.]+ GiB a rank \(parameters 0\.47, gradients 0\.47, optimizer 0\.93, "
        r"gathered blocks [\d.]+, activations [\d.]+, logits [\d.]+\), and trn2\.48xlarge has 21\.60 GiB usable "
        r"of 24 GiB a NeuronCore; set engine\.activation_checkpointing to full .*; or set engine\.dtype to .*; "
        r"or lower train\.micro_batch_size .*; or raise parallel\.tensor .*; or add cluster\.nodes .*; "
        r"or lower data\.seq_len .*",
        problem,
    )
    problem = only_problem("llama3-70b", "cluster.nodes=1")
    assert "activation_checkpointing to full" not in problem and "bfloat16" not in problem and "micro" not in problem


def test_memory_is_not_judged_without_an_instance_type():
    assert problems("llama3-70b", "cluster.nodes=1", "cluster.instance_type=null") == []


def test_all_problems_of_all_parts_come_at_once():
    found = problems(
        EIGHT_B, "data.seq_len=262144", "parallel.tensor=16", "optimizer.warmup_steps=200000", "engine.kind=nxd",
        "engine.compile=none", "model.ffn_size=14340", "train.global_batch_size=3",
        "cluster.accelerator=cuda", "cluster.ranks_per_node=48", "train.micro_batch_size=16",
    )  # fmt: skip
    starts = ["data.seq_len", "parallel.tensor", "train.global_batch_size", "optimizer.warmup_steps", "engine.kind",
              "cluster.accelerator", "cluster.ranks_per_node", "memory:"]  # fmt: skip
    assert [problem.split(" ")[0] for problem in found] == starts


# ------------------------------------------------------------------------------------------------- mixtures

ALONE = ("data.source=null", "data.path=null")
TWO = (*ALONE, "data.mixture=[{store: web, weight: 3}, {store: s3://bucket/code, weight: 1}]")


def stages(text: str) -> list[str]:
    return problems("quickstart", *TWO, f"data.stages={text}")


def test_a_mixture_and_its_stages_are_accepted():
    assert problems("quickstart", *TWO) == []
    text = "[{from_step: 10, weights: {web: 0, code: 1}}, {from_step: 11, weights: {code: 0.5, web: 3e6}}]"
    assert stages(text) == []


def test_a_mixture_takes_the_place_of_one_store():
    given = [f"data.identity={'ab' * 32}", "data.source=corpus", "data.path=s3://bucket/store"]
    found = problems("quickstart", *TWO, *given)
    assert [message.split(":")[0] for message in found] == [
        "data.path is 's3",
        "data.source is 'corpus', with data.mixture",
        f"data.identity is '{'ab' * 32}', with data.mixture",
    ]
    assert found[1] == (
        "data.source is 'corpus', with data.mixture: it is for one store alone, and a mixture's are built before; take "
        "out data.source (null, where a preset gives it), or data.mixture"
    )


def test_a_store_is_in_a_mixture_once():
    mixture = "data.mixture=[{store: web, weight: 3}, {store: s3://bucket/web/, weight: 1}]"
    assert only_problem("quickstart", *ALONE, mixture) == (
        "data.mixture[1].store is 's3://bucket/web/', and data.mixture[0].store 'web': stages and metrics know both as "
        "'web'; give a store once, with the weights added, or rename one of two"
    )


def test_the_name_of_a_store_fits_a_metric():
    assert only_problem("quickstart", *ALONE, "data.mixture=[{store: a b, weight: 3}]") == (
        "data.mixture[0].store is 'a b': stages and metrics know it by the last part, 'a b', which must be 1 to 64 of "
        "letters, digits, '.', '_' and '-'; rename the store"
    )


def test_stages_need_a_mixture():
    assert only_problem("quickstart", "data.stages=[{from_step: 1, weights: {web: 1}}]") == (
        "data.stages is given without data.mixture: it changes a mixture's weights; give one, or leave it out"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[{from_step: 9, weights: {web: 1, code: 1}}, {from_step: 9, weights: {web: 0, code: 1}}]",
            "data.stages[1].from_step is 9, and the stage before it begins at 9: put stages in the order of their "
            "steps, one for each",
        ),
        (
            "[{from_step: 9, weights: {web: 1, cod: 1}}]",
            "data.stages[0].weights names 'cod', no store of data.mixture: did you mean 'code'? They are web, code",
        ),
        (
            "[{from_step: 9, weights: {web: 1}}]",
            "data.stages[0].weights leaves out code: give each store of data.mixture one, 0 for none",
        ),
        (
            "[{from_step: 9, weights: {web: 0, code: 0}}]",
            "data.stages[0].weights are all 0: nothing would be trained on; give one store or more a weight above 0",
        ),
    ],
)
def test_stages_name_the_stores_of_the_mixture_in_the_order_of_steps(text: str, message: str):
    assert stages(text) == [message]


# ------------------------------------------------------------------------------------------------- adapters


def test_targets_that_name_no_matrix_are_refused_with_those_that_exist():
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    for given in ("all-linear", "[q_proj, v_proj]", "down_proj"):
        assert problems("quickstart", "adapter.rank=8", f"adapter.targets={given}") == []
    assert only_problem("quickstart", "adapter.rank=8", "adapter.targets=[q_proj, dwn_proj]") == (
        "adapter.targets has 'dwn_proj', and no matrix of a block is named so: did you mean down_proj? They are "
        f"{names}, and all-linear for all of them"
    )
    assert only_problem("quickstart", "adapter.rank=8", "adapter.targets=[]") == (
        f"adapter.targets names no matrix: give some of {names}, or all-linear"
    )


def test_an_adapter_has_a_rank():
    assert only_problem("quickstart", "adapter.alpha=32") == (
        "adapter.alpha is set and adapter.rank is null, so that there is no adapter: set adapter.rank (16 is usual), "
        "or leave the section out"
    )


def test_nxd_has_no_place_for_adapters():
    found = problems("quickstart", "adapter.rank=8", "engine.kind=nxd", "cluster.accelerator=neuron_xla")
    assert found == [
        "adapter.rank is 8 with engine.kind nxd, whose layers hold q, k and v, and gate and up, as one matrix: an "
        "adapter of each has no place there; set engine.kind to native, or adapter.rank to null"
    ]


def test_added_tokens_learn_beside_an_adapter():
    config = load_config("quickstart", ["adapter.rank=8"])

    def said(embeddings: str, *train_also: str) -> list[str]:
        changes = {"embeddings": embeddings, "init": "/weights", "add_tokens": ("<|im_start|>", "<|im_end|>")}
        section = config.adapter.model_copy(update={"train_also": train_also})
        model = config.model.model_copy(update=changes)
        return check(config.model_copy(update={"model": model, "adapter": section}))

    rows = (
        "model.add_tokens has 2 tokens, whose rows would stay as they begin under an adapter: set adapter.train_also to"
    )
    assert said("untied") == said("untied", "head") == said("untied", "embedding") == [f"{rows} [embedding, head]"]
    assert said("tied") == [f"{rows} [embedding]"]
    assert said("untied", "head", "embedding") == said("tied", "head") == said("tied", "embedding") == []


def test_epochs_are_of_one_store():
    assert only_problem("quickstart", *TWO, "train.steps=null", "train.epochs=2") == (
        "train.epochs is 2 with data.mixture, whose stores have epochs of their own: set train.steps, and "
        "data.max_epochs to bound them"
    )
    assert problems("quickstart", "train.steps=null", "train.epochs=2") == []
