"""Notices when an engine's process dies; vLLM's client would wait for its answers forever.

vLLM marks such an engine as dead, but does not tell a client that is already waiting (seen in 0.32).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def death_is_noticed(engine: Any) -> Iterator[None]:
    """While the block waits for an ``LLM``, put an error into its queue of answers if its process dies.

    An engine inside this process has no such queue and needs none.
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
