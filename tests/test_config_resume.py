"""Which fields a run may change when it goes on from a checkpoint."""

import pytest

from raynium.config.fields import schema_fields
from raynium.config.load import load_config
from raynium.config.resume import FIXED, FREE, NOTED, resume_conflicts, resume_notes

pytestmark = pytest.mark.quick


IDENTITY = f"data.identity={'ab' * 32}"


def saved(*overrides):
    return load_config("llama3-8b", overrides).model_dump(mode="json")


def test_every_field_has_exactly_one_side():
    tables = [*FIXED, *NOTED, *FREE]
    for field in schema_fields().values():
        if not field.is_section:
            covering = [name for name in tables if field.name == name or field.name.startswith(name + ".")]
            assert len(covering) == 1, f"{field.name} must be in one of FIXED, NOTED and FREE, and is in {covering}"
    assert set(tables) <= set(schema_fields())


def test_an_unchanged_config_resumes_without_a_word():
    assert resume_conflicts(saved(IDENTITY), load_config("llama3-8b", [IDENTITY]), step=1) == []
    assert resume_notes(saved(IDENTITY), load_config("llama3-8b", [IDENTITY])) == []


def test_a_contradiction_names_field_values_and_remedy():
    assert resume_conflicts(saved(), load_config("llama3-8b", ["data.seq_len=4096", "model.num_layers=4"]), step=1) == [
        "model.num_layers is 4, but the checkpoint was trained with 32: the checkpoint's weights have this shape or "
        "meaning. Set model.num_layers back to 32, or give the run another run.name to start anew",
        "data.seq_len is 4096, but the checkpoint was trained with 8192: the data position counts samples of this kind "
        "and order. Set data.seq_len back to 8192, or give the run another run.name to start anew",
    ]


@pytest.mark.parametrize(
    "override",
    ["run.seed=1", "data.heldout_fraction=0.2",
     "data.shuffle=blocks", "data.shuffle_lanes=32", "data.shuffle_block_bytes=1048576",
     "train.global_batch_size=64",
     "optimizer.betas=[0.9, 0.99]", "optimizer.eps=1e-7", "model.rope_scaling=null", "model.rope_scaling.factor=9",
     "model.embeddings=tied", "model.norm_eps=1e-6"],
)  # fmt: skip
def test_each_fixed_field_is_refused(override):
    (conflict,) = resume_conflicts(saved(), load_config("llama3-8b", [override]), step=1)
    name = override.split("=")[0].removesuffix(".factor")
    assert conflict.startswith(f"{name} is ")


def test_a_section_that_was_null_is_compared_too():
    (conflict,) = resume_conflicts(saved("model.rope_scaling=null"), load_config("llama3-8b"), step=1)
    assert conflict.startswith('model.rope_scaling is {"factor": 8.0') and "trained with null" in conflict


def test_machines_and_bookkeeping_may_change_freely():
    now = load_config(
        "llama3-8b",
        ["cluster.nodes=4", "cluster.accelerator=cuda", "cluster.instance_type=p5.48xlarge", "cluster.ranks_per_node=8",
         "parallel.tensor=2", "train.micro_batch_size=2", "engine.compile=none", "engine.activation_checkpointing=none",
        
         "run.root=elsewhere", "data.path=elsewhere", "data.source=text", "data.tokenizer=null",
         "checkpoint.every_steps=7", "sample.prompts=[a]", "tracking.experiment=e"],
    )  # fmt: skip
    assert resume_conflicts(saved(IDENTITY), now, step=1) == []
    assert resume_notes(saved(IDENTITY), now) == []


def test_changes_that_move_the_losses_are_allowed_and_said():
    now = load_config("llama3-8b", ["train.steps=200000", "optimizer.learning_rate=1e-4"])
    assert resume_conflicts(saved(IDENTITY), now, step=1) == []
    assert resume_notes(saved(IDENTITY), now) == [
        "train.steps changed from 150000 to 200000: the learning-rate schedule now ends at another step, so the rate "
        "changes from here on",
        "optimizer.learning_rate changed from 0.0003 to 0.0001: the rate changes from here on",
    ]


def test_a_field_that_an_older_checkpoint_lacks_is_not_compared():
    old = saved()
    del old["model"]["norm_eps"], old["run"]
    assert resume_conflicts(old, load_config("llama3-8b", ["run.seed=3"]), step=1) == []


