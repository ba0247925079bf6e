"""The workloads that the bench comes with: the one that decides, and those that compression does not help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """pool_share: of the documents, held exactly by the KV pool. clients: questions under way at once."""

    text: str
    documents: int
    tokens: int
    questions: int
    pool_share: float
    clients: int = 4


CASES = {
    "thrash": Case("many documents, of which the pool holds a fifth exactly", 30, 1024, 8, 0.2),
    "fits": Case("the pool holds all documents exactly, twice", 6, 1024, 8, 2.0),
    "one": Case("one document", 1, 1024, 24, 4.0),
    "short": Case("documents that are shorter than --obcache-min-tokens, and stay exact", 30, 224, 4, 0.2),
}

SCALING_DOCUMENTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of documents that --scaling goes through, with one length."""

SCALING_TOKENS = (512, 1024, 2048, 4096, 8192)
"""Lengths that --scaling goes through, with one number of documents."""
