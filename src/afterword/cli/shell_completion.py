"""`afterword completion`: scripts for bash, zsh and fish, and the completion of model names.

Click's scripts for bash and fish are replaced: bash splits words at the colons in model names, and click's fish script
splits descriptions at commas.
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
    # Bash replaces only the text after the last colon, so the text before it is removed from each value.
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
        """Split the line up to the cursor. Bash's own words end at colons."""
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
    """Print a script for completion with the Tab key.

    It completes commands, options, their values, and the models on this machine.

    \b
    Examples:
      afterword completion bash > ~/.afterword.bash    # source it in ~/.bashrc
      afterword completion zsh > ~/.zfunc/_afterword   # a folder of $fpath
      afterword completion fish > ~/.config/fish/completions/afterword.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "afterword", _VARIABLE).source())


def complete_model(ctx: click.Context, _: click.Parameter, typed: str) -> Items:
    """Complete the names of installed models and GGUF files. If none begins with `typed`, complete other files."""
    from afterword.models.registry import installed

    try:
        names = [model.spec for model in installed()]
    except (AfterwordError, OSError):  # completion cannot show errors
        names = []
    matches = [name for name in names if name.startswith(typed)] + _gguf_files(typed)
    return [CompletionItem(name) for name in matches] or [CompletionItem(typed, type="file")]


def _gguf_files(typed: str) -> list[str]:
    folder, slash, start = typed.rpartition("/")
    path = Path(folder + slash).expanduser()
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return []
    return [folder + slash + name for name in names if name.startswith(start) and name.lower().endswith(".gguf")]
