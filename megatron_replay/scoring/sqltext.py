"""SQL as text: its tokens, whether its rows are ordered, whether two queries have the same words.

Tokens follow SQLite's rules: '' and "" double a quote inside quotes, [x] and `x` are names, -- and /* */ are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
    (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
  | (?P<literal> '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) )
  | (?P<quoted>  `(?:[^`]|``)*(?:`|\Z) | \[[^\]]*(?:\]|\Z) )
  | (?P<number>  (?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)? )
  | (?P<word>    [^\W\d][\w$]* )
  | (?P<mark>    <>|!=|==|<=|>=|\|\||<<|>>|->>|->|\S )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_SAME_MARK = {"==": "=", "<>": "!="}
_SPLIT_COMPARISONS = ("> =", "< =", "! =")


class Token(NamedTuple):
    """One token: its kind (literal, quoted, number, word, mark), its text, and where it begins and ends."""

    kind: str
    text: str
    start: int
    stop: int


def tokens(sql: str) -> Iterator[Token]:
    """The tokens of the text, comments left out; an unfinished quote or comment runs to the end."""
    for found in _TOKEN.finditer(sql):
        if found.lastgroup and found.lastgroup != "comment":
            yield Token(found.lastgroup, found.group(), *found.span())


def statements(sql: str) -> list[list[Token]]:
    """The tokens of each statement: the text cut at semicolons, empty statements left out."""
    parts: list[list[Token]] = [[]]
    for token in tokens(sql):
        if token.text == ";":
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def has_order_by(sql: str) -> bool:
    """True where the query itself says ORDER BY.

    One inside parentheses (subquery, window, CTE), a string or a comment does not count.
    """
    depth, before = 0, ""
    for token in tokens(sql):
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        word = token.text.lower() if token.kind == "word" else ""
        if depth == 0 and before == "order" and word == "by":
            return True
        before = word
    return False


def normalise(sql: str) -> str:
    """The query's tokens in one spelling, joined by single spaces.

    - Words and names are in lower case and lose `x` and [x].
    - Literals keep their case, and "x" is written 'x', since SQLite reads an unknown "x" as a string.
    - == becomes =, and <> becomes !=.
    - Comments and closing semicolons go.
    - Numbers, aliases, the order of columns and of conditions stay.
    """
    words = [_spelling(token) for token in tokens(sql)]
    while words and words[-1] == ";":
        words.pop()
    return " ".join(words)


def exact_match(predicted: str, gold: str) -> bool:
    """True where two queries are the same after `normalise`.

    This is the strict score, which a right query in other words fails.
    """
    return normalise(predicted) == normalise(gold)


def without_distinct(sql: str) -> str:
    """The text without the word DISTINCT outside quotes, but for IS [NOT] DISTINCT FROM, which compares."""
    kept, end, before = [], 0, ["", ""]
    for token in tokens(sql):
        word = token.text.lower()
        if word == "distinct" and "is" not in (before[1], before[0] if before[1] == "not" else ""):
            kept.append(sql[end : token.start])
            end = token.stop
        before = [before[1], word]
    return "".join([*kept, sql[end:]])


def joined_comparisons(sql: str) -> str:
    """The text with `> =`, `< =` and `! =` outside quotes written as one sign, which is how some models space them."""
    kept, end, before = [], 0, None
    for token in tokens(sql):
        if before is not None and sql[before.start : token.stop] in _SPLIT_COMPARISONS:
            kept.append(sql[end : before.stop])
            end = token.start
        before = token
    return "".join([*kept, sql[end:]])


def _spelling(token: Token) -> str:
    if token.kind == "literal":
        if token.text.startswith("'"):
            return token.text
        inner = token.text[1:].removesuffix('"').replace('""', '"')
        return "'" + inner.replace("'", "''") + "'"
    if token.kind == "quoted":
        name = token.text[1:-1].lower()
        return name if re.fullmatch(r"[^\W\d][\w$]*", name) else f"`{name}`"
    return _SAME_MARK.get(token.text, token.text.lower())
