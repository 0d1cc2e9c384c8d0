"""The pages keep to what a reader can take in: narrow lines, short sentences, links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 120
WORDS = 25
"""Write sentences of at most 25; this leaves room for a quotation or a list of names."""
SKIPPED = {"build", "dist", "runs"}
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in SKIPPED and path.name[0] != "."]
PAGES = sorted(
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(page for one in FOLDERS for page in one.rglob("*.md")))
)
READ = [page for page in PAGES if page.parts[0] == "docs" or page.name in ("README.md", "CONTRIBUTING.md")]

FENCE = re.compile(r"^\s*```")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]*)\)")
LINK_ALONE = re.compile(rf"^\s*(?:[-*] )?{LINK.pattern}[.,;]?$")
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
SHORTENED = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|eq|fig|no)\.", flags=re.IGNORECASE)
END = re.compile(r"(?<=[.!?])[*_)\"']*\s+(?=[*_(\"']*[A-Z0-9\0])")
"""A NUL marks a link, which may begin a sentence with a small letter."""


def text_lines(page: str) -> Iterator[tuple[int, str]]:
    """Number and line of all that is no code: fenced blocks are left out."""
    fenced = False
    for number, line in enumerate(page.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def is_table(line: str) -> bool:
    return line.lstrip().startswith("|")


def wide_lines(page: str) -> Iterator[str]:
    for number, line in text_lines(page):
        if len(line) > COLUMNS and not is_table(line) and not LINK_ALONE.match(line):
            yield f"line {number}: {len(line)} columns"


def paragraphs(page: str) -> Iterator[str]:
    """Running text, its lines joined; a list item is a paragraph, and headings, tables and indented code are none."""
    current: list[str] = []
    for _, line in text_lines(page):
        plain = line.strip()
        apart = not plain or plain.startswith(("#", "|", "<!--")) or (line.startswith("    ") and not current)
        if apart or ITEM.match(line):
            yield " ".join(current)
            current = []
        if not apart:
            current.append(ITEM.sub("", line).strip())
    yield " ".join(current)


def sentences(page: str) -> Iterator[str]:
    """A code span counts as one word, a link as the words it shows; either may begin a sentence."""
    for paragraph in paragraphs(page):
        text = re.sub(r"(`+).+?\1", "Code", paragraph)
        text = LINK.sub("\0\\1", text)
        text = SHORTENED.sub(r"\1", text)
        yield from (sentence.replace("\0", "") for sentence in END.split(text) if sentence)


def num_words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def long_sentences(page: str) -> Iterator[str]:
    for sentence in sentences(page):
        if num_words(sentence) > WORDS:
            yield f"{num_words(sentence)} words: {sentence}"


def anchors(page: str) -> set[str]:
    """The names GitHub gives the headings of a page."""
    headings = [line.lstrip("#").strip().lower() for _, line in text_lines(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading)).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links to a file that is not there, or to a heading that its page lacks."""
    for number, line in text_lines(text):
        for _, target in LINK.findall(re.sub(r"(`+).+?\1", "", line)):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            if not to.exists():
                yield f"line {number}: {target} is not there"
            elif anchor and anchor not in anchors(to.read_text(encoding="utf-8")):
                yield f"line {number}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_are_no_wider_than_a_page(page: Path) -> None:
    assert list(wide_lines((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", READ, ids=str)
def test_sentences_are_short(page: Path) -> None:
    assert list(long_sentences((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(ROOT / page, (ROOT / page).read_text(encoding="utf-8"))) == []


def test_the_tour_names_files_that_are_there() -> None:
    tour = (ROOT / "docs" / "contributing" / "tour.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`", tour)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / "megatron_replay" / name).is_file()] == []


def test_a_wide_line_is_found_unless_it_cannot_be_broken() -> None:
    wide = "word " * 30
    link = f"[name](https://example.org/{'x' * 120})"
    assert len(list(wide_lines(f"{wide}\n"))) == 1
    assert list(wide_lines(f"| {wide} |\n{link}\n- {link}\n```\n{wide}\n```\n")) == []
    assert len(list(wide_lines(f"see {link}\n"))) == 1


def test_sentences_are_told_apart() -> None:
    page = (
        "# A heading of no interest.\n\nThe first, e.g. of `a. B` and [a link](b.md). [c.md](c.md)\ngoes on in 1.5"
        " lines.\n- An item\n  on two lines.\n- **Bold.** Another\n\n    code = Indented. Code.\n\n| a. B | c |\n"
    )
    found = ["The first, e.g of Code and a link.", "c.md goes on in 1.5 lines."]
    assert list(sentences(page)) == [*found, "An item on two lines.", "**Bold.", "Another"]


def test_a_long_sentence_is_found_and_a_long_code_span_is_not() -> None:
    long = "Word " + "word " * WORDS
    assert [found.split(":")[0] for found in long_sentences(f"{long}.\n")] == [f"{WORDS + 1} words"]
    assert list(long_sentences(f"Run `{long}` once.\n")) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# What is `not` known, yet\n")
    page = tmp_path / "page.md"
    right = "[a](other.md) [b](other.md#what-is-not-known-yet) [c](https://example.org/x.md) `[d](no.md)` [e](#here)\n"
    assert list(broken_links(page, page.write_text(f"## Here\n{right}") and page.read_text())) == []
    assert len(list(broken_links(page, "[a](gone.md) [b](other.md#gone)\n[c](#gone)"))) == 3
