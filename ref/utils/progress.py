"""Progress of long work with tqdm: a bar on a terminal, one line every ten seconds otherwise."""

import io
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LINE_INTERVAL_S = 10


class LineProgress(tqdm):
    """tqdm for a log file: each update is a line of its own, and nothing is printed at the end."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def print_status(line: str) -> None:
            if line.strip():
                file.write(line + "\n")
                file.flush()
        return print_status

    def moveto(self, n: int) -> None:
        """No cursor movement: a bar inside another one prints lines too."""

    def close(self) -> None:
        if not getattr(self, "disable", True):
            self.disable = True
            self._decr_instances(self)


def escape_unprintable() -> None:
    """Let stdout escape what its encoding lacks (†, the bytes of a file name): an error would end hours of work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """Print a line, on a terminal above the bar if one is shown."""
    if sys.stdout.isatty():
        tqdm.write(text, file=sys.stdout)
    else:
        print(text, flush=True)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, desc: str, total: float | None = None, unit: str = "it",
    enabled: bool = True, **options: Any,
) -> Any:
    """A tqdm bar over `iterable`, or one to `update` by hand. `options` go to tqdm."""
    terminal = sys.stdout.isatty()
    if not terminal:
        share = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}" if total else "{n_fmt} [{elapsed}"
        options = {"bar_format": "{desc}: " + share + ", {rate_fmt}{postfix}]", "delay": LINE_INTERVAL_S,
                   "mininterval": LINE_INTERVAL_S, "miniters": 1, **options}
    return (tqdm if terminal else LineProgress)(
        iterable, desc=desc, total=total, unit=unit, file=sys.stdout, leave=False, disable=not enabled, **options)


class TokenRate:
    """A bar over texts that also shows the tokens per second."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.start_s, self.num_tokens = bar, time.perf_counter(), 0

    def update(self, texts: int, tokens: int) -> None:
        """Count finished texts and their tokens, 0 if these were not computed or are not known."""
        self.num_tokens += tokens
        if self.num_tokens:
            rate = self.num_tokens / max(1e-9, time.perf_counter() - self.start_s)
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(texts)

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()
