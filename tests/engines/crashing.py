"""A builder that crashes, apart from the tests: each process that builds imports it, and should import little else."""

from __future__ import annotations

import os
import signal

from mess_compile.engines import build as building
from mess_compile.engines.build import EngineEntry

BROKEN = "head-exit1.fcn-crm4-b2-rdi"


def dies_at_one(job: building._Job) -> EngineEntry:
    if job.graph == BROKEN:
        os.kill(os.getpid(), signal.SIGSEGV)
    return EngineEntry(job.graph, "fp32", job.key, "", 0, 0.0, (), None)
