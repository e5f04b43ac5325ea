"""The report of a run: what it says, that nothing from outside acts as mark-up, and how a browser shows it."""

import dataclasses
import html
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from leaderboard.compare import Scores, borda_ranks, read_public_scores
from leaderboard.content import contents, signed
from leaderboard.page import STYLE
from leaderboard.pictures import Axis, bars, differences
from leaderboard.report import AGAINST, CHOSEN, Report, TaskResult, write_report
from leaderboard.text import clean, markdown_text

CHROMIUM = Path("/usr/bin/chromium")
EVIL = """<script>alert("1")</script>'><img src=x onerror=alert(2)> | `x` **b** [a](javascript:3) <!-- \x00\u202e"""
VOID = {"meta", "wbr", "line", "rect"}


def results(model=AGAINST, *, shift=0.0, every=1):
    """A public model's scores as a run's results."""
    public = read_public_scores()
    scores = public.score_MN[public.row(model)]
    return [
        TaskResult(task, category, "accuracy", float(score) + shift, f"Instruction of {task}.", number % 3,
                   "the training split" if number % 3 else "", seconds=2.0 + number, tokens=1000 * number)
        for number, (task, category, score) in enumerate(zip(public.tasks, public.categories, scores, strict=True))
    ][::every]


def a_report(tasks=None, **changes):
    known = {"model": "ours", "date": "2026-09-01", "tasks": results() if tasks is None else tasks,
             "versions": {"mteb": "2.26.24", "torch": "2.11.0"}}
    return Report(**{**known, **changes})


