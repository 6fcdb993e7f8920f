"""Commands of dpo-opt, run within the process of a test."""

import json
from typing import Any

from click.testing import CliRunner, Result

from dpo_opt.cli import main


def invoke(*words: object) -> Result:
    """Run a command; whatever happens, nobody sees a traceback."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


def printed(*words: object) -> str:
    """What a command prints that must succeed."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def result_of(*words: object) -> Any:
    """The result of a command that must succeed, as ``--json`` prints it."""
    return json.loads(printed(*words, "--json"))
