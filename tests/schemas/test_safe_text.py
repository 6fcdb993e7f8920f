import unicodedata

import pytest

from dpo_opt.schemas.safe_text import printable


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "tab\tand\nnew line",
        "Grüße ❄ 😀",
        "مرحبا שלום",
        "[/red] {{ x }} <b>",
        "a\u200db",
        "e\u0301",
    ],
)
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07x", "]0;titlex"),
        ("\x9b31m", "31m"),
        ("over\rwritten", "overwritten"),
        ("\x00null\x7f", "null"),
        ("a\u202eb\u202c", "ab"),
        ("\u2066a\u2069\u200f", "a"),
        ("half \ud83d", "half "),
        ("\ufeffmark", "mark"),
        ("one\u2028line", "oneline"),
    ],
)
def test_what_steers_a_terminal_or_reorders_text_is_not_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_control_no_surrogate_and_nothing_that_reorders_is_left() -> None:
    # By what Unicode says of each character, not by a list of them.
    for code in range(0x110000):
        character = chr(code)
        controls = unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n"
        reorders = unicodedata.bidirectional(character) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        if controls or reorders:
            assert printable(character) == "", hex(code)


def test_text_stays_writable() -> None:
    everything = "".join(map(chr, range(0x10000)))
    shown = printable(everything)
    assert shown.encode("utf-8").decode("utf-8") == shown
    # Of what is no surrogate nearly all is shown.
    assert 0x10000 - 0x800 - 100 < len(shown) < 0x10000 - 0x800
