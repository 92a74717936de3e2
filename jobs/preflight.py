r"""Check nodes for a job file: `python jobs/preflight.py CONFIG [key=value …]`, on the Ray cluster that runs this job.

ray job submit --runtime-env cluster/runtime_env.yaml -- python jobs/preflight.py jobs/configs/llama3-8b.yaml
"""

from raynium.launch.run_preflight import main

if __name__ == "__main__":
    main()
