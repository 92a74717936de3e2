"""Takes README's pictures anew, docs/mlflow.png and docs/mlflow-charts.png: a small run, `raynium ui`, Chromium.

make picture        two minutes; Chromium must be on PATH
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from chromium import look

from raynium.chaos.sessions import kill_started

ROOT = Path(__file__).parents[1]
RAYNIUM = str(Path(sys.executable).parent / "raynium")
# The quickstart in little: its own text is the package's.
RUN = (
    *("quickstart", "data.source=text", "model.vocab_size=512", "model.hidden_size=64"),
    *("model.num_layers=2", "model.head_dim=16", "model.ffn_size=192", "data.seq_len=64", "checkpoint.every_steps=50"),
    *("optimizer.warmup_steps=20", "sample.max_new_tokens=40"),
)


def shown(page: str, tab: str, *, until: str, height: int, picture: Path | None) -> str:
    """The text of one tab of a run's page, once `until` is true."""
    return look(page.replace("?", f"{tab}?"), until=until, height=height, picture=picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        # The page shows of a command what follows its last slash.
        Path(root, "text").symlink_to(ROOT / "platform/raynium")
        evaluations = f"evaluate.every_steps={max(1, asked.steps // 8)}"
        command = [RAYNIUM, "train", *RUN, f"train.steps={asked.steps}", evaluations]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout
        found = re.search(r"MLflow page: http://127\.0\.0\.1:(\d+)", said)
        assert found is not None, said
        # MLflow's server works in a process of its own, which ends with the session.
        command = [RAYNIUM, "ui", "quickstart", "--root", f"{root}/runs", "--port", found[1]]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        try:
            assert server.stdout is not None
            page = server.stdout.readline().decode().split()[-1]
            wait_for_server(page, server)
            words = "document.body.innerText"
            shown(page, "", until=f"{words}.includes('train/loss')", height=940, picture=asked.folder / "mlflow.png")
            charts = "document.querySelectorAll('.js-plotly-plot .scatterlayer').length >= 9"
            shown(page, "/model-metrics", until=charts, height=1500, picture=asked.folder / "mlflow-charts.png")
        finally:
            kill_started([server])


def wait_for_server(page: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(page, timeout=5).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "raynium ui did not start"
            time.sleep(0.2)


if __name__ == "__main__":
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    main()
