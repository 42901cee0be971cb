# SPDX-License-Identifier: Apache-2.0
"""All workloads, in the order of the table."""

from __future__ import annotations

from workloads.chase import Chase
from workloads.gather import Gather
from workloads.kvcache import KvCache
from workloads.matmul import Matmul
from workloads.outofcore import Random, Sequential
from workloads.pagerank import PageRank
from workloads.sort import Sort
from workloads.transformer import Transformer
from workloads.triad import Triad
from workloads.workload import Workload

WORKLOADS: dict[str, type[Workload]] = {
    each.name: each
    for each in (Triad, Matmul, Gather, PageRank, Chase, Sort, KvCache, Transformer, Sequential, Random)
}


def make(name: str, quick: bool) -> Workload:
    return WORKLOADS[name](quick)  # type: ignore[call-arg]
