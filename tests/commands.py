"""Command lines in this process."""

import sys
from dataclasses import dataclass

import pytest

from raynium.cli.app import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run_command(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """`raynium <arguments>` as a shell would see it; an error is told without a traceback."""
    monkeypatch.setattr(sys, "argv", ["raynium", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    code = ended.value.code
    return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)
