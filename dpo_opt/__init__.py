"""dpo-opt: score preference pairs once under the frozen reference, then train without it in memory."""

from importlib.metadata import version

__version__ = version("dpo-opt")
