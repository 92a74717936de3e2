"""What a Ray job's driver knows of its job."""

import json
import os

# Ray sets this for a job's driver (ray/_private/ray_constants.py); its metadata holds the submission id.
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# In the metadata of a job that a supervisor submits.
SUPERVISED = "raynium.supervised"


def job_metadata() -> dict[str, str]:
    """Inside a Ray job's driver: what was submitted with it, and its `job_submission_id`. Empty elsewhere."""
    return json.loads(os.environ.get(JOB_CONFIG_VARIABLE, "{}")).get("metadata", {})


def is_supervised() -> bool:
    """Inside a Ray job's driver: whether a supervisor has submitted it."""
    return SUPERVISED in job_metadata()
