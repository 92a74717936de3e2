"""The native engine on gloo ranks against a plain float64 loop, and its parts."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _engine_ranks import extent
from first_weights import initialise
from pair_task import in_pairs

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import FakeEngine, Votes
from raynium.engines.log_probs import ROWS_AT_ONCE, label_log_probs, turn_into_gradient
from raynium.engines.optim import decays, learning_rate
from raynium.models.decoder import Decoder

STEPS, ROWS, SEQ_LEN, VOCAB = 20, 12, 16, 64
PLENTY = 1 << 40
WORKER = Path(__file__).with_name("_engine_ranks.py")
QWEN3 = {"family": "qwen3", "embeddings": "tied"}
LLAMA3 = {"family": "llama3", "embeddings": "untied"}
# With biases of queries, keys and values.
QWEN2 = {"family": "qwen2", "embeddings": "tied"}


def config(
    *,
    ranks: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    micro_batches: int = 2,
    model: Mapping[str, str | int] = QWEN3,
    **engine: str,
) -> Config:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return Config.model_validate(
        {
            "run": {"name": "test", "seed": 5},
            "cluster": {"accelerator": "cpu", "ranks_per_node": ranks},
            "model": {**sizes, "ffn_size": 48, "max_seq_len": 32, "init_std": 0.1, **model},
            "data": {"path": "/nowhere", "seq_len": SEQ_LEN},
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "engine": engine,
            "optimizer": {"learning_rate": 3e-3, "clip_norm": 0.5, "warmup_steps": 3, "eps": 1e-6},
            "train": {
                "steps": STEPS,
                "global_batch_size": ROWS,
                "micro_batch_size": ROWS // (ranks // tensor // pipeline) // micro_batches,
            },
        }
    )


def samples() -> dict[str, torch.Tensor]:
    """Every step's global batch. The first rows count few labels, the last many: data ranks count differently."""
    generator = torch.Generator().manual_seed(7)
    # Each token follows from the one before it by a rule, so that there is something to learn.
    first = torch.randint(0, VOCAB, (STEPS, ROWS, 1), generator=generator)
    ids = (first * 3 ** torch.arange(5).repeat(4)[: SEQ_LEN + 1].reshape(1, 1, -1)) % VOCAB
    labels = ids[..., 1:].clone()
    ignored = torch.rand(labels.shape, generator=generator) < torch.linspace(0.9, 0.0, ROWS)[None, :, None]
    labels[ignored] = IGNORED_LABEL
    labels[:, :3] = IGNORED_LABEL  # at data size 2 and 3 that leaves a micro-batch in which nothing counts
    return {"tokens": ids[..., :-1].contiguous(), "labels": labels}


