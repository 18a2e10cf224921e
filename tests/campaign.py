"""The long campaign of faults: python tests/campaign.py [--minutes=10] [--seed=1] [--only=NAME,NAME]

Every fault of faults.py gets its share of the time, and its least number of tries however long they take. A long run of short steps goes on beside
all the others. At the end comes a table: fault, tries, survived. The exit status is 1 if anything was lost; what was lost is told at once, and
its files are kept.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import faults
from tabulate import tabulate

# share of the time, and the least number of tries in a campaign of ten minutes (a shorter one has proportionally fewer, one at least)
PLAN = {
    faults.kills_in_training: (22, 120),
    faults.kills_in_comparison: (12, 40),
    faults.kills_in_preparation: (6, 40),
    faults.kills_of_the_command_line: (8, 10),
    faults.kills_of_reports: (4, 6),
    faults.sigterms: (10, 30),
    faults.full_disks: (8, 15),
    faults.bad_disks: (8, 20),
    faults.damaged_checkpoints: (3, 300),
    faults.damaged_last: (3, 6),
    faults.damaged_data: (2, 300),
    faults.divergence: (4, 9),
    faults.dying_ranks: (5, 3),
    faults.locks: (2, 2),
    faults.odd_command_lines: (4, 1000),
    faults.odd_sources: (3, 60),
    faults.hostile_files: (4, 40),
}
STEPS = 280_000  # of the long run: two hours at the 26 ms a step of config/quick.py
LONG_RUN = "long_run"  # --only=long_run runs it to its end


class LongRun:
    """The long run; `look` takes a sample of its memory and its open files."""

    def __init__(self, folder: Path):
        self.folder, self.samples, self.looked = folder, [], 0.0
        self.child = faults.long_run(folder, STEPS)

    def look(self):
        if self.child.process.is_alive() and self.child.marks[3] > 100 and time.monotonic() > self.looked + 1:
            self.samples.extend(faults.resources(self.child))
            self.looked = time.monotonic()


def campaign(minutes: float, seed: int, only: list[str], folder: Path) -> tuple[list[list], bool]:
    """Runs the plan; returns the rows of the table and whether all was survived."""
    plan = {fault: share for fault, share in PLAN.items() if not only or fault.__name__ in only}
    rows, good = [], True
    long = LongRun(folder / "long_run")
    for fault, (share, least) in plan.items():
        seconds, least = 60 * minutes * share / sum(share for share, _ in plan.values()), max(1, round(least * min(1, minutes / 10)))
        counts, lost, tries, attempt, began = collections.Counter(), collections.Counter(), 0, 0, time.monotonic()
        generator = None
        while tries < least or time.monotonic() < began + seconds:
            place = folder / f"{fault.__name__}-{attempt}"
            if generator is None:
                place.mkdir(parents=True)
                generator = fault(place, random.Random(f"{seed} {fault.__name__} {attempt}"))
            try:
                counts[next(generator)] += 1
            except StopIteration:  # there is nothing here to try it on
                break
            except Exception:  # AssertionError for a loss; anything else is no less of one
                print(f"LOST in {fault.__name__}, files in {place}:\n{traceback.format_exc()}", flush=True)
                lost[fault.__name__] += 1
                generator, attempt = None, attempt + 1
                if lost.total() >= 5:
                    break
            tries += 1
            long.look()
        if generator is not None:
            generator.close()
            shutil.rmtree(place, ignore_errors=True)
        rows += [[kind, count, count] for kind, count in sorted(counts.items())]
        rows += [[f"{name}: LOST", count, 0] for name, count in lost.items()]
        good = good and not lost
        print(f"{fault.__name__}: {tries} tries, {lost.total()} lost, {time.monotonic() - began:.0f} s", flush=True)
    while long.child.process.is_alive() and (LONG_RUN in only or len(long.samples) < 20):  # to its end, or a short campaign of few faults
        time.sleep(0.5)
        long.look()
    try:
        rows.append([f"a long run: {faults.finish_long_run(long.child, long.folder, long.samples)}", 1, 1])
    except Exception:
        print(f"LOST in the long run, files in {long.folder}:\n{traceback.format_exc()}", flush=True)
        rows.append(["a long run: LOST", 1, 0])
        good = False
    return rows, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long, about")
    parser.add_argument("--seed", type=int, default=1, help="of all random choices; moments in time differ all the same")
    parser.add_argument("--only", default="", help="names of faults.py, comma-separated")
    parser.add_argument("--folder", default="", help="where the files of the tries are; empty: a temporary folder")
    given = parser.parse_args()
    only = given.only.split(",") if given.only else []
    names = [fault.__name__ for fault in PLAN] + [LONG_RUN]
    unknown = set(only) - set(names)
    if unknown or not 0 < given.minutes < 10_000:
        print(f"error: --only={given.only} or --minutes={given.minutes}: names are {', '.join(names)}", file=sys.stderr)
        return 2
    folder, began = Path(given.folder or tempfile.mkdtemp(prefix="campaign-")).resolve(), time.monotonic()
    rows, good = campaign(given.minutes, given.seed, only, folder)
    tries, survived = (sum(row[i] for row in rows) for i in (1, 2))
    print("\n" + tabulate([*rows, ["**all**", tries, survived]], ["fault", "tries", "survived"], tablefmt="github", disable_numparse=True))
    kills = sum(row[1] for row in rows if row[0].startswith("kill -9"))
    print(f"\n{kills} of them kill -9; seed {given.seed}, {(time.monotonic() - began) / 60:.1f} minutes")
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
