"""Progress: a bar on a terminal, a line every ten seconds otherwise. The clock is replaced."""

import io

import pytest

from ref.utils.progress import TokenRate, progress_bar


class Clock:
    """Seconds that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_every_ten_seconds_without_a_terminal(clock, capsys):
    bar = progress_bar(desc="encoding", total=100, unit="text")
    for seconds, printed in ((1, False), (9, False), (11, True), (15, False), (22, True), (33, True)):
        clock.now = 1000 + seconds
        bar.update(10)
        lines = capsys.readouterr().out.splitlines()
        assert [line.startswith("encoding: ") for line in lines] == ([True] if printed else []), seconds
    assert "60% 60/100" in lines[0] and "text/s" in lines[0]
    bar.close()
    assert not capsys.readouterr().out


def test_a_bar_inside_another_one_prints_lines_too(clock, capsys):
    outer = progress_bar(desc="tasks", total=2)
    inner = progress_bar(desc="encoding", total=5)
    for bar in (outer, inner):
        clock.now += 11
        bar.update(1)
    inner.close()
    outer.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["tasks", "encoding"]


def test_tokens_per_second_beside_the_texts(clock, capsys, monkeypatch):
    monkeypatch.setattr("ref.utils.progress.time.perf_counter", clock)
    rate = TokenRate(progress_bar(desc="scoring", total=100, unit="query"))
    rate.update(10, 0)  # from the cache: no tokens, no rate
    clock.now += 20
    rate.update(10, 0)
    assert "tokens/s" not in capsys.readouterr().out
    clock.now += 20
    rate.update(30, 5000)
    [line] = capsys.readouterr().out.splitlines()
    assert "50% 50/100" in line and line.endswith("125 tokens/s]")
    rate.close()


def test_an_iterable_of_unknown_length(clock, capsys):
    seen = []
    for n in progress_bar(iter(range(4)), desc="reading"):
        seen.append(n)
        clock.now += 11
    assert seen == [0, 1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("reading: ") for line in lines)


def test_nothing_is_printed_if_disabled(clock, capsys):
    bar = progress_bar(desc="encoding", total=3, enabled=False)
    clock.now += 100
    bar.update(3)
    bar.close()
    assert not capsys.readouterr().out


def test_a_bar_on_a_terminal(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    bar = progress_bar(desc="encoding", total=3)
    clock.now += 1
    bar.update(2)
    bar.close()
    assert "\rencoding:  67%" in terminal.getvalue() and "\n" not in terminal.getvalue()
