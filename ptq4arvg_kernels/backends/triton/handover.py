"""Work that several thread blocks share in one launch: each stores what it found, the last one to arrive goes on.

Memory order. (1) The threads of a block store to global memory (weak stores), then meet at a barrier. (2) One thread
adds 1 to the counter with ``acq_rel`` at the scope of the GPU. Barriers and releases are cumulative in the PTX memory
model: the stores of the whole block happen before the reads of whoever sees this addition. (3) Triton hands the old
value to the other threads through shared memory and a barrier: the loads of the block that came last happen after its
acquire, hence after the stores of all others. They must bypass L1 (``cache_modifier=".cg"``), where a line of an
earlier kernel could still live. (4) That block sets the counter back to 0 for the next launch on the stream, which the
end of the kernel orders.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrived_last(counter, parts):
    """Whether this block is the last of ``parts`` to come here; ``counter``: int32 that they share, 0 before the launch
    and after it. Called once per block, after its stores."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == parts - 1
    if last:
        tl.store(counter, 0)
    return last
