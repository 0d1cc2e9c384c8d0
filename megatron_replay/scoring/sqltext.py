"""SQL as text: its tokens, whether its rows are ordered, whether two queries have the same words.

It also finds the query in a model's answer. Tokens follow SQLite's rules: '' and "" double a quote inside quotes, [x]
and `x` are names, -- and /* */ are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

END_OF_TEXT = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
"""Marks at which an answer is cut, because the tokenizer's own end-of-text may be decoded with it."""

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
_FENCE = re.compile(r"```[ \t]*(?:sqlite|sql)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_QUERY = r"(?:select\b|with\s+(?:recursive\s+)?[\w\"`\[\]]+\s*(?:\([^)]*\)\s*)?as\s+(?:(?:not\s+)?materialized\s*)?\()"
_AT_LINE_START = re.compile(rf"^[ \t(]*?({_QUERY})", re.IGNORECASE | re.MULTILINE)
_ANYWHERE = re.compile(rf"\b({_QUERY})", re.IGNORECASE)


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


def extract_sql(text: str, stop: Sequence[str] = END_OF_TEXT) -> str:
    """The one query in a model's answer, without its closing semicolon.

    The answer is cut at the first of `stop`. A fenced block (```sql) comes first. Without one the query begins at the
    first line that starts with SELECT or WITH x AS (, else at the first such words anywhere. It ends at a semicolon, an
    empty line or the end; quotes are respected.

    An answer with no query in it is returned as it is, up to the same end, and scored as that.
    """
    for word in stop:
        text = text.split(word, 1)[0]
    fence = _FENCE.search(text)
    if fence and fence.group(1).strip() and not _AT_LINE_START.search(text[: fence.start()]):
        text = fence.group(1)
    begin = _AT_LINE_START.search(text) or _ANYWHERE.search(text)
    return _first_statement(text[begin.start(1) :] if begin else text.strip())


def _first_statement(text: str) -> str:
    stop = 0
    for token in tokens(text):
        gap = text[stop : token.start]
        if token.text == ";" or token.text.startswith("```") or (stop and re.search(r"\n[ \t\r]*\n", gap)):
            break
        stop = token.stop
    return text[:stop].strip()


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
