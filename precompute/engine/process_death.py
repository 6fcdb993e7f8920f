"""The death of an engine's own process, noticed: vLLM's client would wait for its answers for ever.

vLLM marks such an engine as dead, but tells nobody who waits already (seen in 0.32).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def death_is_noticed(engine: Any) -> Iterator[None]:
    """While the block waits for an ``LLM``, its death is among the answers, which raises there.

    Engines in this process have no such queue of answers, and need none.
    """
    client = getattr(getattr(engine, "llm_engine", None), "engine_core", None)
    answers, state = getattr(client, "outputs_queue", None), getattr(client, "resources", None)
    if answers is None or state is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            if getattr(state, "engine_dead", False):
                answers.put(RuntimeError("the engine's process died"))
                return

    threading.Thread(target=watch, daemon=True, name="dpo-opt-engine-death").start()
    try:
        yield
    finally:
        over.set()
