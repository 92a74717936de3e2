"""AWS's recovery table and status codes, replayed: what a rank and the kernel say in, the verdict out."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from raynium.health.faults import BROKEN_GRAPH, CORES_TAKEN, ROWS, STATUSES, WAITING, Fault, Row, classify, is_symptom

pytestmark = pytest.mark.quick

FIXTURES = Path(__file__).parent / "fixtures/neuron"
DEATHS: list[dict[str, Any]] = yaml.safe_load((FIXTURES / "recovery.yaml").read_text())
BY_STATUS: dict[int, tuple[str, str, str]] = yaml.safe_load((FIXTURES / "statuses.yaml").read_text())

PUBLIC: dict[str, list[dict[str, Any]]] = yaml.safe_load((FIXTURES / "public.yaml").read_text())
REPORTS = [report for reports in PUBLIC.values() for report in reports]

# How statuses have been seen to be said: AWS's documents and issues.
SPELLINGS = (
    "RuntimeError: Failed to execute the model status={number} message=whatever it is",
    'nrt_execute_repeat status={number}, error message="Non specific failure".',
    "Internal: adaptor.cc:446:Execute failed: nrt_execute: status={number}, error message=",
    "2021-Nov-01 06:02:18.0992 13660:14125 ERROR  NMGR:dlr_infer            Inference completed with err: {number}",
    "2025-Oct-01 23:48:34.0022 5162:5162 ERROR   NRT:nrt_infodump             Failure: {name} in nrt_execute()",
    "the call ended with {name} ({number})",
)

# A line that carries none of these may never cost somebody an instance.
DOCUMENTED_REASONS_TO_REPLACE = re.compile(
    r"Uncorrectable memory error is detected|Uncorrectable HBM memory error is detected|uncorrectable memory error on"
    r"|engine \d+ is in an abort state|(execution|inference) timeout \(\d+ ms\)|\b120[123]\b|NEURON_HW_ERR="
    r"|NRT_EXEC_HW_ERR_(HBM_UE|NC_UE|DMA_ABORT)"
)


def told(fault: Fault | None) -> list[Any] | None:
    return None if fault is None else [fault.name, fault.action, fault.guilty, fault.device, fault.core]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death["name"])
def test_each_death_has_its_verdict(death: dict[str, Any]) -> None:
    fault = classify(death.get("output", ()), death.get("kernel", ()))
    assert told(fault) == death["verdict"]
    if fault is not None:
        line = next(line for line in [*death.get("output", ()), *death.get("kernel", ())] if fault.evidence in line)
        assert death.get("kernel") or is_symptom(line), "the agent would not have kept this line"


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report["source"])
def test_what_users_were_shown_has_the_verdict_that_would_have_helped_them(report: dict[str, Any]) -> None:
    output = report.get("output", [])
    fault = classify(output, report.get("kernel", ()))
    assert told(fault) == report["verdict"]
    assert report.get("shows", "") in str(fault)
    if fault is not None and output:
        assert any(fault.evidence in line and is_symptom(line) for line in output), "the agent would not have kept it"
    if waited := report.get("waited"):
        found = WAITING.search(output[0])
        assert found is not None and waited in found.groups() and is_symptom(output[0])


def test_a_verdict_that_a_reset_may_cure_is_another_the_second_time() -> None:
    fault = classify(["[MLA 9][NC 1] DMA TX engine 3 is in an abort state"])
    assert fault is not None and (fault.action, fault.again().action) == ("reboot", "replace")
    assert fault.again().again() == fault.again()
    other = classify(["nrt_execute: status=1202"])
    assert other is not None and other.again() == other, "nothing but another instance helps here"


def test_the_same_fault_seen_again_is_one_fault_to_the_driver() -> None:
    lines = ["[MLA 9][NC 1] DMA TX engine 3 is in an abort state"]
    assert len({classify(lines), classify(lines)}) == 1, "the driver keeps what it has told in a set"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("number", BY_STATUS)
def test_each_status_has_its_verdict_however_it_is_said(number: int, spelling: str) -> None:
    name, row, action = BY_STATUS[number]
    line = spelling.format(number=number, name=name)
    fault = classify(["a line before", line, "a line after"])
    assert fault is not None and (fault.name, fault.action) == (row, action)
    assert f"{name} ({number})" in fault.cause and fault.evidence == line
    assert is_symptom(line)


def test_no_status_and_no_row_is_without_a_fixture() -> None:
    assert {number: name for number, (name, *_) in BY_STATUS.items()} == STATUSES
    seen = {death["verdict"][0] for death in DEATHS if death["verdict"]} | {row for _, row, _ in BY_STATUS.values()}
    seen |= {report["verdict"][0] for report in REPORTS if report["verdict"]}
    seen |= {verdict[0] for verdict in yaml.safe_load((FIXTURES / "xids.yaml").read_text()).values() if verdict}
    # peer-lost is of torch's own words, and silent-corruption of ours; see test_diagnosis.py and test_audit.py.
    assert seen | {"peer-lost", "silent-corruption"} == {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_of_the_table_has_the_fields_and_the_values_that_the_loader_takes_for_granted(row: Row) -> None:
    for field, hint in get_type_hints(Row).items():
        TypeAdapter(hint).validate_python(getattr(row, field), strict=True)
    assert row.log or row.exception or row.kernel or row.statuses, "nothing shows it"
    assert row.cause and row.source and not row.cause.endswith(".")


def test_every_status_belongs_to_one_row_and_the_row_that_code_names_is_there() -> None:
    assert len(STATUSES) == sum(len(row.statuses) for row in ROWS)
    assert {CORES_TAKEN, BROKEN_GRAPH, "compute-hang"} <= {row.name for row in ROWS}


def test_broken_hardware_is_found_behind_everything_that_it_causes() -> None:
    consequences = [line for death in DEATHS if death["verdict"] and death["verdict"][2] != "node"
                    for line in death.get("output", ()) if "HW_ERR" not in line]  # fmt: skip
    broken = "[MLA 9][NC 1] DMA TX engine 3 is in an abort state"
    assert told(classify([*consequences, broken, *consequences])) == ["dma-abort", "reboot", "node", 9, 1]


def test_a_long_line_is_quoted_in_part() -> None:
    fault = classify(["nrt_execute: status=1203 " + "x" * 10_000])
    assert fault is not None and len(fault.evidence) == 300


WORDS = st.sampled_from(
    [word for death in DEATHS for line in [*death.get("output", ()), *death.get("kernel", ())] for word in line.split()]
)
LINES = st.lists(st.one_of(st.text(), st.lists(WORDS, max_size=12).map(" ".join)), max_size=6)


@given(output=LINES, kernel=LINES)
def test_no_lines_break_it_and_none_replaces_a_node_without_a_documented_reason(
    output: list[str], kernel: list[str]
) -> None:
    fault = classify(output, kernel)
    if fault is not None and fault.action == "replace":
        assert DOCUMENTED_REASONS_TO_REPLACE.search("\n".join([*output, *kernel]))
        assert fault.guilty == "node"
