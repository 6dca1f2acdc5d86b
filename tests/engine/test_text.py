"""Text as it streams: joined it is the text, and no part of a stop string is ever shown."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.checkpoint.detokenizer import Detokenizer
from qwenfit.engine.text import TextStream

pieces = st.lists(st.text("aab", max_size=3), max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def stream(words: list[bytes], stops: list[str]) -> tuple[list[str], str | None]:
    text = TextStream(Detokenizer(lambda i: words[i]), tuple(stops))
    shown = []
    for i in range(len(words)):
        shown.append(text.push(i))
        if text.stopped_by is not None:
            break
    shown.append(text.finish())
    return shown, text.stopped_by


@settings(max_examples=500, deadline=None, derandomize=True)
@given(pieces, stops)
def test_the_text_ends_before_the_first_stop_string_to_be_completed(words, stops):
    shown, stopped_by = stream([w.encode() for w in words], stops)
    made = ""
    for word in words:  # the definition: look at everything after every token
        made += word
        found = [made.index(stop) for stop in stops if stop in made]
        if found:
            assert "".join(shown) == made[: min(found)]
            assert stopped_by in stops and made.startswith(stopped_by, min(found))
            return
    assert "".join(shown) == made and stopped_by is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces, stops)
def test_what_is_shown_is_never_taken_back_and_nothing_is_held_without_need(words, stops):
    shown, stopped_by = stream([w.encode() for w in words], stops)
    if stopped_by is None:
        sofar = ""
        for i, word in enumerate(words):
            sofar += word
            held = len(sofar) - len("".join(shown[: i + 1]))
            may_begin = [k for stop in stops for k in range(len(stop)) if sofar.endswith(stop[:k])]
            assert held == max(may_begin, default=0)


def test_a_stop_string_cut_within_a_character():
    shown, stopped_by = stream([b"a\xe4", b"\xbd", b"\xa0\xe5\xa5", b"\xbd!"], ["你好"])
    assert (shown, stopped_by) == (["a", "", "", "", ""], "你好")


def test_an_unfinished_character_can_complete_a_stop_string_at_the_end():
    assert stream([b"ab\xe4"], ["b\ufffd"]) == (["a", ""], "b\ufffd")


def test_before_min_tokens_nothing_is_searched_or_held():
    text = TextStream(Detokenizer(lambda i: b"ab"), ("ba",))
    assert [text.push(0, search=False), text.push(0, search=False)] == ["ab", "ab"]
    assert text.push(0) == "a" and text.finish() == "b"
