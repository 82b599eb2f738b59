"""The compiled part of branch and bound: lower bounds on groups of plans, and the best plan of a chain of heads.

What takes long releases Python's lock, so that threads can share the work: loops that numba shares out take it twice as
long to compile. `compiled` says where the compiled code is stored.
"""

from __future__ import annotations

from mess_compile.cores import wait_without_spinning
from mess_compile.search.bnb.kernels import chains, leaves, pairs, sums, triples
from mess_compile.search.bnb.kernels.compiled import compiled_once

wait_without_spinning()

additions = compiled_once(sums.additions)
differences = compiled_once(sums.differences)
envelope = compiled_once(sums.envelope)
remainder = compiled_once(sums.remainder)
bound_pairs = compiled_once(pairs.bound_pairs)
bound_triples = compiled_once(triples.bound_triples)
bound_chains = compiled_once(chains.bound_chains)
evaluate_chains = compiled_once(leaves.evaluate_chains)
mean_iou = compiled_once(leaves.mean_iou)
keeps_classes = compiled_once(leaves.keeps_classes)
