"""`--backend` and the options of the installed back ends, which are known when a command is parsed, not before."""

from __future__ import annotations

from typing import Any

import click

from flcompress.command_group import Command
from flcompress.errors import RequestError


class BackendName(click.ParamType[str]):
    """The name of an installed back end."""

    name = "backend"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return all names."""
        from flcompress.core.registry import known_backends

        return f"[{'|'.join(known_backends())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; RequestError, with the nearest one, where no back end has it."""
        from flcompress.core.registry import known_backends, nearest

        if value not in (known := known_backends()):
            raise RequestError(f"--backend: {value} given, expected an installed one; {nearest(value, known)}")
        return value


class BackendCommand(Command):
    """A command that runs back ends: every field of an installed one is an option, and reaches it in `options`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own options, then those of the back ends."""
        params = super().get_params(ctx)
        flags = self._flags(ctx, params)
        return [*params[:-1], *flags.values(), params[-1]]  # --help stays the last

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with the options of the command line alone."""
        values = {name: ctx.params.pop(name) for name in self._flags(ctx, [])}
        ctx.params["options"] = {name: value for name, value in values.items() if value is not None}
        return super().invoke(ctx)

    def _flags(self, ctx: click.Context, own: list[click.Parameter]) -> dict[str, click.Option]:
        """Return the options of the back ends, the same objects while a command is parsed and run."""
        flags: dict[str, click.Option] = ctx.meta.setdefault(__name__, {})
        if own and not flags:
            flags.update(_flags_of_backends({param.name for param in own if param.name}))
        return flags


def _flags_of_backends(taken: set[str]) -> dict[str, click.Option]:
    from flcompress.runtime.backends.options import flag, known_options, values_of

    flags: dict[str, click.Option] = {}
    for name, kinds in known_options().items():
        if name in taken:
            raise RequestError(
                f"backend {kinds[0].name}: option {flag(name)} given, but that is one of the command's own; rename the "
                "field"
            )
        field, switch = kinds[0].model_fields[name], kinds[0].model_fields[name].annotation is bool
        whose = ", ".join(kind.name for kind in kinds)
        flags[name] = click.Option(
            [f"{flag(name)}/{flag(f'no_{name}')}" if switch else flag(name), name],
            default=None,
            metavar=None if switch else "VALUE",
            help=f"Backend {whose}: {field.description}" + ("." if switch else f" ({values_of(field)})."),
        )
    return flags
