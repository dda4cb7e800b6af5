"""The command `shoal`: finds its subcommands, runs one, ends with an exit code that says how.

A distribution adds subcommands by entry points of the group `shoal.commands`, each a click command
in a module that is cheap to import: whatever is heavy is imported in the command's body, so that
`shoal --help` stays fast and needs no extra. This module imports click and nothing else of weight.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points

import click

from agent.protocol.errors import ExitCode, ShoalError

COMMANDS = "shoal.commands"

EXTRA_OF_MODULE = {
    "tensorflow": "exporter",
    "keras": "exporter",
    "networkx": "exporter",
    "sklearn": "exporter",
    "flatbuffers": "exporter",
    "tflite_micro": "exporter",
    "PIL": "exporter",
    "dask": "dask",
    "distributed": "dask",
    "serial": "firmware",
    "amqtt": "demo-broker",
}
"""Which extra of the distribution brings a module that is not in the base install."""


class ShoalGroup(click.Group):
    """A group whose commands are looked up in entry points, and whose errors have exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands, sorted; loads none of them."""
        return sorted({*self.commands, *_registered()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one subcommand."""
        if cmd_name not in self.commands:
            registered = _registered().get(cmd_name)
            if registered is None:
                return None
            command = registered.load()
            if not isinstance(command, click.Command):
                raise TypeError(f"entry point {registered.value!r} is not a click command")
            self.add_command(command, cmd_name)
        return self.commands[cmd_name]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that the arguments name; for a misspelt one, says which was meant."""
        name, known = args[0], self.list_commands(ctx)
        if name in known or name.startswith("-"):
            return super().resolve_command(ctx, args)
        if not known:
            raise ShoalError(
                "no subcommand is registered: this copy of shoal is not installed",
                "run in its folder: pip install -e .",
            )
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise click.UsageError(f"no command {name!r}; {hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line of help a command; for one that cannot be loaded, what it needs."""
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
            except ModuleNotFoundError as error:
                missing = _missing_extra(error)
                rows.append((name, f"({missing or error})"))
                continue
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(300)))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand. Every way to fail ends in a message on stderr and an exit code."""
        try:
            result: object = super().invoke(ctx)
        except ShoalError as error:
            _say(f"error: {error.message}")
            if error.hint is not None:
                _say(f"  hint: {error.hint}")
            code = error.exit_code
        except (KeyboardInterrupt, click.Abort):
            _say("interrupted")
            code = ExitCode.INTERRUPTED
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            # Whoever read our output has seen enough, as in `shoal sub | head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = ExitCode.DONE
        except Exception as error:
            missing = _missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
            if missing is not None:
                _say(f"error: `shoal {ctx.invoked_subcommand}` {missing}")
                code = ExitCode.INPUT
            else:
                traceback.print_exc()
                _say("This is a bug in shoal. Please report it, with the lines above.")
                code = ExitCode.BUG
        else:
            return result
        ctx.exit(int(code))


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=COMMANDS)}


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """What a command needs whose extra is not installed; None if a missing module is a bug."""
    extra = EXTRA_OF_MODULE.get(error.name or "")
    if extra is None:
        return None
    return f"needs {error.name}, which is not installed: pip install 'shoal[{extra}]'"


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.group(cls=ShoalGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shoal", prog_name="shoal")
def main() -> None:
    """One neural network inference, spread over many small devices."""
