"""The report of an evaluation: its content, the escaping of texts from outside, and its display in a browser."""

import dataclasses
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ref.evaluation.report.charts import DOT, Axis, bar_chart, difference_chart, position_chart
from ref.evaluation.report.content import Charts, KeyFigures, Text, format_signed, report_sections
from ref.evaluation.report.escaping import clean, escape_markdown
from ref.evaluation.report.leaderboard import ScoreTable, borda_ranks, read_public_scores
from ref.evaluation.report.page import STYLE
from ref.evaluation.report.write import COMPARED_MODELS, REFERENCE_MODEL, Report, TaskResult, write_report

ROOT = Path(__file__).parents[2]
CHROMIUM = Path("/usr/bin/chromium")
EVIL = """<script>alert("1")</script>'><img src=x onerror=alert(2)> | `x` **b** [a](javascript:3) <!-- \x00\u202e"""
VOID = {"meta", "wbr", "line", "rect", "circle"}


def results(model=REFERENCE_MODEL, *, shift=0.0, every=1):
    """A public model's scores as the results of a run."""
    public = read_public_scores()
    scores = public.score_ME[public.row(model)]
    return [
        TaskResult(task, category, "accuracy", float(score) + shift, f"Instruction of {task}.", number % 3,
                   "the training split" if number % 3 else "", seconds=2.0 + number, tokens=1000 * number)
        for number, (task, category, score) in enumerate(zip(public.tasks, public.categories, scores, strict=True))
    ][::every]


def make_report(tasks=None, **changes):
    """A report on all tasks, or on the given results."""
    known = {"model": "ours", "date": "2026-09-01", "tasks": results() if tasks is None else tasks,
             "versions": {"mteb": "2.26.24", "torch": "2.11.0"}}
    return Report(**{**known, **changes})


