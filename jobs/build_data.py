r"""Tokenise text: `python jobs/build_data.py STORE --from SOURCE …`, on the Ray cluster that runs this job.

ray job submit --runtime-env cluster/runtime_env.yaml -- \
    python jobs/build_data.py s3://bucket/data/web --from 's3://bucket/web/*.jsonl.zst' --tokenizer s3://bucket/qwen3
"""

import sys

from raynium.cli.app import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "build"]
    main()
