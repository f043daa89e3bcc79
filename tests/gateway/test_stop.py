"""Stop strings across pieces."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop import StopMatcher


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in pieces:
        text, matched = matcher.add(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + matcher.finish(), None


def test_cuts_before_the_stop_string_or_after_it() -> None:
    assert run(["hel", "lo wor", "ld"], ["o w"]) == ("hell", "o w")
    assert run(["hel", "lo wor", "ld"], ["o w"], include=True) == ("hello w", "o w")


def test_shows_what_only_looked_like_one() -> None:
    matcher = StopMatcher(["\n\nUser:"], False)
    assert matcher.add("a\n\nUs") == ("a", None)
    assert matcher.add("es") == ("\n\nUses", None)


def test_the_one_that_is_complete_first_wins() -> None:
    assert run(["abc"], ["abc", "b"]) == ("a", "b")
    assert run(["xab"], ["ab", "xab"]) == ("", "xab")


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
)
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == reference("".join(pieces), stops)
