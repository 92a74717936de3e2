"""`make quickstart` from an empty folder, phase by phase: python tests/benchmarks/bench_quickstart.py

In a fresh clone of this checkout's commit: the installation, then `raynium train quickstart` with its lines timed as
they come, on the CPU as it is and, by ONEDNN_MAX_CPU_ISA=AVX512_CORE, as if it had no matrix units. Beside it, as the
limit: its steps as a bare loop, with a core for each rank. Passes if the whole, the installation in it, takes five
minutes at most without matrix units. `--installed`: with the packages that are here.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark import ROOT, heading, parser, verdict

from raynium.accelerators import native_dtype
from raynium.config.load import load_config
from raynium.models.decoder import Decoder

MOST_SECONDS = 300
NO_MATRIX_UNITS = "AVX512_CORE"
# A phase → the line that it ends with.
PHASES = {
    "data: a tokenizer, the document store": r"data: [\d,]+ documents",
    "start: Ray, MLflow, agents, ranks": r"generation 1: ",
    "training, evaluations, checkpoints": r"step (\d+)/\1 ",
    "finish: baselines, sampled text": r"run quickstart: finished",
    "ends": r"MLflow page: ",
}
TINY = ("train.steps=4", "optimizer.warmup_steps=0", "sample.prompts=[]", "data.source=jobs", "model.vocab_size=300")
LIMIT = "--limit"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--installed", action="store_true", help="do not install into the clone")
    arguments.add_argument(LIMIT, action="store_true", help="print seconds of one bare step: for this script itself")
    given = arguments.parse_args()
    if given.limit:
        print(bare_step_seconds())
        return 0
    heading()
    tiny = given.tiny
    with tempfile.TemporaryDirectory(prefix="quickstart") as folder:
        clone = Path(folder) / "raynium"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        program, install_seconds = Path(sys.executable).parent / "raynium", 0.0
        if not (tiny or given.installed):
            began = time.perf_counter()
            subprocess.run(["make", "-s", ".venv/.installed"], cwd=clone, check=True, stdout=sys.stderr)
            install_seconds, program = time.perf_counter() - began, clone / ".venv/bin/raynium"
        totals = []
        for most in (None, NO_MATRIX_UNITS):
            environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": most} if most else {})
            overrides = TINY if tiny else ()
            phases, lines = timed_run([program, "train", "quickstart", *overrides], clone, environment)
            step_seconds = float(subprocess.check_output([sys.executable, __file__, LIMIT], env=environment, text=True))
            steps = 4 if tiny else load_config("quickstart").train.steps
            print(f"\n{'as the CPU is' if most is None else f'ONEDNN_MAX_CPU_ISA={most}'}\n\n| phase | s |\n|---|---|")
            print(f"| installation | {install_seconds:.0f} |")
            for name, seconds in phases.items():
                print(f"| {name} | {seconds:.0f} |")
            totals.append(install_seconds + sum(phases.values()))
            print(f"| **whole** | **{totals[-1]:.0f}** |")
            print(f"| the {steps} steps as a bare loop, a core a rank | {steps * step_seconds:.0f} |\n", flush=True)
            print(next(line for line in lines if line.startswith("held-out documents: ")), flush=True)
            subprocess.run(["rm", "-r", "runs"], cwd=clone, check=True)
    print(f"\nwithout matrix units {totals[-1]:.0f} s, at most {MOST_SECONDS} s")
    return verdict(totals[-1] <= MOST_SECONDS, tiny)


def timed_run(
    command: list[str | Path], folder: Path, environment: dict[str, str]
) -> tuple[dict[str, float], list[str]]:
    """(seconds of each phase, what was printed) of a run in `folder`."""
    ended: dict[str, float] = {}
    lines: list[str] = []
    began = time.perf_counter()
    waiting = list(PHASES)
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if waiting and re.match(PHASES[waiting[0]], line):
                ended[waiting.pop(0)] = time.perf_counter()
    if process.returncode or waiting:
        sys.exit("\n".join([*lines, f"exit code {process.returncode}; not seen: {waiting}"]))
    starts = [began, *ended.values()]
    return {name: at - start for (name, at), start in zip(ended.items(), starts, strict=False)}, lines


def bare_step_seconds() -> float:
    """Seconds of one step of one rank in a plain loop on one thread: nothing is shared, saved or logged."""
    torch.set_num_threads(1)
    config = load_config("quickstart")
    dtype = getattr(torch, native_dtype("cpu"))
    model = Decoder(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sequences = config.train.global_batch_size // config.cluster.ranks_per_node
    tokens_BT = torch.randint(config.model.vocab_size, (sequences, config.data.seq_len))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits_BTV = model(tokens_BT)
        torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
