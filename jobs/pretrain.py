r"""Pretrain a language model: `python jobs/pretrain.py CONFIG [key=value …]`, on the Ray cluster that runs this job.

ray job submit --runtime-env cluster/runtime_env.yaml -- \
    python jobs/pretrain.py jobs/configs/quickstart.yaml train.steps=50
"""

from raynium.launch.jobs import main

if __name__ == "__main__":
    main()
