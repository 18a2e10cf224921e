"""What the readers of this directory share: how they begin, the one argument, and the report.json in it."""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import InputError, TrainConfig, one_line_errors, quit_on_interrupt

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
        what = "one directory" if most == 1 else f"{least} directories or more" if least > 1 else "directories"
        named = f", not {' '.join(arguments)}" if arguments else ""
        raise InputError(f"name {what} with a report.json of compare.py{named}: {doc.splitlines()[0].partition(': ')[2]}")
    found = []
    for path in (Path(argument) / "report.json" for argument in arguments):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is not there: name a directory with a report.json of compare.py") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({type(error).__name__})") from None
    return found


def read_report(arguments: list[str], doc: str) -> tuple[Path, dict]:
    """The same of one."""
    return read_reports(arguments, doc)[0]


def recipe_of(config: dict) -> dict:
    """What of a report's configuration makes a run what it is; keys for which the report is too old have their defaults. Raises TypeError."""
    from compare import HARMLESS

    whole = json.loads(json.dumps(dataclasses.asdict(TrainConfig()))) | config
    return {key: value for key, value in whole.items() if key not in HARMLESS}


def unlike(recipes: list[dict]) -> str:
    """The keys, in words, by which recipes differ; empty where they do not."""
    keys = set().union(*recipes)
    return ", ".join(sorted(key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)))


def runs_of(table: dict) -> set[tuple[str, str]]:
    """(arm, seed) of a table {arm: {seed: ...}}, with the seeds in the arm's "seeds" or "losses" if it has such, or of one whose "arms" are so."""
    return {(name, str(seed)) for name, arm in table.get("arms", table).items() for seed in arm.get("seeds", arm.get("losses", arm))}


def write_table(folder: Path, name: str, found: dict, text: str):
    """FOLDER/NAME.json with `found`, as `runs_of` reads it, and FOLDER/NAME.md with `text`, and says so.

    Raises InputError, and writes nothing, where a table is there that has runs which this one lacks.
    """
    from dataset import write_file

    path = folder / f"{name}.json"
    try:
        lost = sorted(runs_of(json.loads(path.read_text(encoding="utf-8"))) - runs_of(found))
    except FileNotFoundError:
        lost = []
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        raise InputError(f"{path} is there and is no table of this script: remove it first") from None
    if lost:
        example = "{} on seed {}".format(*lost[0])
        raise InputError(f"{path} has {len(lost)} run(s) that this one lacks, as {example}: name all directories that it was made from, or remove it")
    write_file(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    write_file(path.with_suffix(".md"), (text.rstrip("\n") + "\n").encode())
    print(text.rstrip("\n"), "", f"{path.with_suffix('.md')}, {path.name}", sep="\n")


def run(main):
    """main(arguments of the command line); an InputError ends the process in one line and status 2, Ctrl-C in one line and 130."""
    quit_on_interrupt()
    with one_line_errors():
        main(sys.argv[1:])
