"""What a context is: a keyed hash of whose it is, how it is compressed, and its tokens."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence

from obcache_sglang.kv.context import Context, Namespace
from obcache_sglang.settings import CompressionSettings


def context_id(
    namespace: Namespace, settings: CompressionSettings, tokens: array[int], judges: Sequence[int] = (), *, secret: bytes = b""
) -> str:
    """What a context is, in 32 hexadecimal digits: a hash, equal in every process that has the server's `secret`.

    Without the secret nobody can compute it, so a name in a list does not tell whether a guessed text is the context's.
    """
    digest = _digest(namespace, settings, judges, secret)
    digest.update(tokens.tobytes())
    return digest.hexdigest()


def _digest(namespace: Namespace, settings: CompressionSettings, judges: Sequence[int], secret: bytes) -> hashlib.blake2b:
    """The hash of a context's identity, before its tokens."""
    head = json.dumps([namespace.extra_key, namespace.cache_salt, namespace.lora_id, settings.fingerprint(), *judges])
    key = hashlib.blake2b(head.encode("utf-8", "surrogatepass"), key=secret).digest()
    return hashlib.blake2b(digest_size=16, key=key)


def beginnings(context: Context, page_size: int, *, secret: bytes = b"") -> list[tuple[int, str]]:
    """The tokens and ids of the shorter contexts that a context is compressed after, segment by segment, ascending. Reads each token once for every boundary."""
    starts = context.settings.segment_starts(context.num_tokens, page_size)
    if not starts:
        return []
    found: list[tuple[int, str]] = []
    digest, settings, first = None, context.settings, 0
    for start in starts:
        own = context.settings.within(start, page_size)
        if digest is None or own != settings:
            digest, settings, first = _digest(context.namespace, own, (), secret), own, 0
        digest.update(context.tokens[first:start].tobytes())
        found.append((start, digest.copy().hexdigest()))
        first = start
    return found