def written(report, folder, **options):
    """The texts of both files."""
    paths = write_report(report, folder, **options)
    assert [path.name for path in paths] == ["report.html", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md"]
    return [path.read_text(encoding="utf-8") for path in paths]


class Reader(HTMLParser):
    """The tags, attributes and texts of a page; the cells of its tables; whether every tag is closed."""

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
    """The cells of the tables of a Markdown file, as shown."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not re.fullmatch(r"[| :-]+", line)]
    return [[plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def plain(cell):
    """Without bold, backslashes and entities."""
    return html.unescape(re.sub(r"\\(.)", r"\1", re.sub(r"^\*\*(.*)\*\*$", r"\1", cell)))


def table_of(rows, first):
    """The rows from the one that starts with `first`, with its length."""
    start = next(number for number, row in enumerate(rows) if row[0] == first)
    return rows[start:]


# ---- what it says --------------------------------------------------------------------------------------------


def test_a_whole_run(tmp_path):
    """Headline figures, our row beside the chosen models, scores and prompts of all tasks."""
    page, text = written(a_report(), tmp_path)
    for figure in ("74.12", "68.40", "41 of 41"):
        assert figure in page and figure in text
    rows = markdown_rows(text)
    assert ["Borda rank", "6", "among 324 public models and this one, all tasks"] in rows
    means = table_of(rows, "Model")
    assert means[0][:4] == ["Model", "Borda rank", "Mean (Task)", "Mean (TaskType)"] and len(means[0]) == 11
    assert {row[0] for row in means[1:9]} == {*CHOSEN, "ours (this run)"}
    assert means[2][:4] == ["ours (this run)", "6", "74.12", "68.40"]
    assert next(row for row in means if row[0] == "BAAI/bge-en-icl")[2] == "–"  # 25 of the 41 tasks
    assert ["ArguAna", "Instruction of ArguAna.", "0", "–"] in rows
    assert ["BIOSSES", "Instruction of BIOSSES.", "1", "the training split"] in rows
    assert ["mteb", "2.26.24"] in rows and "f4cc6c8b365a3c779dbc708d6affe0b0355b2ddf" in text
    assert "ahead in 0 tasks, behind in 0, equal in 41" in text
    assert "Partial" not in text and "Not comparable" not in text and "Not run" not in text


def test_both_files_hold_the_same_tables(tmp_path):
    """Cell by cell, but for the headline figures, which the page has as a list."""
    odd = results(shift=-1.5, every=3)
    odd[2] = dataclasses.replace(odd[2], official=False)
    for number, report in enumerate([a_report(), a_report(odd, failed={"STS12": "it | broke"}, missing=["STS13"])]):
        page, text = written(report, tmp_path / str(number))
        ours = [row for row in Reader(page).rows if row]
        assert len(ours) > 40 and ours == [row for row in markdown_rows(text) if len(row) != 3 or row in ours]
        visible = html.unescape(re.sub(r"<[^>]+>", "\n", page))
        for what, figure, remark in contents(report)[0].blocks[0].rows:
            assert f"| {what} | {figure} | {remark} |" in text and figure in visible and remark in visible


def test_a_partial_run_says_so(tmp_path):
    """Means and ranks on its tasks alone, and never under the leaderboard's names."""
    tasks = results(shift=1, every=2)
    _, text = written(a_report(tasks, failed={"BIOSSES": "OSError: no disk"}, missing=["STS12"]), tmp_path)
    public = read_public_scores()
    columns = [public.tasks.index(row.task) for row in tasks]
    scores = np.concatenate([[[row.score for row in tasks]], public.score_MN[:, columns]])
    rank = borda_ranks(scores)
    assert "> Partial run: 20 of the 41 tasks" in text and "Mean (Task)" not in text and "Mean (TaskType)" not in text
    rows = markdown_rows(text)
    assert ["Mean of the tasks run", f"{scores[0].mean():.2f}", "over the 21 tasks run"] in rows
    assert ["Borda rank, partial", str(rank[0]), f"among {np.count_nonzero(rank) - 1} public models and this one, the "
            "tasks run"] in rows
    assert ["BIOSSES", "failed: OSError: no disk"] in rows
    assert ["STS12", "selected, but there are no data here"] in rows
    rest = re.search(r"Not run \((\d+)\): (.*)\.", text)
    assert set(rest[2].split(", ")) == set(public.tasks) - {row.task for row in tasks} - {"BIOSSES", "STS12"}
    assert int(rest[1]) == len(rest[2].split(", "))


def test_stand_ins_are_compared_with_nothing(tmp_path):
    """A task on other data counts in no mean and no rank; a run of such tasks has no comparison at all."""
    tasks = results()
    tasks[3] = dataclasses.replace(tasks[3], official=False, score=99.99)
    page, text = written(a_report(tasks), tmp_path / "one")
    assert [tasks[3].task, "99.99", "other data, not comparable", tasks[3].category, "accuracy"] in markdown_rows(text)
    assert "> Not comparable: 1 task ran on other data" in text and "40 of 41" in text
    assert text.count("99.99") == 2  # and their mean
    world = [TaskResult("IsleHome", "Retrieval", "ndcg_at_10", 95.95, "Find it.", official=False)]
    page, text = written(a_report(world), tmp_path / "none")
    assert "Nothing here can be compared" in text and "Borda" not in text + page and AGAINST not in text + page
    own = [TaskResult("SomethingElse", "STS", "cosine_spearman", -3.2, "Find it.")]
    _, text = written(a_report(own), tmp_path / "own")
    assert ["SomethingElse", "-3.20", "not in MTEB(eng, v2)", "STS", "cosine_spearman"] in markdown_rows(text)


def test_a_run_without_scores(tmp_path):
    page, text = written(a_report([], failed={"STS12": "broken"}), tmp_path)
    assert "No task has a score." in text and "No task has a score." in page and "STS12" in text


def test_unmeasured_and_total_time(tmp_path):
    """A result from the cache has no time; the speed is of tasks that have both figures."""
    measured = [(None, 5000), (2, 3000), (3, None)]
    tasks = [dataclasses.replace(row, seconds=seconds, tokens=tokens)
             for row, (seconds, tokens) in zip(results(every=20), measured, strict=True)]
    rows = markdown_rows(written(a_report(tasks), tmp_path)[1])
    names = [row.task for row in tasks]
    assert [row[1:] for row in table_of(rows, "All with a figure")[:1]] == [["5.0", "8,000", "1,500"]]
    assert [names[0], "–", "5,000", "–"] in rows and [names[1], "2.0", "3,000", "1,500"] in rows
    nothing = [dataclasses.replace(row, seconds=None, tokens=None) for row in tasks]
    assert "Seconds" not in written(a_report(nothing), tmp_path / "nothing")[1]


def test_models_that_the_table_lacks(tmp_path):
    """They are named and left out, the report is written nevertheless."""
    report = a_report(chosen=["nobody/nothing", AGAINST], against="nobody/else")
    _, text = written(report, tmp_path)
    assert "Not in the public table, so left out: nobody/nothing, nobody/else." in text and "Difference" not in text


def test_a_rival_without_all_tasks(tmp_path):
    page, text = written(a_report(against="BAAI/bge-en-icl"), tmp_path)
    assert "16 without a score of BAAI/bge-en-icl" in text and "nan" not in (page + text).lower().replace("finance", "")


def test_bad_reports_are_refused_before_anything_is_written(tmp_path):
    twice = [*results(), results()[0]]
    for tasks, message in [(twice, "comes twice"), ([dataclasses.replace(results()[0], score=np.nan)], "not finite"),
                           ([dataclasses.replace(results()[0], score=1234)], "score 1234")]:
        with pytest.raises(ValueError, match=message):
            write_report(a_report(tasks), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full leaves the old report, and no half-written one."""
    before = written(a_report(), tmp_path)
    def full(path, text, **options):
        path.open("w").write(text[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(a_report(model="other"), tmp_path)
    monkeypatch.undo()
    assert [(tmp_path / name).read_text() for name in ("report.html", "report.md")] == before
    assert len(list(tmp_path.iterdir())) == 2


# ---- texts from outside --------------------------------------------------------------------------------------


@pytest.fixture
def evil():
    """Every text that comes from outside is an attack: a report, and a public table."""
    real = read_public_scores()
    public = Scores((EVIL, *real.models[1:]), (EVIL, *real.tasks[1:]), (EVIL, *real.categories[1:]), real.registered_M,
                    real.score_MN, EVIL)
    tasks = [TaskResult(EVIL, EVIL, EVIL, 50.0, EVIL, 2, EVIL, 1.0, 5),
             TaskResult(EVIL + "2", EVIL, EVIL, 50.0, EVIL, official=False),
             *(TaskResult(task, "STS", EVIL, 50.0, EVIL) for task in real.tasks[-3:])]
    return Report(EVIL, EVIL, tasks, {EVIL: EVIL}, {EVIL: EVIL + "\nnext\ud800"}, [EVIL], EVIL,
                  [EVIL, real.models[1], "x" + EVIL], EVIL), public


def test_nothing_from_outside_acts_as_mark_up(tmp_path, evil):
    """The page has the tags and attributes of an innocent one, and shows the text as it is."""
    report, public = evil
    page, text = written(report, tmp_path, public=public)
    innocent = Reader(written(a_report(results(every=2), failed={"a": "b"}, note="n"), tmp_path / "innocent")[0])
    read = Reader(page)
    assert read.tags <= innocent.tags and read.attributes <= innocent.attributes and not read.open
    assert "script" not in read.tags and not any(name.startswith("on") for name in read.attributes)
    shown = "".join(read.words)
    assert shown.count('<script>alert("1")</script>') > 20 and "<script" not in page and "<img" not in page
    assert not re.search("[\x00-\x08\u202e]", page + text) and "\ufffd" in shown
    assert "<" not in text and not re.search(r"(?<!\\)[`\[]", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_page_loads_and_runs_nothing(tmp_path):
    """No address, no script, one file; the policy says so to the browser as well."""
    page = written(a_report(), tmp_path)[0]
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe|\ssrc=|\shref=", page)


def test_pictures_have_a_text_alternative(tmp_path):
    """Each says its figures in words, escaped."""
    page = written(a_report(results("Qwen/Qwen3-Embedding-8B")), tmp_path)[0]
    pictures = re.findall(r"<svg [^>]*>", page)
    assert len(pictures) == 9 + 2
    assert all('role="img"' in head and re.search(r'viewBox="0 0 \d+ \d+"', head) for head in pictures)
    assert "ArguAna: −10.10." in page and "ours (this run): 75.23." in pictures[0]


def test_clean_and_markdown_text():
    assert clean(" a\n\tb\x07\u2066\udc80 ") == "a b\ufffd\ufffd\ufffd"
    assert markdown_text("ndcg_at_10 _x_ a|b <i> & *") == r"ndcg_at_10 \_x\_ a\|b &lt;i&gt; &amp; \*"
    assert [signed(x) for x in (1.234, -0.001, 0.0, -2, np.nan)] == ["+1.23", "0.00", "0.00", "−2.00", "–"]


# ---- pictures ------------------------------------------------------------------------------------------------


def test_bars_by_hand():
    """Best first, missing last, ours marked; lengths in proportion; no bar below zero."""
    picture = bars("t", [("ours", 50.0), ("a/b", 100.0), ("c", np.nan), ("d", -8.0)])
    assert picture.description == "a/b: 100.00. ours: 50.00. d: -8.00. c: –."
    widths = re.findall(r'<rect class="(\w+)" [^>]*width="([\d.]+)"', picture.narrow)
    assert widths == [("other", "148.0"), ("ours", "74.0"), ("other", "0.0"), ("other", "0.0")]


def test_differences_by_hand():
    """Zero is where both kinds of bar meet; without any difference there is still an axis."""
    picture = differences("t", [("a", 2.0, "+2.00"), ("b", -2.0, "−2.00")])
    for drawing in (picture.narrow, picture.wide):
        ahead, behind = re.findall(r'<rect class="\w+" x="([\d.]+)" y="\d+" width="([\d.]+)"', drawing)
        assert float(behind[0]) + float(behind[1]) == pytest.approx(float(ahead[0]), abs=0.11) and ahead[1] == behind[1]
    assert "nan" not in differences("t", [("a", 0.0, "0.00")]).wide
    assert Axis(-14.2, 10.1, 0, 1).ticks() == [-10, -5, 0, 5, 10] and len(Axis(-100, 90, 0, 1).ticks()) <= 6
    assert Axis(-2, 2, 0, 100).at(1) == 75


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """WCAG 2: 7 for text, 4.5 for the muted, 3 for bars and lines that carry meaning."""
    def luminance(colour):
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)
    style = STYLE.split("@media (prefers-color-scheme: dark)")[scheme == "dark"]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", style))
    for ground in ("ground", "raised", "mark", "notice"):
        assert contrast(colours["ink"], colours[ground]) >= 7
    assert all(contrast(colours["muted"], colours[ground]) >= 4.5 for ground in ("ground", "raised"))
    assert all(contrast(colours[bar], colours["ground"]) >= 3 for bar in ("ours", "other", "behind"))


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
    """Chromium without a window, on a profile of its own."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def probe(tmp_path, page, width):
    """What a page looks like inside a frame of that width."""
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)))
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "probe.html").as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.fixture
def browser():
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install --no-install-recommends chromium")


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("kind", ["whole", "long", "evil"])
def test_nothing_is_wider_than_a_phone(tmp_path, kind, evil):
    """At 360 px: tables scroll inside their box, everything else fits, letters in pictures stay legible."""
    long = [TaskResult(LONG[n:], LONG, LONG, 50.0, LONG, 1, LONG, 1e9, 10**15, official=n > 0) for n in range(2)]
    endless = a_report([*results(every=4), *long], model=LONG, date=LONG, note=LONG, failed={LONG: LONG},
                       versions={LONG: LONG})
    report, public = {"whole": (a_report(note="n"), None), "long": (endless, None), "evil": evil}[kind]
    page = written(report, tmp_path / "out", public=public)[0]
    found = probe(tmp_path, page, 360)
    assert found["width"] == 360 and not found["wide"], found
    assert any(found["boxes"]) and found["scripts"] == 0 and found["letters"] >= 10


