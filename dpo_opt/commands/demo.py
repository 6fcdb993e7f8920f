"""Teach a small real model to write kinder film reviews.

It takes a few minutes on a CPU.
"""

from pathlib import Path

import click

from dpo_opt.schemas.errors import quoted


@click.command(help=__doc__)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="Folder for everything the demo makes.",
)
def command(output_dir: Path) -> None:
    from dpo_opt.demo import demo
    from dpo_opt.explained_errors import going_on_by
    from dpo_opt.preemption import same_command

    # What a demo left half done is no demo's to go on with.
    with going_on_by(lambda: f"rm -r {quoted(output_dir)} && {same_command()}"):
        demo(output_dir)
