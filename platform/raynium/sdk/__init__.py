"""The Python SDK: submit a run to a cluster and look at it. Importing it loads neither torch, ray nor mlflow.

from raynium import Client

run = Client("http://127.0.0.1:8265").submit("jobs/configs/quickstart.yaml", overrides={"train.steps": 200})
for text in run.follow():
    print(text, end="")
run.wait()
run.dataframe("train/loss", "eval/bits_per_byte")
"""

from raynium.sdk.client import Client, build_data
from raynium.sdk.run import Run, find_run, list_runs

__all__ = ["Client", "Run", "build_data", "find_run", "list_runs"]