class Run(NamedTuple):
    folder: Path
    results: list[list[dict[str, Any]]]  # [rank][step]
    evaluations: list[list[dict[str, float]]]  # [rank][evaluation]
    states: list[list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor, bool]]]  # [rank][chunk]
    rows: list[torch.Tensor]  # [rank], each all rows' log-probabilities after the last step, if asked for
    # [rank], the scores of the questions' choices, and what the evaluation made of them.
    asked: list[tuple[torch.Tensor, dict[str, float]] | None]

    # [rank], as `states`, after step 1 if asked for.
    first_states: list[list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor, bool]]]

    @property
    def losses(self) -> list[float]:
        return [result["loss"] for result in self.results[0]]

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Every logical tensor from the blocks that are saved; each element must be saved exactly once."""
        whole: dict[str, torch.Tensor] = {}
        times: dict[str, torch.Tensor] = {}
        for name, shape, offsets, tensor, saved_here in (chunk for state in self.states for chunk in state):
            block = extent(offsets, tensor.shape)
            whole.setdefault(name, torch.zeros(shape))[block] += tensor * saved_here
            times.setdefault(name, torch.zeros(shape))[block] += saved_here
        assert all((count == 1).all() for count in times.values())
        return whole


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    """`_engine_ranks.py`, waiting for folders: it loads torch once and forks the ranks of every run."""
    with subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        yield it  # leaving closes its stdin, which ends it


def run(
    forker: subprocess.Popen[str],
    folder: Path,
    config: Config,
    *,
    task: str = "pretraining",
    memory_bytes: int | list[int] = PLENTY,
    first_step: int = 1,
    last_step: int = STEPS,
    load_from: Path | None = None,
    stop: tuple[int, int] | None = None,
    leave_out: tuple[int, int] | None = None,
    poison: tuple[int, int, int, float] | None = None,
    data: Mapping[str, torch.Tensor] | None = None,
    questions: str | None = None,
    rows: bool = False,
    first_state: bool = False,
    logits_bytes: int | None = None,
) -> Run:
    """All ranks of `config` take the steps; stop: the (rank, step) that asks to stop. memory_bytes: of each rank.
    logits_bytes: of a piece of the head's rows, where it is not the usual one.

    leave_out: the (rank, step) that votes for it. poison: (rank, step, micro-batch, what slopes are multiplied by).

    data: instead of `samples()`. questions: a file of them, for an evaluation at the end. rows: their log-probabilities
    are asked for at the end. first_state: what the ranks hold after step 1 is kept too.
    """
    folder.mkdir()
    torch.save(dict(data or samples()), folder / "batches.pt")
    scenario = {
        "config": config.model_dump(mode="json"),
        "task": task,
        "memory_bytes": [memory_bytes] * World.of(config).size if isinstance(memory_bytes, int) else memory_bytes,
        "first_step": first_step,
        "last_step": last_step,
        "load_from": None if load_from is None else str(load_from),
        "stop": stop,
        "leave_out": leave_out,
        "poison": poison and (*poison, World.of(config).num_micro_batches),
        "questions": questions,
        "rows": rows,
        "first_state": first_state,
        "logits_bytes": logits_bytes,
    }
    (folder / "scenario.json").write_text(json.dumps(scenario))
    assert forker.stdin is not None and forker.stdout is not None
    forker.stdin.write(f"{folder}\n")
    forker.stdin.flush()
    assert forker.stdout.readline() == "0\n", (folder / "stderr").read_text()[-6000:]
    ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(World.of(config).size)]
    return Run(
        folder,
        *(
            [rank.get(key) for rank in ranks]
            for key in ("results", "evaluations", "state", "rows", "asked", "first_state")
        ),
    )


class Reference(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    nats: list[float]  # of the evaluations, every fifth step


def reference(config: Config) -> Reference:
    """The same training as a plain loop in float64 on whole batches."""
    model = Decoder(config.model)
    initialise(model, seed=config.run.seed, config=config.model)
    model.double()
    groups = [
        {"params": [p for p in model.parameters() if decays(tuple(p.shape))], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if not decays(tuple(p.shape))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    losses, norms, nats = [], [], []
    data = samples()
    for step in range(1, STEPS + 1):
        tokens, labels = data["tokens"][step - 1], data["labels"][step - 1].flatten()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels, ignore_index=IGNORED_LABEL)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step=step, total_steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 0:
            logits = model(tokens).flatten(0, 1)
            nats.append(F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum").item())
    return Reference(losses, norms, nats)


# ---- Layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one rank": ({"ranks": 1}, PLENTY),
    "fsdp 2": ({"ranks": 2}, PLENTY),
    "fsdp 3, a group per block": ({"ranks": 3}, 0),  # 3 divides no parameter: uneven shards
    "tp 2": ({"ranks": 2, "tensor": 2}, PLENTY),
    "fsdp 2 x tp 2": ({"ranks": 4, "tensor": 2}, PLENTY),
    "fsdp 2 x tp 2, a group per block, untied": ({"ranks": 4, "tensor": 2, "model": LLAMA3}, 0),
    "fsdp 2 x tp 2, biases": ({"ranks": 4, "tensor": 2, "model": QWEN2}, 0),
}


@pytest.fixture(scope="module")
def runs(forker: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each layout's 20 steps, taken once and looked at by several tests."""
    folder = tmp_path_factory.mktemp("layouts")
    return {
        name: run(forker, folder / str(index), config(**layout), memory_bytes=memory)
        for index, (name, (layout, memory)) in enumerate(LAYOUTS.items())
    }


