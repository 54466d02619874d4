"""The ``trueweight`` command: one launcher, each room brings its own commands.

Commands are entry points of the group ``trueweight.commands``; a room is imported only when its
command is used, so that ``trueweight receipt`` does not wait for an inference engine to import.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import click

from trueweight.protos.errors import TrueweightError
from trueweight.runtime.cli import ENV_PREFIX

GROUP = "trueweight.commands"
_INTERRUPTED = 130


class _Rooms(click.Group):
    """A group whose commands are entry points, loaded when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(point.name for point in importlib.metadata.entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        points = importlib.metadata.entry_points(group=GROUP, name=cmd_name)
        for point in points:
            try:
                command = point.load()
            except ImportError as error:
                return _unavailable(cmd_name, error)
            return command if isinstance(command, click.Command) else None
        return None


def _unavailable(name: str, error: ImportError) -> click.Command:
    """Stands in for a command whose room cannot be imported: says why when it is used."""

    def refuse(**_: Any) -> None:
        raise TrueweightError(
            f"'trueweight {name}' is not available: {error}.",
            hint="Install what is missing (see README), then try again.",
        )

    return click.Command(
        name,
        callback=refuse,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        short_help="Not available: a package is missing.",
    )


@click.command(cls=_Rooms, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    importlib.metadata.version("trueweight"),
    message=f"trueweight %(version)s (Python {platform.python_version()}, {platform.machine()})",
)
def cli() -> None:
    """An inference market in which the weights are honest.

    Every option (but 'ledger settle --paid') has an environment twin, shown by --help.
    """


def _line(error: TrueweightError) -> str:
    """What is wrong, then what to do."""
    hint = f" — {error.hint}" if error.hint else ""
    return f"error [{error.code}]: {error.message}{hint}"


def run(arguments: list[str] | None = None) -> int:
    """Runs one command line; the exit code. Errors become one clear line on stderr."""
    try:
        result = cli.main(
            arguments, "trueweight", standalone_mode=False, auto_envvar_prefix=ENV_PREFIX
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return _INTERRUPTED
    except TrueweightError as error:
        click.echo(_line(error), err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader went away (a pager, head); what is left in the buffer must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A file or address that cannot be used; the traceback would say no more.
        where = f" {error.filename!r}" if error.filename else ""
        click.echo(f"error [OS]: cannot use{where}: {error.strerror or error}", err=True)
        return os.EX_IOERR
    # Without standalone mode click hands back ctx.exit's code, or what the command returned.
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run())
