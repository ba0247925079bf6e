"""SGLang's server with a folder of contexts on a slow disk:  python -m tests.serving.slow_disk <flags of the server>

As in `faulty`, each process that SGLang starts imports this module again.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from typing import Any

SECONDS_A_LAYER = 0.25


def _slow_down() -> None:
    from obcache_sglang.kv.files import Writer

    as_ever = Writer.layer

    @functools.wraps(as_ever)
    def layer(self: Writer, *args: Any, **kwargs: Any) -> None:
        time.sleep(SECONDS_A_LAYER)
        as_ever(self, *args, **kwargs)

    Writer.layer = layer  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    _slow_down()

if __name__ == "__main__":
    assert multiprocessing.parent_process() is None
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
