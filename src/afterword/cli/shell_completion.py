"""`afterword completion`: the shell's Tab key knows commands, options, what options take, and the models that are here.

The scripts for bash and fish are our own: bash cuts words at the colons that are in models' names, and fish's
descriptions have commas.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from afterword.errors import AfterwordError

Items = list[CompletionItem[str]]

_VARIABLE = "_AFTERWORD_COMPLETE"
_BASH = """\
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} kind value typed kept=
    typed=${line##*[[:space:]]}
    typed=${typed##*=}
    # Bash replaces what follows the last colon, so what comes before it is not said again.
    [[ $COMP_WORDBREAKS == *:* && $typed == *:* ]] && kept=${typed%%"${typed##*:}"}
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$(printf %%q "${value#"$kept"}")") ;;
        esac
    done < <(COMP_WORDS=$line COMP_CWORD= %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_FISH = """\
function %(complete_func)s
    set -lx %(complete_var)s fish_complete
    set -lx COMP_WORDS (commandline -cp)
    set -lx COMP_CWORD (commandline -ct)
    for line in (command %(prog_name)s)
        set -l parts (string split --max 1 , -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case plain
                echo $parts[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


@add_completion_class
class _Bash(BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """From the line up to the cursor, since bash's own words end at colons."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        typed = "" if line[-1:].isspace() else words.pop()
        return words[1:], typed


@add_completion_class
class _Fish(FishComplete):
    source_template = _FISH


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes the Tab key complete.

    It knows commands, options, what they take, and the models on this machine.

    \b
    Examples:
      afterword completion bash > ~/.afterword.bash    # to source in ~/.bashrc
      afterword completion zsh > ~/.zfunc/_afterword   # a folder of $fpath
      afterword completion fish > ~/.config/fish/completions/afterword.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "afterword", _VARIABLE).source())


def complete_model(ctx: click.Context, _: click.Parameter, typed: str) -> Items:
    """Models that are on this machine, and GGUF files; if neither begins so, whatever files there are."""
    from afterword.models.registry import installed

    try:
        names = [model.spec for model in installed()]
    except (AfterwordError, OSError):  # a shell has no place for it
        names = []
    found = [name for name in names if name.startswith(typed)] + _gguf_files(typed)
    return [CompletionItem(name) for name in found] or [CompletionItem(typed, type="file")]


def _gguf_files(typed: str) -> list[str]:
    folder, slash, start = typed.rpartition("/")
    place = Path(folder + slash).expanduser()
    try:
        names = sorted(os.listdir(place))
    except OSError:
        return []
    return [folder + slash + name for name in names if name.startswith(start) and name.lower().endswith(".gguf")]