def write(report, folder, **options):
    """Write the report and return the texts of both files."""
    paths = write_report(report, folder, **options)
    assert [path.name for path in paths] == ["report.html", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md"]
    return [path.read_text(encoding="utf-8") for path in paths]


class Reader(HTMLParser):
    """Collects the tags, attributes and texts of a page and the cells of its tables; checks that tags are closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.rows, self.open, self.words = set(), set(), [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def markdown_rows(text):
    """The table cells of a Markdown file, as rendered."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not re.fullmatch(r"[| :-]+", line)]
    return [[plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def plain(cell):
    """Remove bold, backslashes and entities."""
    return html.unescape(re.sub(r"\\(.)", r"\1", re.sub(r"^\*\*(.*)\*\*$", r"\1", cell)))


def table_of(rows, first):
    """The rows from the one whose first cell is `first`."""
    start = next(number for number, row in enumerate(rows) if row[0] == first)
    return rows[start:]


# ---- content -------------------------------------------------------------------------------------------------


def test_a_complete_run(tmp_path):
    """Key figures, the evaluated model among the compared ones, scores and prompts of all tasks."""
    page, text = write(make_report(), tmp_path)
    for value in ("74.12", "68.40", "41 of 41"):
        assert value in page and value in text
    rows = markdown_rows(text)
    assert ["Borda rank", "6", "among 324 public models and this one, on all tasks"] in rows
    means = table_of(rows, "Model")
    assert means[0][:4] == ["Model", "Borda rank", "Mean (Task)", "Mean (TaskType)"] and len(means[0]) == 11
    assert {row[0] for row in means[1:9]} == {*COMPARED_MODELS, "ours (this run)"}
    assert means[2][:4] == ["ours (this run)", "6", "74.12", "68.40"]
    assert next(row for row in means if row[0] == "BAAI/bge-en-icl")[2] == "–"  # 25 of the 41 tasks
    assert ["ArguAna", "Instruction of ArguAna.", "0", "–"] in rows
    assert ["BIOSSES", "Instruction of BIOSSES.", "1", "the training split"] in rows
    assert ["mteb", "2.26.24"] in rows and "f4cc6c8b365a3c779dbc708d6affe0b0355b2ddf" in text
    assert "higher in 0 tasks, lower in 0, equal in 41" in text
    assert "Partial" not in text and "Not compared" not in text and "Not evaluated" not in text
    assert "unofficial" not in text


def test_both_files_hold_the_same_tables(tmp_path):
    """Cell by cell, except the key figures, which are a list in the page."""
    partial = results(shift=-1.5, every=3)
    partial[2] = dataclasses.replace(partial[2], official=False)
    for number, report in enumerate([make_report(), make_report(partial, failed={"STS12": "it | broke"},
                                                                 missing=["STS13"])]):
        page, text = write(report, tmp_path / str(number))
        rows = [row for row in Reader(page).rows if row]
        assert len(rows) > 40 and rows == [row for row in markdown_rows(text) if len(row) != 3 or row in rows]
        visible = html.unescape(re.sub(r"<[^>]+>", "\n", page))
        figures = next(block for block in report_sections(report)[0].blocks if isinstance(block, KeyFigures))
        for name, value, remark in figures.rows:
            assert f"| {name} | {value} | {remark} |" in text and value in visible and remark in visible


def test_a_partial_run(tmp_path):
    """Means and ranks are computed on its tasks only, and do not have the leaderboard's names."""
    tasks = results(shift=1, every=2)
    _, text = write(make_report(tasks, failed={"BIOSSES": "OSError: no disk"}, missing=["STS12"]), tmp_path)
    public = read_public_scores()
    columns = [public.tasks.index(row.task) for row in tasks]
    scores = np.concatenate([[[row.score for row in tasks]], public.score_ME[:, columns]])
    rank = borda_ranks(scores)
    assert "> Partial run: 20 of the 41 tasks" in text and "Mean (Task)" not in text and "Mean (TaskType)" not in text
    rows = markdown_rows(text)
    assert ["Mean of evaluated tasks", f"{scores[0].mean():.2f}", "over 21 tasks"] in rows
    assert ["Borda rank (partial)", str(rank[0]), f"among {np.count_nonzero(rank) - 1} public models and this one, on "
            "the evaluated tasks"] in rows
    assert ["BIOSSES", "failed: OSError: no disk"] in rows
    assert ["STS12", "selected, but no data found"] in rows
    rest = re.search(r"Not evaluated \((\d+)\): (.*)\.", text)
    assert set(rest[2].split(", ")) == set(public.tasks) - {row.task for row in tasks} - {"BIOSSES", "STS12"}
    assert int(rest[1]) == len(rest[2].split(", "))


def test_models_without_a_score_are_not_counted(tmp_path):
    """Of those that mteb does not know, in a run of one task."""
    _, text = write(make_report([row for row in results() if row.task == "STS12"]), tmp_path)
    public = read_public_scores()
    scored_M = ~np.isnan(public.score_ME[:, public.tasks.index("STS12")])
    counted = int((scored_M & ~public.registered_M).sum())
    assert counted < int((~public.registered_M).sum()) and f"Included but not listed: {counted} models" in text


def test_unofficial_data_are_not_compared(tmp_path):
    """A task on unofficial data is not in the means and ranks; a run of such tasks has no comparison."""
    tasks = results()
    tasks[3] = dataclasses.replace(tasks[3], official=False, score=99.99)
    page, text = write(make_report(tasks), tmp_path / "one")
    assert [tasks[3].task, "99.99", "unofficial, not compared", tasks[3].category, "accuracy"] in markdown_rows(text)
    assert "> Data of unofficial origin (1 task): not compared" in text and "40 of 41" in text
    assert text.count("99.99") == 2  # the score and the mean of such tasks
    world = [TaskResult("IsleHome", "Retrieval", "ndcg_at_10", 95.95, "Find it.", official=False)]
    page, text = write(make_report(world), tmp_path / "none")
    assert "> Not compared with public scores: no task" in text
    assert "Borda" not in text + page and REFERENCE_MODEL not in text + page
    own = [TaskResult("SomethingElse", "STS", "cosine_spearman", -3.2, "Find it.")]
    _, text = write(make_report(own), tmp_path / "own")
    assert ["SomethingElse", "-3.20", "not in MTEB(eng, v2)", "STS", "cosine_spearman"] in markdown_rows(text)


def test_a_run_without_scores(tmp_path):
    page, text = write(make_report([], failed={"STS12": "broken"}), tmp_path)
    assert "No task has a score." in text and "No task has a score." in page and "STS12" in text


def test_unmeasured_and_total_time(tmp_path):
    """A cached result has no time; the total is that of the tasks with time and tokens."""
    measured = [(None, 5000), (2, 3000), (3, None)]
    tasks = [dataclasses.replace(row, seconds=seconds, tokens=tokens)
             for row, (seconds, tokens) in zip(results(every=20), measured, strict=True)]
    rows = markdown_rows(write(make_report(tasks), tmp_path)[1])
    names = [row.task for row in tasks]
    assert [row[1:] for row in table_of(rows, "Total of tasks with time and tokens")[:1]] == [["2.0", "3,000", "1,500"]]
    assert [names[0], "–", "5,000", "–"] in rows and [names[1], "2.0", "3,000", "1,500"] in rows
    nothing = [dataclasses.replace(row, seconds=None, tokens=None) for row in tasks]
    assert "Seconds" not in write(make_report(nothing), tmp_path / "nothing")[1]


def test_models_without_public_scores(tmp_path):
    """They are listed as not shown; the report is written."""
    report = make_report(compared_models=["nobody/nothing", REFERENCE_MODEL], reference_model="nobody/else")
    _, text = write(report, tmp_path)
    assert "Not in the table of public scores, therefore not shown: nobody/nothing, nobody/else." in text
    assert "Difference" not in text


def test_a_reference_model_without_all_tasks(tmp_path):
    page, text = write(make_report(reference_model="BAAI/bge-en-icl"), tmp_path)
    assert "16 without a score of BAAI/bge-en-icl" in text and "nan" not in (page + text).lower().replace("finance", "")


def test_bad_results_are_rejected_before_anything_is_written(tmp_path):
    twice = [*results(), results()[0]]
    for tasks, message in [(twice, "must have one result.*got 2"),
                           ([dataclasses.replace(results()[0], score=np.nan)], "must have a finite score.*got nan"),
                           ([dataclasses.replace(results()[0], score=1234)], "score of task .*got 1234")]:
        with pytest.raises(ValueError, match=message):
            write_report(make_report(tasks), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_are_written_atomically(tmp_path, monkeypatch):
    """With a full disk the old report stays, without remains of the new one."""
    before = write(make_report(), tmp_path)
    def full(path, text, **options):
        path.open("w").write(text[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match="No space"):
        write_report(make_report(model="other"), tmp_path)
    monkeypatch.undo()
    assert [(tmp_path / name).read_text() for name in ("report.html", "report.md")] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_imports():
    """Importing the report imports neither training nor loss nor mteb."""
    code = ("import sys, ref.evaluation.report.page, ref.evaluation.report.write; "
            "print([name for name in sys.modules if name.split('.')[0] in ('mteb', 'datasets') "
            "or '.'.join(name.split('.')[:2]) in ('ref.training', 'ref.loss')])")
    call = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert call.stdout.strip() == "[]"


# ---- texts from outside --------------------------------------------------------------------------------------


@pytest.fixture
def evil():
    """A report and a public table in which every text from outside is an attack."""
    real = read_public_scores()
    public = ScoreTable((EVIL, *real.models[1:]), (EVIL, *real.tasks[1:]), (EVIL, *real.categories[1:]),
                        real.registered_M, real.score_ME, EVIL)
    tasks = [TaskResult(EVIL, EVIL, EVIL, 50.0, EVIL, 2, EVIL, 1.0, 5),
             TaskResult(EVIL + "2", EVIL, EVIL, 50.0, EVIL, official=False),
             *(TaskResult(task, "STS", EVIL, 50.0, EVIL) for task in real.tasks[-3:])]
    return Report(EVIL, EVIL, tasks, {EVIL: EVIL}, {EVIL: EVIL + "\nnext\ud800"}, [EVIL], EVIL,
                  [EVIL, real.models[1], "x" + EVIL], EVIL), public


def test_texts_from_outside_are_escaped(tmp_path, evil):
    """The page has no tags and attributes beyond those of a harmless one, and shows the texts literally."""
    report, public = evil
    page, text = write(report, tmp_path, public=public)
    harmless = Reader(write(make_report(results(every=2), failed={"a": "b"}, note="n"), tmp_path / "harmless")[0])
    read = Reader(page)
    assert read.tags <= harmless.tags and read.attributes <= harmless.attributes and not read.open
    assert "script" not in read.tags and not any(name.startswith("on") for name in read.attributes)
    shown = "".join(read.words)
    assert shown.count('<script>alert("1")</script>') > 20 and "<script" not in page and "<img" not in page
    assert not re.search("[\x00-\x08\u202e]", page + text) and "\ufffd" in shown
    assert "<" not in text and not re.search(r"(?<!\\)[`\[]", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_page_has_no_scripts_and_loads_nothing(tmp_path):
    """No URL, no script, one file; the content security policy forbids both as well."""
    page = write(make_report(), tmp_path)[0]
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe|\ssrc=|\shref=", page)


def test_charts_have_a_text_alternative(tmp_path):
    """Each has its values in words."""
    page = write(make_report(results("Qwen/Qwen3-Embedding-8B")), tmp_path)[0]
    charts = re.findall(r"<svg [^>]*>", page)
    assert len(charts) == 2 + 9 + 2  # position and differences in two sizes
    assert all('role="img"' in head and re.search(r'viewBox="0 0 \d+ \d+"', head) for head in charts)
    assert "ArguAna: −10.10." in page and "ours (this run): 75.23." in charts[2]


def test_clean_escape_markdown_and_format_signed():
    assert clean(" a\n\tb\x07\u2066\udc80 ") == "a b\ufffd\ufffd\ufffd"
    assert escape_markdown("ndcg_at_10 _x_ a|b <i> & *") == r"ndcg_at_10 \_x\_ a\|b &lt;i&gt; &amp; \*"
    assert [format_signed(x) for x in (1.234, -0.001, 0.0, -2, np.nan)] == ["+1.23", "0.00", "0.00", "−2.00", "–"]


# ---- charts --------------------------------------------------------------------------------------------------


def test_bar_chart_by_hand():
    """The best first, NaN last, one bar highlighted; lengths in proportion; no bar below zero."""
    chart = bar_chart("t", [("ours", 50.0), ("a/b", 100.0), ("c", np.nan), ("d", -8.0)])
    assert chart.description == "a/b: 100.00. ours: 50.00. d: -8.00. c: –."
    widths = re.findall(r'<rect class="(\w+)" [^>]*width="([\d.]+)"', chart.narrow)
    assert widths == [("other", "148.0"), ("evaluated", "74.0"), ("other", "0.0"), ("other", "0.0")]


def test_position_chart_by_hand():
    """Dots in proportion, those of nearly equal scores above each other, two of them named."""
    chart = position_chart("t", ("ours", 60.0), ("a/b", 75.0), [50.0, 50.1, 60.0, 90.0])
    assert chart.description == ("ours: 60.00, position 3 of 6 by the mean. a/b: 75.00. Other models: 50.00 to 90.00, "
                                 "median 55.05.")
    dots = [(kind, float(x), float(y)) for kind, x, y in re.findall(
        r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', chart.narrow)]
    kinds, xs, ys = zip(*dots, strict=True)
    assert kinds == ("other",) * 4 + ("lower", "evaluated")
    assert xs[0] == xs[1] and ys[1] == ys[0] - DOT and xs[5] == xs[2] and ys[5] == ys[2] - DOT  # stacked
    assert (xs[0], xs[3]) == pytest.approx((8, 340 - 8), abs=DOT / 2)  # the lowest and the highest
    share = [(x - xs[0]) / (xs[3] - xs[0]) for x in xs]
    assert share == pytest.approx([0, 0, 0.25, 1, 0.625, 0.25], abs=DOT / 300)
    assert "b 75.00</text>" in chart.narrow and "ours 60.00</text>" in chart.narrow
    alone = position_chart("t", ("ours", 60.0), None, [])
    assert alone.description == "ours: 60.00, position 1 of 1 by the mean. " and "nan" not in alone.wide


def test_the_page_starts_with_the_model_among_the_public_ones(tmp_path):
    report = make_report(results(shift=-2, every=3), note="an example")
    blocks = report_sections(report)[0].blocks
    assert [type(block) for block in blocks[:3]] == [Text, Charts, KeyFigures]
    [chart] = blocks[1].charts
    scores = read_public_scores()
    columns = [scores.tasks.index(task.task) for task in report.tasks]
    means = scores.score_ME[:, columns].mean(1)
    own = float(np.mean([task.score for task in report.tasks]))
    known = means[~np.isnan(means)]
    assert chart.title == f"Mean, 14 of 41 tasks, {len(known)} public models and this one"
    assert chart.description.startswith(f"ours: {own:.2f}, position {(known > own).sum() + 1} of {len(known) + 1} by")
    page = write(report, tmp_path)[0]
    assert page.index("<circle") < page.index('<dl class="key-figures">')
    unofficial = [dataclasses.replace(task, official=False) for task in results()]
    assert "<circle" not in write(make_report(unofficial), tmp_path)[0]  # nothing to compare with


def test_difference_chart_by_hand():
    """Bars to both sides begin at zero; there is an axis even if all differences are 0."""
    chart = difference_chart("t", [("a", 2.0, "+2.00"), ("b", -2.0, "−2.00")])
    for drawing in (chart.narrow, chart.wide):
        higher, lower = re.findall(r'<rect class="\w+" x="([\d.]+)" y="\d+" width="([\d.]+)"', drawing)
        assert float(lower[0]) + float(lower[1]) == pytest.approx(float(higher[0]), abs=0.11) and higher[1] == lower[1]
    assert "nan" not in difference_chart("t", [("a", 0.0, "0.00")]).wide
    assert Axis(-14.2, 10.1, 0, 1).ticks() == [-10, -5, 0, 5, 10] and len(Axis(-100, 90, 0, 1).ticks()) <= 6
    assert Axis(-2, 2, 0, 100).position(1) == 75


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """WCAG 2: 7 for text, 4.5 for muted text, 3 for bars."""
    def luminance(colour):
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)
    style = STYLE.split("@media (prefers-color-scheme: dark)")[scheme == "dark"]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", style))
    for background in ("background", "card", "highlight", "notice"):
        assert contrast(colours["text"], colours[background]) >= 7
    assert all(contrast(colours["muted"], colours[background]) >= 4.5 for background in ("background", "card"))
    assert all(contrast(colours[bar], colours["background"]) >= 3 for bar in ("evaluated", "other", "lower"))


# ---- in a browser --------------------------------------------------------------------------------------------

LONG = "a-name-without-end-" * 12 + "W" * 200
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0;width:WIDTHpx;height:900px" srcdoc="PAGE"></iframe><pre id="found"></pre><script>
document.getElementById("f").onload = event => {
  const page = event.target.contentDocument, wide = [], hidden = [];
  for (const node of page.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect(), scrolls = node.closest(".scroll");
    if (box.right > WIDTH + 0.5 && (!scrolls || scrolls === node)) wide.push(node.tagName + "." + node.className);
  }
  const found = {width: page.documentElement.scrollWidth, wide: wide,
    boxes: [...page.querySelectorAll(".scroll")].map(node => node.scrollWidth > node.clientWidth),
    shown: [...page.querySelectorAll("svg")].filter(node => node.getBoundingClientRect().width > 0).length,
    letters: Math.min(...[...page.querySelectorAll("svg text")].map(node => node.getBoundingClientRect().height)
      .filter(height => height)),
    scripts: page.scripts.length};
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


def browse(tmp_path, *options):
    """Run headless Chromium with a profile of its own; return its output."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def probe(tmp_path, page, width):
    """Measure a page in a frame of the given width."""
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)))
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "probe.html").as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.fixture
def browser():
    if not CHROMIUM.is_file():
        pytest.skip(f"needs {CHROMIUM} (apt-get install --no-install-recommends chromium)")


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("kind", ["complete", "long", "evil"])
def test_the_page_fits_a_phone_and_a_desktop(tmp_path, kind, evil, width):
    """Tables scroll in their container, everything else fits, text in charts is legible."""
    long = [TaskResult(LONG[n:], LONG, LONG, 50.0, LONG, 1, LONG, 1e9, 10**15, official=n > 0) for n in range(2)]
    long_report = make_report([*results(every=4), *long], model=LONG, date=LONG, note=LONG, failed={LONG: LONG},
                              versions={LONG: LONG})
    report, public = {"complete": (make_report(note="n"), None), "long": (long_report, None), "evil": evil}[kind]
    page = write(report, tmp_path / "out", public=public)[0]
    found = probe(tmp_path, page, width)
    assert found["width"] == width and not found["wide"], found
    assert (any(found["boxes"]) or width > 360) and found["scripts"] == 0 and found["letters"] >= 10


@pytest.mark.usefixtures("browser")
def test_the_probe_detects_a_wide_element(tmp_path):
    """Negative control: an element of 500 px. Phone and desktop show one difference chart each."""
    page = write(make_report(), tmp_path / "out")[0]
    broken = page.replace("</main>", '<div class="x" style="width:500px">x</div></main>')
    found = probe(tmp_path, broken, 360)
    assert found["width"] == 16 + 500 and found["wide"] == ["DIV.x"]
    assert found["shown"] == probe(tmp_path, page, 1200)["shown"] == 11


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(tmp_path, width, scheme):
    """The page has background, highlighted bars and text in all its parts."""
    image_module = pytest.importorskip("PIL.Image")
    path = write_report(make_report(results(shift=-2)), tmp_path / "out")[0]
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--screenshot={shot}", f"--window-size={width},2400", path.as_uri(),
           f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    with image_module.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == width
    background, evaluated = {"light": ("#ffffff", "#0b5fa8"), "dark": ("#13171b", "#6db6ff")}[scheme]
    colours = pixels.astype(int) @ [1 << 16, 1 << 8, 1]
    assert 0.5 < (colours == int(background[1:], 16)).mean() < 0.97
    assert (colours == int(evaluated[1:], 16)).mean() > 0.003
    assert all(len(np.unique(part)) > 20 for part in np.array_split(colours, 6))  # something in every sixth
