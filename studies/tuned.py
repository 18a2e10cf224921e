"""Each arm at its best learning rate: python studies/tuned.py results/imagenet16_rates

Reads report.json of a comparison that has every arm at several rates, "config/x.py --learning_rate=1e-3", and prints one line per arm, for the next
command line: the arm at the rate with the best mean of the endpoint. Rates with a run that diverged are not chosen. An arm whose best rate is the
largest or the smallest tried gets a note on stderr, with the rate to try next.
"""

import math
import re
import shlex
import sys

from reports import read_report, run

from configurator import InputError, split_arguments

RATE = re.compile(r"\s--learning[_-]rate[= ]\S+")


def spelled(rate: float) -> str:
    """As the studies write rates: 1e-3, 1.6e-2."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def read_rates(report: dict) -> dict[str, dict[float, float]]:
    """{arm without its rate: {rate: mean of the endpoint, turned so that more is better; nan where a run diverged}}. Raises InputError."""
    from report import ENDPOINTS

    found = {}
    try:
        _, key, _, sign = ENDPOINTS[report["endpoint"]]
        command, configs = report["provenance"]["command"], report["provenance"]["configs"]
        texts, _ = split_arguments(shlex.split("" + command)[2:])  # "" +: a string, or TypeError
        for text, (name, arm) in zip(texts, report["arms"].items(), strict=True):
            rates = found.setdefault(RATE.sub("", text), {})
            rate = configs[name]["learning_rate"] + 0.0
            rates[rate] = math.nan if arm["diverged"] else sign * (arm[key]["mean"] + 0.0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the report is not one of compare.py ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError("the report has no arms")
    return found


def best_rates(report: dict) -> tuple[list[str], list[str]]:
    """(arms at their best rates, notes on those at the edge). Raises InputError."""
    arms, notes = [], []
    for arm, rates in read_rates(report).items():
        good = [rate for rate, mean in rates.items() if not math.isnan(mean)]
        if len(rates) < 2:
            raise InputError(f"arm {arm!r} has one rate, {spelled(*rates)}: nothing to choose from")
        if not good:
            raise InputError(f"every rate of arm {arm!r} has a run that diverged: try smaller ones")
        best = max(good, key=rates.get)
        arms.append(f"{arm} --learning_rate={spelled(best)}")
        if best in (min(rates), max(rates)):
            factor, which = (2, "largest") if best == max(rates) else (0.5, "smallest")
            notes.append(f"{arm}: its best rate {spelled(best)} is the {which} tried; next: {arm} --learning_rate={spelled(factor * best)}")
    return arms, notes


def main(arguments: list[str]):
    """Raises InputError."""
    _, report = read_report(arguments, __doc__)
    arms, notes = best_rates(report)
    print(*arms, sep="\n")
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)


if __name__ == "__main__":
    run(main)