def test_data_is_known_by_its_content_and_other_data_is_refused_with_both_identities():
    now = load_config("llama3-8b", [f"data.identity={'cd' * 32}", "data.path=elsewhere"])
    assert resume_conflicts(saved(IDENTITY), now, step=1) == [
        f'data.identity is "{"cd" * 32}", but the checkpoint was trained with "{"ab" * 32}": the data position counts '
        "samples of that tokenizer and those tokens. Give the data.path of a store with the data of then, wherever it "
        "lies, or give the run another run.name to start anew"
    ]


def test_data_that_nobody_knows_is_not_compared_and_that_is_said():
    now = load_config("llama3-8b", [IDENTITY])
    assert (
        resume_conflicts(saved(), now, step=1)
        == resume_conflicts(saved(IDENTITY), load_config("llama3-8b"), step=1)
        == []
    )
    (note,) = resume_notes(saved(), now)
    assert note.startswith("the checkpoint does not say which data it was trained on, since an older Raynium wrote it")
    imported = {"model": saved()["model"]}
    assert resume_conflicts(imported, now, step=1) == resume_notes(imported, now) == []


# ------------------------------------------------------------------------------------------------- mixtures

ONE, OTHER = "ab" * 32, "cd" * 32


def mixed(*, stages: str = "[]", weight: int = 3, place: str = "s3://bucket/web", identity: str = ONE) -> list[str]:
    stores = f"[{{store: {place}, weight: {weight}, identity: {identity}}}, {{store: /data/code, weight: 1}}]"
    return ["data.path=null", f"data.mixture={stores}", f"data.stages={stages}"]


def stage(step: int, web: float = 0, code: float = 1, name: str = "web") -> str:
    return f"{{from_step: {step}, weights: {{{name}: {web}, code: {code}}}}}"


def test_stages_after_the_checkpoint_may_change_and_that_is_said():
    old, now = mixed(stages=f"[{stage(5)}, {stage(90)}]"), mixed(stages=f"[{stage(5)}, {stage(11, 1)}]")
    config = load_config("llama3-8b", now)
    assert resume_conflicts(saved(*old), config, step=10) == []
    assert [note for note in resume_notes(saved(*old), config) if note.startswith("data.stages changed from")]
    (conflict,) = resume_conflicts(saved(*old), config, step=11)
    assert conflict == (
        "data.stages has [[5, [0.0, 1.0]], [11, [1.0, 1.0]]] up to step 11 ([from_step, weights] of each), but the "
        "checkpoint was trained with [[5, [0.0, 1.0]]]: the data position counts samples of this kind and order. Set "
        "these back (stages that begin after step 11 may change), or give the run another run.name to start anew"
    )


def test_a_mixture_says_which_data_it_was_trained_on_by_the_identities_of_its_stores():
    known = [*mixed()[:1], mixed()[1].replace("weight: 1}", f"weight: 1, identity: {OTHER}}}")]
    assert resume_notes(saved(*known), load_config("llama3-8b", known)) == []
    (note,) = resume_notes(saved(*mixed()), load_config("llama3-8b", known))
    assert note.startswith("the checkpoint does not say which data it was trained on")


def test_the_weights_of_a_mixture_may_not_change():
    (conflict,) = resume_conflicts(saved(*mixed()), load_config("llama3-8b", mixed(weight=4)), step=10)
    assert conflict == (
        "data.mixture has the weights [4.0, 1.0], but the checkpoint was trained with [3.0, 1.0]: the data position "
        "counts samples of these stores, by these weights. Set them back, and give the weights from step 11 on as a "
        "stage in data.stages; or give the run another run.name to start anew"
    )
    assert len(resume_conflicts(saved(), load_config("llama3-8b", mixed()), step=10)) == 1


def test_a_store_of_a_mixture_may_lie_elsewhere_with_the_same_data():
    moved = mixed(place="/local/websites", stages=f"[{stage(5, name='websites')}]")
    old = saved(*mixed(stages=f"[{stage(5)}]"))
    assert resume_conflicts(old, load_config("llama3-8b", moved), step=10) == []
    (conflict,) = resume_conflicts(saved(*mixed()), load_config("llama3-8b", mixed(identity=OTHER)), step=10)
    assert conflict == (
        f"data.mixture has s3://bucket/web with the identity {OTHER}, but the checkpoint was trained with {ONE} from "
        "s3://bucket/web: the data position counts samples of that tokenizer and those tokens. Give the store with the "
        "data of then, wherever it lies, or give the run another run.name to start anew"
    )
