#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Man pages and shell completion, made of the argument parsers of elfprobe.py and elfplot.py.

$ python3 packaging/pages.py MANUALS BASH ZSH SHARE

The first three are folders for the files: man8/elfprobe.8 and so on, completions for bash and for zsh. SHARE is the
folder that the man pages refer to. They say what --help says, so a new option needs nothing here. Only if its value
can be completed, KINDS may need a line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Iterator

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
sys.argv[0] = "elfprobe"  # the name in the texts
for package in "bcc", "numpy", "matplotlib":  # take long, and no help needs them
    sys.modules[package] = None  # type: ignore[assignment]

import elfplot  # noqa: E402
import elfprobe  # noqa: E402
from elf.cache import CACHE  # noqa: E402
from elf.options import argument_parser  # noqa: E402

SECTIONS = {"elfprobe": 8, "elfplot": 1}
# Name of a value -> what completes it, if anything: arguments of bash's compgen; an action of zsh's _arguments.
# Anybody may name a process $(command). The single quotes keep compgen from running such a name, and grep leaves it
# out, since bash would put it into the line as it is.
KINDS = {
    "INTERFACE": ("-W '$(ls /sys/class/net)'", "_net_interfaces"),
    "APP": ("-W '$(ps -eo comm= | grep -xE \"[[:alnum:]_.-]+\")'", "_process_names -a"),
    "PID": ("-W '$(ps -eo pid=)'", "_pids"),
    "address": ("-A hostname", "_hosts"),
    "FILE": ("-f", "_files"),
    "FILEBASE": ("-f", "_files"),
    "CSV": ("-f -X '!*.csv' -o plusdirs", '_files -g "*.csv"'),
}


class Program:
    """A program as its parser describes it."""

    def __init__(self, name: str, module: ModuleType, parser: argparse.ArgumentParser) -> None:
        self.name = name
        self.parser = parser
        self.summary = (module.__doc__ or "").splitlines()[0].rstrip(".")

    def options(self) -> Iterator[argparse.Action]:
        """Yield the options."""
        return (action for action in self.parser._actions if action.option_strings)

    def positional(self) -> argparse.Action:
        """Return the argument that is no option: each program has one."""
        return next(action for action in self.parser._actions if not action.option_strings)

    def help_text(self, action: argparse.Action) -> str:
        """Return what --help says of an argument."""
        return (action.help or "") % {**vars(action), "prog": self.name}


def value_name(action: argparse.Action) -> str:
    """Return what --help calls the value of an argument; empty if it takes none."""
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    return str(action.metavar or (choices if action.choices else action.dest.upper()))


def choices_of(action: argparse.Action) -> list[str]:
    """Return the values that an argument may have; empty if they are not a few words."""
    name = value_name(action)
    return name[1:-1].split(",") if name.startswith("{") else []


# ---- Man pages -----------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Return a text for groff: hyphens that are typed, and no line that could be a request."""
    text = text.replace("\\", "\\(rs").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def entry(head: str, text: str) -> str:
    """Return an entry of a list: its head in bold, and a text, which may follow later."""
    return f".TP\n.B {roff(head)}\n" + (f"{roff(text)}\n" if text else "")


def sections(epilog: str) -> Iterator[str]:
    """Yield the sections of a man page that the end of --help becomes.

    Each paragraph begins with a title and a colon. A text follows, or a list. A line of the list is: two spaces, a
    term, two spaces or more, its explanation. The explanation may go on in lines that begin with more spaces.
    """
    for paragraph in epilog.strip().split("\n\n"):
        title, text = paragraph.split(":", 1)
        title, _, about = title.partition(", ")
        yield f".SH {roff(title.upper())}\n" + (f"{roff(about[0].upper() + about[1:])}:\n" if about else "")
        for line in text.strip("\n").splitlines():
            found = re.fullmatch(r"  (\S.*?)(?: {2,}(.*))?", line)
            yield entry(found[1], found[2] or "") if found else f"{roff(line.strip())}\n"


