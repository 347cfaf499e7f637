"""Set-up shared by all tests: one thread per process, and hypothesis without a deadline."""

import os

# Several test processes share the cores; more threads than cores make small operators many times slower. The variables
# must be in place before torch starts its thread pool.
THREADS = os.environ.get("PTQ4ARVG_TEST_THREADS", "1")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, THREADS)
# Tests with more threads than free cores: a thread that waits by spinning holds up the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(THREADS))

# A shared machine makes any deadline flaky. The default profile tries the same examples on every run, so that a failure
# belongs to a change; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
