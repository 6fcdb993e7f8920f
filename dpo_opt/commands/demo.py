"""Teach a small real model to write kinder film reviews.

It takes a few minutes on a CPU.
"""

from pathlib import Path

import click


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

    demo(output_dir)