def man_page(program: Program, share: str) -> str:
    """Return the page, for man(7)."""
    parser, name = program.parser, program.name
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    section = SECTIONS[name]
    parts = [
        f'.TH {name.upper()} {section} "{date}" "elfprobe {elfprobe.VERSION}"\n',
        f".SH NAME\n{name} \\- {roff(program.summary[0].lower() + program.summary[1:])}\n",
        f".SH SYNOPSIS\n.B {roff(parser.usage or '')}\n",
        f".SH DESCRIPTION\n{roff(parser.description or '')}\n".replace("\n\n", "\n.PP\n"),
        ".SH OPTIONS\n",
    ]
    for action in [program.positional(), *program.options()]:
        value = value_name(action)
        head = ", ".join(action.option_strings) + (" " if action.option_strings and value else "") + value
        parts.append(entry(head, program.help_text(action)))
    parts += sections(parser.epilog) if parser.epilog else []
    parts.append(".SH FILES OF THE PROGRAM\n")
    if name == "elfprobe":
        parts += [
            entry(f"{share}/elfprobe/elfhooks.c", "default of -H: copy it, and change the copy"),
            entry(CACHE, "compiled programs and modules for the next start; may be deleted at any time"),
        ]
    parts.append(entry(f"{share}/doc/elfprobe", "README.md and docs/"))
    other = next(one for one in SECTIONS if one != name)
    parts.append(f".SH SEE ALSO\n.BR {other} ({SECTIONS[other]})\n")
    return "".join(parts)


# ---- Completion ----------------------------------------------------------------------------------


def kind_of(action: argparse.Action) -> tuple[str, str]:
    """Return how bash and zsh complete a value; empty if they do not."""
    words = " ".join(choices_of(action))
    return (f"-W '{words}'", f"({words})") if words else KINDS.get(value_name(action), ("", ""))


BASH = """\
# bash completion of {name}; packaging/pages.py has made it.
_{name}() {{
    local i how word=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD - 1]}}
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} == -- ]] || continue
        for how in _comp_command_offset _command_offset; do  # of bash-completion
            declare -F "$how" >/dev/null && "$how" $((i + 1)) && return
        done
        mapfile -t COMPREPLY < <(compgen -c -- "$word")
        return
    done
    # In --option=value, = is a word.
    [[ $word != = ]] || word=
    [[ $option != = ]] || option=${{COMP_WORDS[COMP_CWORD - 2]}}
    case $option in
{cases}        *)
            if [[ $word == -* ]]; then
                mapfile -t COMPREPLY < <(compgen -W '{options}' -- "$word")
            else
                {positional}
            fi
            ;;
    esac
}}
complete -F _{name} {name}
"""
BASH_FILES = "compopt -o filenames; "


def bash_completion(program: Program) -> str:
    """Return the file for bash, which needs bash-completion only for what follows --."""

    def reply(how: str) -> str:
        files = BASH_FILES if how.startswith("-f") else ""
        return f'{files}mapfile -t COMPREPLY < <(compgen {how} -- "$word")' if how else ":"

    cases = ""
    for action in program.options():
        if value_name(action):
            cases += f"        {' | '.join(action.option_strings)}) {reply(kind_of(action)[0])} ;;\n"
    return BASH.format(
        name=program.name,
        cases=cases,
        options=" ".join(option for action in program.options() for option in action.option_strings),
        positional=reply(kind_of(program.positional())[0]),
    )


ZSH = """\
#compdef {name}
# packaging/pages.py has made it.
local at=${{words[(i)--]}}
if ((at < CURRENT)); then  # the command behind it
    words=("${{(@)words[at + 1, -1]}}")
    ((CURRENT -= at))
    _normal
    return
fi
_arguments -s -S \\
{options}    {positional}
"""


def zsh_completion(program: Program) -> str:
    """Return the file for zsh."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def value(action: argparse.Action) -> str:
        name = action.dest if choices_of(action) else value_name(action).replace(":", "\\:")
        return f":{name}:{kind_of(action)[1]}" if value_name(action) else ""

    options = ""
    for action in program.options():
        brief = re.split(r"[;(:]", program.help_text(action))[0].strip()
        brief = re.sub(r"([][\\])", r"\\\1", brief)
        again = isinstance(action, argparse._AppendAction)
        for flag in action.option_strings:
            before = "*" if again else f"({' '.join(action.option_strings)})"
            joined = ("=" if flag.startswith("--") else "+") if value_name(action) else ""
            options += f"    {quoted(f'{before}{flag}{joined}[{brief}]{value(action)}')} \\\n"
    many = "*" if program.positional().nargs == "*" else ""
    return ZSH.format(name=program.name, options=options, positional=quoted(many + value(program.positional())))


def main(manuals: str, bash: str, zsh: str, share: str) -> None:
    """Write all files; the folders are made."""
    for program in (
        Program("elfprobe", elfprobe, argument_parser()),
        Program("elfplot", elfplot, elfplot.argument_parser()),
    ):
        section = SECTIONS[program.name]
        for path, text in (
            (Path(manuals, f"man{section}", f"{program.name}.{section}"), man_page(program, share)),
            (Path(bash, program.name), bash_completion(program)),
            (Path(zsh, f"_{program.name}"), zsh_completion(program)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
