"""``odewei verify``: whether a checkpoint is whole."""

from __future__ import annotations

from pathlib import Path

import click

from odewei.cli.common import json_option, print_json, progress_console, result_console

__all__ = ["command"]


@click.command("verify")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--sums",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A list as sha256sum writes it, with every file of the checkpoint.  [default: what is kept beside the files]",
)
@click.option("--no-sums", is_flag=True, help="Look at headers and spans only.")
@click.option("--write-sums", "writes", is_flag=True, help="Make the SHA256SUMS of a checkpoint that has none.")
@json_option
@click.pass_context
def command(context: click.Context, path: Path, sums: Path | None, no_sums: bool, writes: bool, as_json: bool) -> None:
    """Check every header and span of a checkpoint and, where sums are known, every byte.

    PATH is what open_checkpoint takes: a file of weights, an index, a folder. Sums are looked for in SHA256SUMS and in
    the cache of the Hugging Face hub; without them, archives (.pt, .npz) have those of their entries. The exit status
    is 1 if anything is wrong.
    """
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from odewei.tools.verify import verify, write_sums

    if sum((sums is not None, no_sums, writes)) > 1:
        raise click.UsageError("--sums, --no-sums and --write-sums exclude each other")
    console = progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("headers", total=None)

        def on_progress(file: Path, done: int, nbytes: int) -> None:
            progress.update(task, description=escape(file.name), completed=done, total=nbytes)

        if writes:
            target = write_sums(path, on_progress=on_progress)
        else:
            chosen = None if no_sums else "beside" if sums is None else sums
            report = verify(path, sums=chosen, on_progress=on_progress)
    if writes:
        if as_json:
            print_json({"path": str(path), "sums": str(target)})
        else:
            click.echo(f"wrote {target}")
        return
    if as_json:
        print_json(report.as_dict())
    else:
        result_console().print(str(report), markup=False, soft_wrap=True)
        if report.unsummed and not no_sums:
            click.echo(f"{len(report.unsummed)} of {len(report.files)} files have no sum to compare with", err=True)
    context.exit(0 if report.ok else 1)
