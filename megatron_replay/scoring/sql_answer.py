"""The query in a model's answer, among its thoughts, its fences and its explanations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from megatron_replay.scoring.sqltext import Token, statements, tokens

END_OF_TEXT = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
"""Marks at which an answer is cut, because the tokenizer's own end-of-text may be decoded with it."""
THOUGHTS = ("<think>", "</think>")
"""Marks around the reasoning of a model, which is no part of its answer."""

_QUERY = r"(?:select\b|with\s+(?:recursive\s+)?[\w\"`\[\]]+\s*(?:\([^)]*\)\s*)?as\s+(?:(?:not\s+)?materialized\s*)?\()"
_BEGIN = re.compile(_QUERY, re.IGNORECASE)
_AT_LINE_START = re.compile(rf"^[ \t]*((?:\([ \t]*)*{_QUERY})", re.IGNORECASE | re.MULTILINE)
_ANYWHERE = re.compile(rf"\b({_QUERY})", re.IGNORECASE)
_FENCE = re.compile(
    r"```(?:[ \t]*(?!select\b|with\b)[\w+-]*[ \t]*\r?\n|[ \t]*(?:sqlite|sql)\b)?(.*?)(?:```|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_EMPTY_LINE = re.compile(r"\n[ \t\r]*\n")
_SQL_WORDS = re.compile(
    r"select|distinct|all|as|from|where|group|by|having|order|limit|offset|asc|desc|nulls|first|last|join|"
    r"left|right|full|outer|inner|cross|natural|on|using|union|intersect|except|and|or|not|in|between|like|"
    r"glob|regexp|is|null|exists|case|when|then|else|end|cast|collate|escape|with|recursive|values|over|"
    r"partition|rows|range|window|filter|materialized",
    re.IGNORECASE,
)
_COMBINES = ("union", "intersect", "except", "order", "limit")
"""Words that may follow a query in parentheses."""
_CLAUSES = ("from", "where", "join", "left", "inner", "group", "having", *_COMBINES)
"""Words with which a query goes on after an empty line."""


def extract_sql(text: str, stop: Sequence[str] = END_OF_TEXT) -> str:
    """The one query in a model's answer, without its closing semicolon.

    The answer is cut at the first of `stop`, and it begins after `</think>`. The query is, in this order:

    - the beginning of the answer, where that is a query: then the prompt has opened the fence, if any
    - the last fenced block that is a query, whole, with its empty lines
    - what begins at the first line that starts with SELECT or WITH x AS (
    - what begins at the first such words anywhere

    Without a fence it ends at a semicolon, at an empty line that no clause follows, or at a line that goes on in prose;
    quotes and parentheses are respected. Of several statements it is the first that is a query. Comments before
    it, and parentheses around all of it, go.

    An answer with no query in it is returned as it is and scored as that.
    """
    for word in stop:
        text = text.split(word, 1)[0]
    text = text.rsplit(THOUGHTS[1], 1)[-1].split(THOUGHTS[0], 1)[0]
    head = text[: text.index("```")] if "```" in text else text
    if not head.rstrip().endswith(":") and (start := _leading_query(head)) is not None:
        return _query_at(head[start:])
    for fence in reversed(list(_FENCE.finditer(text))):
        query = _first_query(fence.group(1))
        if query:
            return query
    for found in _AT_LINE_START.finditer(text):
        if not _is_prose(list(islice(tokens(text[found.end(1) :]), 3))):
            return _query_at(text[found.start(1) :])
    anywhere = _ANYWHERE.search(text)
    if anywhere is None:
        return _query_at(text.strip())
    text, quoted = text[anywhere.start(1) :], text[: anywhere.start(1)].endswith("`")
    return _query_at(text.partition("\n")[0].rpartition("`")[0] if quoted else text)


def _leading_query(text: str) -> int | None:
    """The place of a query at the very beginning of the text, comments and opening parentheses aside, or None."""
    first = list(islice(tokens(text), 1))
    if not first:
        return None
    found = _AT_LINE_START.match(text[first[0].start :])
    if found is None or _is_prose(list(islice(tokens(text[first[0].start + found.end(1) :]), 3))):
        return None
    return first[0].start


def _first_query(text: str) -> str:
    """The first statement of an SQL text that is a query, whole; empty where there is none."""
    for statement in statements(text):
        inside = next((token for token in statement if token.text != "("), statement[0])
        if _BEGIN.match(text, inside.start):
            return _bare(text, statement)
    return ""


def _query_at(text: str) -> str:
    """The query that the text begins with, up to where it ends or prose goes on."""
    kept: list[Token] = []
    depth, complete = 0, False
    every = list(tokens(text))
    for i, token in enumerate(every):
        gap = text[kept[-1].stop : token.start] if kept else ""
        if token.text == ";" or token.text.startswith("```") or (token.text == ")" and depth == 0):
            break
        may_end = complete and depth == 0 and kept[-1].text != ","
        if may_end and "\n" in gap and not _goes_on(every[i : i + 4], after_empty=bool(_EMPTY_LINE.search(gap))):
            break
        if kept and token.text.lower() not in _COMBINES and kept[0].text == "(" and _closing(kept) == len(kept) - 1:
            break
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        # a WITH is complete when its own SELECT has begun, anything else from its first word on
        complete = complete or every[0].text.lower() != "with" or (depth == 0 and token.text.lower() == "select")
        kept.append(token)
    while kept and kept[-1].text == ".":
        kept.pop()
    return _bare(text, kept)


def _goes_on(line: Sequence[Token], *, after_empty: bool) -> bool:
    """True where a line may belong to the query above it; after an empty line only a clause does."""
    if after_empty:
        return line[0].text.lower() in _CLAUSES and not _is_prose(line[1:])
    return not _is_prose(line[:3])


def _is_prose(line: Sequence[Token]) -> bool:
    """True where the first three tokens of a line are no SQL: three words in a row, `Note:`, `**`, `#`."""
    texts = [token.text for token in line]
    plain = [token.kind == "word" and not _SQL_WORDS.fullmatch(token.text) for token in line]
    labelled = plain[:1] == [True] and texts[1:2] == [":"]
    return plain == [True] * 3 or labelled or texts[:2] == ["*", "*"] or texts[:1] == ["#"]


def _bare(text: str, query: Sequence[Token]) -> str:
    """The text of these tokens without the parentheses that enclose all of them."""
    query = list(query)
    while len(query) > 2 and query[0].text == "(" and _closing(query) == len(query) - 1:
        query = query[1:-1]
    return text[query[0].start : query[-1].stop] if query else ""


def _closing(query: Sequence[Token]) -> int:
    """The index of the parenthesis that closes the first one, or -1."""
    depth = 0
    for i, token in enumerate(query):
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if depth == 0:
            return i
    return -1
