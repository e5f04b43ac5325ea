"""docs/walkthrough.md and its figures are what `python -m benchmarks.walkthrough` writes."""

import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks import walkthrough

NUMBER = re.compile(r"[-+]?\d+\.\d+")


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    page, figures = walkthrough.generate()
    return {"walkthrough.md": page, **{f"walkthrough/{name}": svg for name, svg in figures.items()}}


def equal(one: str, other: str) -> bool:
    """Equal text, and numbers that differ by at most one unit of their last digit: rounding differs by processor."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= 1.001 * 10.0 ** -len(a.partition(".")[2]) for a, b in pairs)


@pytest.mark.parametrize("name", ["walkthrough.md", *(f"walkthrough/{f}.svg" for f in ("mask", "scores", "gradient"))])
def test_the_page_is_the_generated_one(generated, name):
    path = walkthrough.ROOT / "docs" / name
    assert equal(path.read_text(encoding="utf-8"), generated[name]), "run: python -m benchmarks.walkthrough"


def test_control_another_number_or_word_is_noticed(generated):
    page = generated["walkthrough.md"]
    assert equal(page, page)
    assert not equal(page, page.replace("0.478", "0.480"))
    assert not equal(page, page.replace("hard negative", "negative", 1))


def test_rows_of_the_gradient_sum_to_zero_and_masked_scores_have_none():
    walk = walkthrough.compute()
    assert walk.gradient_QP.sum(1).abs().max() < 1e-6
    assert walk.masked_QP.any() and (walk.gradient_QP[walk.masked_QP] == 0).all()


def test_figures_are_svg(generated):
    for name, text in generated.items():
        if name.endswith(".svg"):
            assert ET.fromstring(text).tag.endswith("svg")
