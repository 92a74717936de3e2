r"""Train what a job file says: `python jobs/train.py CONFIG [key=value …]`, on the Ray cluster that runs this job.

ray job submit --runtime-env cluster/runtime_env.yaml -- \
    python jobs/train.py jobs/configs/quickstart.yaml train.steps=50
"""

from raynium.launch.jobs import main

if __name__ == "__main__":
    main()
