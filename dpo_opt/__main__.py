"""``python -m dpo_opt``: the same as the ``dpo-opt`` script."""

from dpo_opt.cli import main

main(prog_name="dpo-opt")
