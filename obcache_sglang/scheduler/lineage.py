"""What of a context or a prompt is compressed already: its beginning, with other boundaries, where prompts move them, and with other ratios."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

from obcache_sglang.kv.context import Context, Namespace
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.settings import CompressionSettings


def longest_prefix(
    cache: ContextCache, namespace: Namespace, settings: Sequence[CompressionSettings], tokens: array[int]
) -> Context | None:
    """The longest context, compressed with one of these settings, that `tokens` starts with and goes on after.

    settings: without boundaries and exact tokens, which contexts may have.
    """
    best: Context | None = None
    for context in cache:
        length = context.num_tokens
        if (
            context.is_made
            and length < len(tokens)
            and (best is None or length > best.num_tokens)
            and context.namespace == namespace
            and context.begins(tokens)
            and replace(context.settings, boundaries=(), exact_segments=0, exact_tokens=0) in settings
        ):
            best = context
    if best is not None:
        cache.used(best)
    return best


def find_again(cache: ContextCache, context: Context, settings: Sequence[CompressionSettings]) -> Context | None:
    """The same tokens as a context's, compressed with one of these settings, which are the same in every call (`ServerSettings.rungs`).

    What is in host memory is found where neither the context nor anything else is nearer.
    """
    if context.rungs is None:
        context.rungs = [cache.identity(context.namespace, each, context.tokens, context.judges) for each in settings]
    known = [found for identity in context.rungs if (found := cache.get(identity)) is not None]
    found = next(filter(cache.is_resident, known), None)
    if found is None and not cache.is_on_host(context):
        found = next(filter(cache.is_on_host, known), None)
    if found is not None:
        cache.used(found)
    return found


def known_settings(
    cache: ContextCache, namespace: Namespace, settings: CompressionSettings, tokens: array[int]
) -> CompressionSettings:
    """The settings for a context whose prompt has boundaries, as far as its tokens are compressed already with the same ones.

    Clients move their boundaries: what ended a turn is not named any more in the turn after the next. What is compressed up to one of the
    boundaries, or the end, counts then, with the boundaries that it was made with; they are a part of what the context is.
    """
    own = settings.within(len(tokens), cache.page_size)
    if not own.boundaries:
        return own
    ends = {each: own.within(each, cache.page_size) for each in (*own.boundaries, len(tokens))}
    found = []
    for context in list(cache):
        length = context.num_tokens
        wanted = ends.get(length)
        if (
            wanted is not None
            and context.namespace == namespace
            and context.begins(tokens)
            and _apart_from_segments(context.settings) == _apart_from_segments(wanted)
            and _has_in_order(context.settings.segment_ratios, wanted.segment_ratios)
            and cache.has(context)
        ):
            found.append((length, context.settings == wanted, context.id, context))
    # The longest; of several, its own, else always the same one.
    for length, _, _, context in sorted(found, key=lambda each: each[:3], reverse=True):
        rest = tuple(each for each in own.boundaries if each > length)
        ratios = (*context.settings.segment_ratios, *own.segment_ratios[-1 - len(rest) :])
        joined = replace(own, boundaries=(*context.settings.boundaries, length, *rest), segment_ratios=ratios)
        joined = joined.within(len(tokens), cache.page_size)
        if length == len(tokens) or length in joined.boundaries:
            cache.used(context)
            return context.settings if length == len(tokens) else joined
    return own


def _apart_from_segments(settings: CompressionSettings) -> CompressionSettings:
    """What must be the same where the boundaries are not."""
    ratio = 0.0 if settings.segment_ratios else settings.compression_ratio
    return replace(settings, boundaries=(), segment_ratios=(), compression_ratio=ratio)


def _has_in_order(ratios: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether these ratios are among a context's, in their order: it may have more segments than a prompt still names."""
    left = iter(ratios)
    return bool(ratios) == bool(wanted) and all(any(ratio == each for each in left) for ratio in wanted)


def compressed_otherwise(
    cache: ContextCache, context: Context, rungs: Callable[[CompressionSettings], list[CompressionSettings]]
) -> list[Context]:
    """Contexts that the ladder has made of the same tokens, or of which it has made this one. rungs: `ServerSettings.rungs`."""
    whose, mine = (context.namespace, context.tokens, context.judges), context.settings
    return [
        each
        for each in cache
        if each is not context
        and each.num_tokens == context.num_tokens
        and (each.namespace, each.tokens, each.judges) == whose
        and (each.settings in rungs(mine) or mine in rungs(each.settings))
    ]
