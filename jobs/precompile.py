r"""Fill the compile cache before a run: `python jobs/precompile.py CONFIG [key=value …]`, the same as for the run.

ray job submit --runtime-env cluster/runtime_env.yaml -- \
    python jobs/precompile.py jobs/configs/llama3-8b.yaml run.root=s3://bucket/runs
"""

from raynium.launch.precompile import main

if __name__ == "__main__":
    main()
