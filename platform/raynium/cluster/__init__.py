"""Clusters on EC2: the files that `ray up` reads and the policies beside them, rendered from the hardware catalogue."""
