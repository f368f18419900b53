"""Print a script that completes the command line in bash, zsh or fish.

bash, in ~/.bashrc:                     eval "$(mythos completion bash)"
zsh, in ~/.zshrc, after compinit:       eval "$(mythos completion zsh)"
fish, once:                             mythos completion fish > ~/.config/fish/completions/mythos.fish

The script contains the commands and options of this version; completing does not start mythos.
"""

import argparse

from mythos.cli.common import command_parser
from mythos.config.loading import packaged_configs
from mythos.errors import import_optional

SHELLS = ("bash", "zsh", "fish")
# Metavars of arguments, by what completes them.
CONFIGS = ("CONFIG", "CONFIG_or_PRESET")
FILES = ("FILE", "GLOB", "PATH", "RUN_OR_CHECKPOINT", "MODEL")
FOLDERS = ("DIR", "FOLDER", "RUN")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the script. Raises MythosError like :func:`script`."""
    print(script(options.shell))


def script(shell: str) -> str:
    """Write the completion script of a shell. Raises MythosError if shtab is not installed."""
    shtab = import_optional("shtab", "mythos completion")
    from mythos import cli  # which imports this module

    names = " ".join(packaged_configs())
    config = {"bash": "_mythos_configs", "zsh": "_mythos_configs", "fish": "(_mythos_configs)"}
    functions = {
        "bash": f'_mythos_configs() {{\n  compgen -W "{names}" -- "$1"\n  _shtab_compgen_files "$1"\n}}',
        "zsh": f"_mythos_configs() {{\n  compadd {names}\n  _files\n}}",
        "fish": f"function _mythos_configs\n    string split ' ' '{names}'\n"
        "    __fish_complete_path (commandline -ct)\nend",
    }
    root = cli.parser()
    (commands,) = (action for action in root._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            for metavars, completer in ((CONFIGS, config), (FILES, shtab.FILE), (FOLDERS, shtab.DIRECTORY)):
                if action.metavar in metavars:
                    action.complete = completer
    return shtab.complete(root, shell=shell, preamble=functions)