@pytest.fixture(scope="module")
def half(forker: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that ended early, for others to go on from."""
    return run(forker, tmp_path_factory.mktemp("half") / "run", config(ranks=4, tensor=2), last_step=9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_a_plain_float64_loop_does(runs: dict[str, Run], layout: str) -> None:
    expected = reference(config(**LAYOUTS[layout][0]))
    assert expected.losses[-1] < expected.losses[0] - 0.8, "nothing was learned, so the losses show little"
    assert min(expected.grad_norms) > 0.5, "clipping must be active"
    counted = [(labels != IGNORED_LABEL).sum().item() for labels in samples()["labels"]]
    for results, evaluations in zip(runs[layout].results, runs[layout].evaluations, strict=True):
        assert [result["loss"] for result in results] == pytest.approx(expected.losses, rel=3e-6)
        assert [result["grad_norm"] for result in results] == pytest.approx(expected.grad_norms, rel=1e-4)
        assert [result["sums"]["tokens"] for result in results] == counted
        assert [sums["nats"] for sums in evaluations] == pytest.approx(expected.nats, rel=3e-6)
        assert [sums["tokens"] for sums in evaluations] == counted[4::5]


# Matrices of several tiles, whose edges no rank's rows and columns keep to.
SIZES = {"vocab_size": 722, "hidden_size": 320, "ffn_size": 602}
BEGINNINGS: dict[str, tuple[dict[str, Any], int]] = LAYOUTS | {
    "simple, fsdp 2 x tp 2": ({"ranks": 4, "tensor": 2, "fsdp": "simple", "compile": "block"}, PLENTY),
}


@pytest.mark.parametrize("layout", BEGINNINGS)
def test_every_rank_begins_with_its_part_of_the_one_model(
    layout: str, tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    arguments, memory = BEGINNINGS[layout]
    with_sizes: dict[str, Any] = arguments | {"model": arguments.get("model", QWEN3) | SIZES}
    made = config(**with_sizes)
    assert_first_weights(run(forker, tmp_path / "run", made, memory_bytes=memory, last_step=0), made)


def assert_first_weights(begun: Run, config: Config) -> None:
    """Of a run that took no step: bit by bit, copies that nobody saves too."""
    model = Decoder(config.model)
    initialise(model, seed=config.run.seed, config=config.model)
    whole = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    wrong = [
        (rank, name, offsets)
        for rank, state in enumerate(begun.states)
        for name, _, offsets, tensor, _ in state
        if name in whole and not torch.equal(tensor, whole[name][extent(offsets, tensor.shape)])
    ]
    assert wrong == []
    assert begun.whole_state().keys() >= whole.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_saved_once_under_names_that_do_not_know_the_layout(runs: dict[str, Run], layout: str) -> None:
    model = Decoder(config(**LAYOUTS[layout][0]).model)
    expected = {
        f"{prefix}/{name}": tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        for prefix in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    }
    assert {name: tuple(whole.shape) for name, whole in runs[layout].whole_state().items()} == expected


def test_the_same_layout_twice_is_bitwise_equal(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    again = run(forker, tmp_path / "again", config(ranks=4, tensor=2))
    assert again.results == runs["fsdp 2 x tp 2"].results
    first = runs["fsdp 2 x tp 2"].whole_state()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.whole_state().items())


def test_a_loaded_state_continues_bitwise_in_the_same_layout(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    half = run(forker, tmp_path / "half", config(ranks=2), last_step=9)
    rest = run(forker, tmp_path / "rest", config(ranks=2), first_step=10, load_from=half.folder)
    assert half.losses + rest.losses == runs["fsdp 2"].losses


@pytest.mark.parametrize("layout", ["one rank", "fsdp 3, a group per block", "tp 2"])
def test_a_loaded_state_continues_in_another_layout(
    layout: str, runs: dict[str, Run], half: Run, tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    arguments, memory = LAYOUTS[layout]
    rest = run(
        forker, tmp_path / "rest", config(**arguments), memory_bytes=memory, first_step=10, load_from=half.folder
    )
    assert rest.losses == pytest.approx(runs["one rank"].losses[9:], rel=3e-6)


def test_ranks_on_unlike_machines_lay_the_model_out_alike(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    """Else one gathers the model at once and the other block by block, and they wait for each other's collectives."""
    unlike = run(forker, tmp_path / "unlike", config(ranks=2), memory_bytes=[PLENTY, 0], last_step=3)
    assert unlike.losses == pytest.approx(runs["one rank"].losses[:3], rel=3e-6)


def test_all_ranks_learn_of_a_vote_at_the_same_step(tmp_path: Path, forker: subprocess.Popen[str]) -> None:
    asked = run(forker, tmp_path / "stop", config(ranks=4, tensor=2), last_step=4, stop=(3, 3))
    for results in asked.results:
        assert [result["agreed"] for result in results] == [(step == 3, step == 2, False) for step in range(1, 5)]


# ---- Steps that are left out -----------------------------------------------------------------------------------------

MASKED: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({"ranks": 1}, PLENTY),
    "fsdp 2": ({"ranks": 2}, PLENTY),
    "fsdp 3, a group per block": ({"ranks": 3}, 0),
    "fsdp 2 x tp 2, compiled": ({"ranks": 4, "tensor": 2, "compile": "block"}, PLENTY),
    "simple, fsdp 2 x tp 2": ({"ranks": 4, "tensor": 2, "fsdp": "simple", "compile": "block"}, PLENTY),
}


