"""Print a script that completes the command line in bash, zsh or fish.

bash, in ~/.bashrc:                     eval "$(mythos completion bash)"
zsh, in ~/.zshrc, after compinit:       eval "$(mythos completion zsh)"
fish, once:                             mythos completion fish > ~/.config/fish/completions/mythos.fish

The script is fixed: it knows the commands and options of this version, and costs nothing when a command runs.
"""

import argparse

from mythos.cli.common import CommandParser, exit_status
from mythos.errors import import_optional

SHELLS = ("bash", "zsh", "fish")
CONFIGS = ("CONFIG", "CONFIG_or_PRESET")
FILES = ("FILE", "GLOB", "PATH", "RUN_OR_CHECKPOINT", "MODEL")
FOLDERS = ("DIR", "FOLDER", "RUN")
"""What arguments are completed with, by what help calls them."""


def parser(prog: str = "mythos completion") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("shell", choices=SHELLS, help="the shell")
    return made


def main(arguments: list[str], prog: str = "mythos completion") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: print(script(options.shell)))


def script(shell: str) -> str:
    """The script for a shell, of all commands as they are now."""
    shtab = import_optional("shtab", "mythos completion")
    from mythos.cli import parser as whole
    from mythos.config.loading import packaged_configs

    names = " ".join(packaged_configs())
    config = {"bash": "_mythos_configs", "zsh": "_mythos_configs", "fish": "(_mythos_configs)"}
    functions = {
        "bash": f'_mythos_configs() {{\n  compgen -W "{names}" -- "$1"\n  _shtab_compgen_files "$1"\n}}',
        "zsh": f"_mythos_configs() {{\n  compadd {names}\n  _files\n}}",
        "fish": f"function _mythos_configs\n    string split ' ' '{names}'\n"
        "    __fish_complete_path (commandline -ct)\nend",
    }
    made = whole()
    (commands,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            for metavars, kind in ((CONFIGS, config), (FILES, shtab.FILE), (FOLDERS, shtab.DIRECTORY)):
                if action.metavar in metavars:
                    action.complete = kind
    return shtab.complete(made, shell=shell, preamble=functions)
