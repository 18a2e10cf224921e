"""What the readers of this directory share: how they begin, the one argument, and the report.json in it."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import InputError, one_line_errors, quit_on_interrupt

# of the barrier study, named before its runs: the gains, the first of which selects, and what they may cost in per cent of the clean loss
ENDPOINTS, COST = ("noise 1 RMS", "attack 0.1, 10 steps"), 1.7


def read_reports(arguments: list[str], doc: str, least: int = 1, most: int = 1) -> list[tuple[Path, dict]]:
    """The directories that the arguments name, each with its report. --help prints `doc`, whose first line ends in the usage, and exits.

    Raises InputError.
    """
    if {"--help", "-h"} & set(arguments):
        print(doc)
        raise SystemExit
    if not least <= len(arguments) <= most or any(argument.startswith("-") for argument in arguments):
        what = "one directory" if most == 1 else "directories"
        raise InputError(f"name {what} with a report.json of compare.py: {doc.splitlines()[0].partition(': ')[2]}")
    found = []
    for path in (Path(argument) / "report.json" for argument in arguments):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({type(error).__name__})") from None
    return found


def read_report(arguments: list[str], doc: str) -> tuple[Path, dict]:
    """The same of one."""
    return read_reports(arguments, doc)[0]


def run(main):
    """main(arguments of the command line); an InputError ends the process in one line and status 2, Ctrl-C in one line and 130."""
    quit_on_interrupt()
    with one_line_errors():
        main(sys.argv[1:])
