"""Audits: who is wrong, by the votes alone, and on real ranks of which one flips a bit of its gradient."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_engine import LLAMA3, PLENTY, config, samples

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.engines.collectives import checksum, refuse_simple_fsdp, repeatable
from raynium.errors import ConfigError
from raynium.health.faults import classify
from raynium.planning.rules import check, doubts
from raynium.train.audit import Finding, judge

WORKER = Path(__file__).with_name("_audit_ranks.py")
NOBODY = Finding(frozenset())


def wrong(*ranks: int, settled: bool = True) -> Finding:
    return Finding(frozenset(ranks), settled)


# ---- who is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "originals, again, found",
    [
        # It passed: whoever had something else before was wrong.
        ({0: "x", 1: "a"}, "aa", wrong(0)),
        ({0: "a", 1: "x"}, "aa", wrong(1)),
        ({1: "x", 0: "a"}, "aaa", wrong(1)),
        ({1: "x", 0: "y"}, "aaa", wrong(0, 1)),
        # It stays, and a third rank knows.
        ({1: "x", 0: "a"}, "axa", wrong(1)),
        ({1: "a", 0: "x"}, "xaaa", wrong(0)),
        ({1: "x", 0: "a"}, "axaya", wrong(1, 3)),
        # Two that stay with what they say.
        ({0: "a", 1: "x"}, "ax", wrong(0, 1, settled=False)),
        # Of two that differ, one that says another thing each time.
        ({0: "a", 1: "x"}, "ay", wrong(1)),
        ({0: "x", 1: "a"}, "ya", wrong(0)),
        # Nobody says the same twice, or no two say the same.
        ({0: "a", 1: "b"}, "cd", NOBODY),
        ({0: "a", 1: "b"}, "cde", NOBODY),
        ({1: "a", 0: "b"}, "xxyy", NOBODY),
    ],
)
def test_the_majority_says_who_is_wrong_and_two_ranks_only_where_one_contradicts_itself(
    originals: dict[int, str], again: str, found: Finding
) -> None:
    assert judge(originals, again) == found


def test_a_checksum_changes_with_any_flipped_bit_and_wraps() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = int(checksum([values]))
    for bit in range(31):
        flipped = values.clone()
        flipped.view(torch.int32)[bit * 7] ^= 1 << bit
        assert int(checksum([flipped])) != whole
    large = torch.full((5,), 2**30, dtype=torch.int32)
    assert int(checksum([large.view(torch.float32)])) == (5 * 2**30 + 2**31) % 2**32 - 2**31
    assert int(checksum([values[:3], values[3:]])) == whole


def test_kernels_are_told_to_repeat_themselves_on_cuda_alone_and_while_it_is_asked_for() -> None:
    def asked() -> bool:
        return torch.are_deterministic_algorithms_enabled()

    with repeatable("cpu"):
        assert not asked()
    with repeatable("cuda"):
        assert asked()
        with repeatable("cuda"):
            assert asked()
        assert asked()
    assert not asked()


# ---- what follows ----------------------------------------------------------------------------------------------------


def test_only_the_rank_that_is_wrong_costs_its_node() -> None:
    fault = classify(["SilentCorruption: step 4: rank 1 on node 1: others found another gradient"])
    assert fault is not None and fault.names_the_node and fault.retry
    assert (fault.name, fault.action) == ("silent-corruption", "replace")
    assert classify(["CorruptionUnsettled: step 4: rank 0 on node 0, rank 1 on node 1: each found another"]) is None


def audited(*, every_steps: int | None = 2, **given: Any) -> Config:
    made = config(**given)
    return made.model_copy(update={"fault": made.fault.model_copy(update={"audit_every_steps": every_steps})})


@pytest.mark.parametrize(
    "engine, problem",
    [
        ({"kind": "nxd"}, "2 with engine.kind nxd, whose passes add .*: set engine.kind to native, or "),
        ({"fsdp": "simple", "compile": "block"}, "2 with engine.fsdp simple, whose .*: set engine.fsdp to fsdp2, or "),
    ],
)
def test_an_engine_whose_gradients_cannot_be_compared_is_refused_by_name(engine: dict[str, str], problem: str) -> None:
    (found,) = [each for each in check(audited(ranks=2, **engine)) if "audit" in each]
    assert re.search(f"fault.audit_every_steps is {problem}fault.audit_every_steps to null", found)
    assert not [each for each in check(audited(ranks=2, every_steps=None, **engine)) if "audit" in each]


def test_an_engine_that_settles_on_simple_fsdp_refuses_too() -> None:
    refuse_simple_fsdp(audited(every_steps=None))
    with pytest.raises(ConfigError, match=r"with engine.fsdp simple, whose .* set engine.fsdp to fsdp2, or"):
        refuse_simple_fsdp(audited())


def test_one_data_rank_is_told_that_no_step_is_audited() -> None:
    (found,) = doubts(audited(ranks=2, tensor=2))
    assert "has no neighbour to be compared with: no step is audited" in found
    assert not doubts(audited(ranks=2)) and not doubts(audited(ranks=1, every_steps=None))


# ---- real ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        yield it


def run(
    forker: subprocess.Popen[str],
    folder: Path,
    config: Config,
    *,
    memory_bytes: int = PLENTY,
    nodes: int = 1,
    steps: int = 2,
    flip: dict[int, tuple[int, int, bool]] | None = None,
    replica: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """What each rank left. flip: rank → the step in which, how often, and whether another bit each time.

    replica: rank and step in which its copy of a parameter gets another bit.
    """
    folder.mkdir()
    torch.save(samples(), folder / "batches.pt")
    size = World.of(config).size
    world = World.of(config).to_json() | {"nodes": nodes, "ranks_per_node": size // nodes}
    scenario = {"config": config.model_dump(mode="json"), "world": world, "memory_bytes": memory_bytes, "steps": steps}
    scenario |= {"every_steps": config.fault.audit_every_steps, "flip": flip or {}, "replica": replica}
    (folder / "scenario.json").write_text(json.dumps(scenario))
    assert forker.stdin is not None and forker.stdout is not None
    forker.stdin.write(f"{folder}\n")
    forker.stdin.flush()
    assert forker.stdout.readline() == "0\n"
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(size)]


def bits(ranks: list[dict[str, Any]]) -> list[Any]:
    return [[(name, offsets, tensor.tolist()) for name, _, offsets, tensor, _ in rank["state"]] for rank in ranks]


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "2, gathered": ({"ranks": 2}, PLENTY),
    "3, a group per block": ({"ranks": 3}, 0),
    "2 x tp 2, a group per block, bfloat16": ({"ranks": 4, "tensor": 2, "model": LLAMA3, "dtype": "bfloat16"}, 0),
    "3, gathered, bfloat16": ({"ranks": 3, "dtype": "bfloat16"}, PLENTY),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_audit_of_healthy_ranks_finds_nothing_and_changes_no_bit(
    forker: subprocess.Popen[str], tmp_path: Path, layout: str
) -> None:
    given, memory_bytes = LAYOUTS[layout]
    with_audits = run(forker, tmp_path / "on", audited(every_steps=1, **given), memory_bytes=memory_bytes)
    without = run(forker, tmp_path / "off", audited(every_steps=None, **given), memory_bytes=memory_bytes)
    assert [rank["raised"] for rank in with_audits + without] == [None] * (2 * len(without))
    assert [rank["results"] for rank in with_audits] == [rank["results"] for rank in without]
    assert bits(with_audits) == bits(without)


@pytest.mark.parametrize(
    "given, memory_bytes, times",
    [
        pytest.param({"ranks": 3}, PLENTY, 1, id="once, in the step's own gradients or the neighbour's"),
        pytest.param({"ranks": 3}, 0, 1000, id="always"),
        pytest.param({"ranks": 2}, PLENTY, 1, id="once, of two"),
    ],
)
def test_the_rank_that_flips_a_bit_of_its_gradient_is_named_and_the_step_is_not_applied(
    forker: subprocess.Popen[str], tmp_path: Path, given: dict[str, Any], memory_bytes: int, times: int
) -> None:
    size = given["ranks"]
    ranks = run(
        forker, tmp_path / "it", audited(**given), memory_bytes=memory_bytes, nodes=size, flip={1: (2, times, False)}
    )
    assert [len(rank["results"]) for rank in ranks] == [1] * size
    error, text = ranks[1]["raised"]
    assert error == "SilentCorruption" and text.startswith("step 2: rank 1 on node 1: others of "), text
    assert all(
        rank["raised"][0] not in ("SilentCorruption", "CorruptionUnsettled") for rank in ranks if rank != ranks[1]
    )
    assert all(rank["raised"] is not None for rank in ranks)


def test_two_ranks_that_both_stay_with_their_bits_are_both_named_and_their_node_if_it_is_one(
    forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    apart = run(forker, tmp_path / "apart", audited(ranks=2), nodes=2, flip={1: (2, 1000, False)})
    for rank in apart:
        error, text = rank["raised"]
        assert error == "CorruptionUnsettled"
        assert "rank 0 on node 0, rank 1 on node 1: each found another gradient of the same samples, twice" in text
        assert "check both nodes (raynium preflight), or take more data ranks" in text
    together = run(forker, tmp_path / "together", audited(ranks=2), flip={1: (2, 1000, False)})
    assert [rank["raised"][0] for rank in together] == ["SilentCorruption"] * 2


def test_ranks_that_never_repeat_themselves_are_told_to_do_without_audits(
    forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    ranks = run(forker, tmp_path / "it", audited(ranks=2), nodes=2, flip={0: (2, 1000, True), 1: (2, 999, True)})
    assert [rank["raised"][0] for rank in ranks] == ["NotRepeatable"] * 2
    assert "set fault.audit_every_steps to null" in ranks[0]["raised"][1]


def test_a_parameter_of_which_a_tensor_group_holds_two_versions_names_that_group(
    forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    ranks = run(forker, tmp_path / "it", audited(ranks=4, tensor=2), nodes=2, replica=(3, 2))
    assert [rank["raised"][0] == "SilentCorruption" for rank in ranks] == [False, False, True, True]
    assert ranks[2]["raised"][1] == (
        "step 2: rank 2 on node 1, rank 3 on node 1: its tensor group holds copies of a parameter that differ; the "
        "step was not applied"
    )