@pytest.mark.usefixtures("browser")
def test_a_wide_page_is_seen_to_be_wide(tmp_path):
    """The probe itself: it notices an element of 500 px. And a phone and a desk see one difference picture each."""
    page = written(a_report(), tmp_path / "out")[0]
    broken = page.replace("</main>", '<div class="x" style="width:500px">x</div></main>')
    found = probe(tmp_path, broken, 360)
    assert found["width"] == 16 + 500 and found["wide"] == ["DIV.x"]
    assert found["shown"] == probe(tmp_path, page, 1200)["shown"] == 10


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(tmp_path, width, scheme):
    """The ground's colour, our colour and enough ink: neither blank nor a blot."""
    image_module = pytest.importorskip("PIL.Image")
    path = next(path for path in write_report(a_report(results(shift=-2)), tmp_path / "out") if path.suffix == ".html")
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--screenshot={shot}", f"--window-size={width},2400", path.as_uri(),
           f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    with image_module.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == width
    ground, ours = {"light": ("#ffffff", "#0b5fa8"), "dark": ("#13171b", "#6db6ff")}[scheme]
    colours = pixels.astype(int) @ [1 << 16, 1 << 8, 1]
    assert 0.5 < (colours == int(ground[1:], 16)).mean() < 0.97 and (colours == int(ours[1:], 16)).mean() > 0.003
    assert all(len(np.unique(part)) > 20 for part in np.array_split(colours, 6))  # something in every sixth