@pytest.mark.parametrize(
    ("layout", "value"), [*((name, math.nan) for name in MASKED), ("fsdp 2", math.inf), ("fsdp 2", 3e38)]
)
def test_a_step_that_is_not_finite_changes_no_bit_and_equals_one_that_was_left_out_beforehand(
    layout: str, value: float, tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    """One micro-batch of the last rank has it; 3e38 is finite, and the square of its norm is not."""
    arguments, memory = MASKED[layout]
    made, last = config(**arguments), World.of(config(**arguments)).size - 1
    common: dict[str, Any] = {"memory_bytes": memory, "last_step": 7}
    spoilt = run(forker, tmp_path / "spoilt", made, poison=(last, 4, 1, value), **common)
    told = run(forker, tmp_path / "told", made, leave_out=(last, 4), **common)
    for results in (*spoilt.results, *told.results):
        assert [result["updated"] for result in results] == [step != 4 for step in range(1, 8)]
    assert all(torch.equal(tensor, told.whole_state()[name]) for name, tensor in spoilt.whole_state().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_in_pieces_gives_the_same_losses_in_every_layout(
    layout: str, runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    arguments, memory = LAYOUTS[layout]
    pieces = run(
        forker, tmp_path / "run", config(**arguments), memory_bytes=memory, last_step=5, logits_bytes=9 * VOCAB * 4
    )
    assert pieces.losses == pytest.approx(runs[layout].losses[:5], rel=3e-6)
    # The model learns from it, whatever the loss says of the model before.
    assert pieces.evaluations[0][0]["nats"] == pytest.approx(runs[layout].evaluations[0][0]["nats"], rel=3e-6)


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ({"ranks": 4, "tensor": 2}, 0),
        ({"ranks": 2, "fsdp": "simple", "compile": "block"}, PLENTY),
        ({"ranks": 2, "tensor": 2, "dtype": "bfloat16"}, PLENTY),
    ],
    ids=str,
)
def test_slopes_that_wait_for_whole_rows_are_the_same_in_pieces(
    arguments: dict[str, Any], memory: int, tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    more: dict[str, Any] = {
        "task": "dpo",
        "data": in_pairs(samples()),
        "memory_bytes": memory,
        "last_step": 5,
        "rows": True,
    }
    whole = run(forker, tmp_path / "whole", config(micro_batches=3, **arguments), **more)
    pieces = run(forker, tmp_path / "pieces", config(micro_batches=3, **arguments), **more, logits_bytes=9 * VOCAB * 4)
    assert pieces.losses == pytest.approx(whole.losses, rel=3e-6 if "dtype" not in arguments else 2e-3)
    for mine, theirs in zip(pieces.rows, whole.rows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if "dtype" not in arguments else 1e-2, atol=1e-3)


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_bfloat16_follows_float32_on_one_rank_and_on_four(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    """One rank has no process group of its own here, as in a script."""
    one = run(forker, tmp_path / "one", config(dtype="bfloat16"))
    four = run(forker, tmp_path / "four", config(ranks=4, tensor=2, dtype="bfloat16"))
    assert one.losses == pytest.approx(runs["one rank"].losses, rel=2e-2)
    assert four.losses == pytest.approx(runs["one rank"].losses, rel=2e-2)
    assert one.losses != runs["one rank"].losses
    assert {tensor.dtype for _, _, _, tensor, _ in four.states[0]} == {torch.float32}, "master weights and moments"


def test_activation_checkpointing_changes_no_bit(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    checkpointed = run(forker, tmp_path / "run", config(ranks=2, activation_checkpointing="full"))
    assert checkpointed.losses == runs["fsdp 2"].losses
    assert checkpointed.whole_state().keys() == runs["fsdp 2"].whole_state().keys()


def test_compiled_blocks_give_the_same_losses(
    runs: dict[str, Run], tmp_path: Path, forker: subprocess.Popen[str]
) -> None:
    compiled = run(
        forker, tmp_path / "run", config(ranks=2, compile="block", activation_checkpointing="full"), last_step=5
    )
    assert compiled.losses == pytest.approx(runs["fsdp 2"].losses[:5], rel=3e-6)


# ---- Parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slopes", ["ones", "negative", "signed"])
def test_logits_become_the_gradient_that_autograd_has(dtype: torch.dtype, slopes: str) -> None:
    """Of any function of the labels' log-probabilities, told by its slopes."""
    rows = ROWS_AT_ONCE + 37  # a last chunk that is not whole
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 50, dtype=dtype, generator=generator) * 5
    labels = torch.randint(0, 50, (rows,), generator=generator)
    labels[::3] = IGNORED_LABEL
    wide = torch.promote_types(dtype, torch.float32)
    slope = -torch.rand(rows, dtype=wide, generator=generator) * 10 ** torch.randint(
        -6, 3, (rows,), generator=generator
    )
    slope[::5] = 0
    if slopes == "ones":
        slope = torch.full_like(slope, -1)
    elif slopes == "signed":
        slope *= torch.tensor([1, -1], dtype=wide)[torch.arange(rows) % 2]
    theirs = logits.clone().requires_grad_()
    nats = F.cross_entropy(theirs.to(wide), labels, ignore_index=IGNORED_LABEL, reduction="none")
    (-nats * slope).sum().backward()

    untouched = logits.clone()
    found = label_log_probs(logits, labels, vocabulary_group=None)
    assert torch.equal(logits, untouched)
    torch.testing.assert_close(found.log_probs_N, -nats.detach())
    turn_into_gradient(logits, found, slope, signed=slopes == "signed")
    torch.testing.assert_close(logits, theirs.grad)


def test_a_slope_that_was_not_announced_is_no_number() -> None:
    """Rather than a gradient of the wrong sign: the guard then ends the run at this step."""
    logits = torch.randn(2, 8)
    found = label_log_probs(logits, torch.tensor([1, 2]), vocabulary_group=None)
    turn_into_gradient(logits, found, torch.tensor([-1.0, 1.0]), signed=False)
    assert logits[0].isfinite().all() and logits[1].isnan().all()


def test_the_fake_engines_losses_tell_state_samples_and_steps_apart() -> None:
    def losses(engine: FakeEngine, *, offset: int = 0, first: int = 1) -> list[float]:
        batches = [Batch(torch.full((1, 4), step + offset), torch.zeros(1, 4)) for step in range(first, 4)]
        return [engine.step(b, step=s, votes=Votes()).loss for s, b in enumerate(batches, start=first)]

    whole = losses(FakeEngine())
    assert losses(FakeEngine()) == whole and len(set(whole)) == 3
    assert losses(FakeEngine(), offset=1) != whole
    half, resumed = FakeEngine(), FakeEngine()
    half.step(Batch(torch.full((1, 4), 1), torch.zeros(1, 4)), step=1, votes=Votes())
    assert losses(resumed, first=2) != whole[1:]
    resumed = FakeEngine()
    resumed.state()[0].tensor.copy_(half.state()[0].tensor)
    assert losses(resumed, first=2) == whole[1:]
