"""`polytropo completion`: the script that teaches a shell the command line."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Example:
      polytropo completion bash > /etc/bash_completion.d/polytropo
    """
    from click.shell_completion import get_completion_class

    from polytropo.cli.failures import PROGRAM
    from polytropo.cli.main import cli
    from polytropo.cli.quick import COMPLETE_VARIABLE

    kind = get_completion_class(shell)
    assert kind is not None
    if shell == "bash":
        # click's own check starts a bash to ask its version, which the reader of the script knows better.
        source = kind.source_template % kind(cli, {}, PROGRAM, COMPLETE_VARIABLE).source_vars()
    else:
        source = kind(cli, {}, PROGRAM, COMPLETE_VARIABLE).source()
    click.echo(source)
