"""Raynium trains large language models on Ray clusters of AWS Trainium nodes, and on CPU and CUDA machines.

Importing it loads none of torch, ray and mlflow.
"""

from raynium.errors import RayniumError
from raynium.sdk import Client, Run, build_data, find_run, list_runs

__all__ = ["Client", "RayniumError", "Run", "build_data", "find_run", "list_runs"]
