"""Importing it makes uploads take parts of S3's least size, so that a shard of some megabytes takes several.

`_agent_process.py` has the template preload it: the uploader is forked from there.
"""

import raynium.storage.s3_store

raynium.storage.s3_store.PART_BYTES = 5 * 2**20
