"""The first table is that of the committed reports, and what the pages name exists."""

import re
import runpy
import sys

import pytest
from pages import PAGES, README, RESULTS, ROOT, report_of
from scipy import stats


@pytest.fixture(scope="module")
def front_page():
    sys.path.append(str(ROOT / "studies"))
    return runpy.run_path(str(ROOT / "studies" / "front_page.py"))


def test_the_first_table_is_the_committed_reports(front_page):
    """Every row as studies/front_page.py writes it, no other; the commands of all are in docs/results.md, in this order."""
    table = README[README.index("| question |") :].partition("\n\n")[0].splitlines()[2:]
    found = front_page["entries"]()
    assert table == [front_page["row"](entry) for entry in found] and len(table) >= 5
    commands = RESULTS[RESULTS.index("## The commands") :].partition("```sh\n")[2].partition("```")[0].splitlines()
    assert commands == list(dict.fromkeys(command for entry in found for command in entry["commands"]))


def test_a_row_is_what_its_report_says(front_page):
    """The writer itself, against the cells: means, interval and verdict of each row."""
    for entry, (_, _, directories, names) in zip(front_page["entries"](), front_page["ROWS"], strict=True):
        reports = [report_of(directory) for directory in directories]
        (endpoint,) = {report["endpoint"] for report in reports}
        key, factor, more = {"best": ("best_val_loss", 1, False), "last": ("val_loss", 1, False), "top1": ("top1", 100, True)}[endpoint]
        cells = [(name, cell) for report in reports for name, arm in report["arms"].items() for cell in arm["cells"]]
        a, b = ({cell["seed"]: factor * cell[key] for arm, cell in cells if arm == name} for name in names)
        assert a.keys() >= b.keys() and len(b) == entry["n"]
        a = {seed: a[seed] for seed in b}
        test = stats.ttest_1samp([b[seed] - a[seed] for seed in b], 0)
        low, high = test.confidence_interval(0.95)
        assert entry["interval"] == pytest.approx([low, high]) and entry["mean"] == pytest.approx((low + high) / 2)
        assert [of["mean"] for of in entry["arms"]] == pytest.approx([sum(arm.values()) / len(arm) for arm in (a, b)])
        better = low > 0 if more else high < 0
        assert front_page["verdict"](entry) == ("better" if better else "undecided" if low <= 0 <= high else "worse")


def test_no_committed_result_names_a_path_of_the_machine_it_was_made_on():
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in (".json", ".md"):
            assert not re.search(r"/(tmp|work|root|home)/", path.read_text(encoding="utf-8")), path


def test_every_directory_of_results_is_in_their_list():
    listed = re.findall(r"\[(\w[^]]*)\]\(\1\)", PAGES["results/README.md"])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


def test_the_readme_stays_a_first_page():
    """Details belong in docs/."""
    assert len((ROOT / "README.md").read_bytes()) < 16_000


def anchors(page: str) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_file_it_links_or_runs_exists(name):
    """Links and pictures from the page's own directory, files of commands from the root."""
    page, here = PAGES[name], (ROOT / name).parent
    links = re.findall(r"\]\(([^)]+)\)", page) + re.findall(r'src="([^"]+)"', page)
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = here / file if file else ROOT / name
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))):
            missing.append(link)
    scripts = re.findall(r"(?<![\w/])(?:(?:config|data|studies|tests)/[\w/]+\.py|(?<=python )\w+\.py)", page)
    missing += [script for script in scripts if not (ROOT / script).is_file()]
    assert missing == []
    assert name != "README.md" or (len(links) > 15 and len(scripts) > 10)


def test_every_page_is_linked_from_the_first():
    assert all(f"]({name})" in README or f"]({name}#" in README for name in PAGES if name != "README.md")
