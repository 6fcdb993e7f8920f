"""How the program leaves."""

import subprocess
import sys

import pytest

# Taking the interpreter apart drops the modules, and with them torch's threads: what then runs is the abort.
PROGRAM = """
import os, sys, types
from dpo_opt import __main__ as program

class Engine:
    def __del__(self, abort=os.abort):
        abort()

def main(prog_name):
    sys.modules["torch"] = types.ModuleType("torch")
    sys.modules["torch"].engine = Engine()
    sys.modules["torch"].itself = sys.modules["torch"]
    print("said last")
    {end}

program.main = main
program.run()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(75)", 75),
        ("sys.exit(0)", 0),
        ("sys.exit()", 0),
        ("sys.exit('wrong')", 1),
        ("raise KeyError", 1),
    ],
)
def test_the_exit_code_is_the_commands_whatever_an_engine_does_at_the_end(end: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (code, "said last\n"), ended.stderr
