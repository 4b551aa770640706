"""How much of a tensor may be held decoded between a pass over it and its merge.

A rule by sizes alone, so that a plan can say beforehand what will be read twice.
"""

from __future__ import annotations

from typing import Final

from mergepipe.merge.job import Job

MOST_HELD_BYTES: Final = 192 << 20  # of one tensor: the reference's and all experts' blocks
ALL_HELD_BYTES: Final = 256 << 20  # of all tensors in work together


def held_bytes(job: Job) -> int:
    """At most what a tensor's decoded inputs take. Virtual blocks are computed anew and not held."""
    return job.reference.nbytes + sum(entry.nbytes for entry in job.experts)


def fits_in_memory(job: Job) -> bool:
    """Whether the inputs of a tensor are held between a pass and the merge."""
    return held_bytes(job) <= MOST_HELD_BYTES
