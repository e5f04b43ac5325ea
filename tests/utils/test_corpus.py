"""Lines of a corpus: id, title and text."""

import pytest

from ref.utils.corpus import passage_id, passage_text


@pytest.mark.parametrize(("line", "name", "text"), [
    ({"_id": "a", "title": "A title", "text": "a text "}, "a", "A title a text"), ({"id": 7, "text": "x"}, "7", "x"),
    ({"_id": "a", "id": "b", "title": "", "text": ""}, "a", ""), ({"title": None, "text": " x"}, None, "x")])
def test_id_and_text_of_a_line(line, name, text):
    assert (passage_id(line, "f:1"), passage_text(line, "f:1")) == (name, text)


@pytest.mark.parametrize(("function", "line", "words"), [
    (passage_id, {"_id": ""}, "f:1: '_id' must be a non-empty string or an integer .got ''"),
    (passage_id, {"id": True}, "f:1: 'id' must be a non-empty string or an integer .got True"),
    (passage_text, {"id": 1}, "f:1: 'text' must be a string .got None"),
    (passage_text, {"title": 3, "text": "x"}, "f:1: 'title' must be a string .got 3")])
def test_bad_lines(function, line, words):
    with pytest.raises(ValueError, match=words):
        function(line, "f:1")
