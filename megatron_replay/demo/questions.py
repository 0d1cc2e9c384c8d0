"""Questions and their SQL, from templates.

A template has one query and several ways to ask for it. Its slots are filled from a table's own rows, so that most
queries find something:
- t is a table, p the table its link points to.
- `group`, `number` and `label` are columns, and `..._phrase` is the question's word for one.
- `value`, `bound`, `low`, `high`, `letter` and `word` are drawn from the rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from megatron_replay.demo.database_schemas import DatabaseSchema, Table

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""The rows of each table, each as column -> value."""

COMPARE = ((">", "more than"), ("<", "less than"), (">=", "at least"), ("<=", "at most"))
AGGREGATE = (("AVG", "average"), ("SUM", "total"), ("MIN", "lowest"), ("MAX", "highest"))
SORT = (("ASC", "lowest"), ("DESC", "highest"))


@dataclass(frozen=True)
class QuestionTemplate:
    """One kind of question. `sql` and `asked` name slots in braces."""

    name: str
    sql: str
    asked: tuple[str, ...]

    @property
    def needs_parent(self) -> bool:
        """True where a table that links to another one is needed."""
        return any(slot == "p" or slot.startswith("p_") for _, slot, _, _ in Formatter().parse(self.sql) if slot)


JOIN = "{t} JOIN {p} ON {t}.{link} = {p}.id"
TEMPLATES = tuple(
    QuestionTemplate(name, sql, tuple(asked))
    for name, sql, *asked in (
        (
            "count", "SELECT COUNT(*) FROM {t}",
            "How many {many} are there?", "Count the {many}.", "What is the number of {many}?",
        ),
        (
            "count_where", "SELECT COUNT(*) FROM {t} WHERE {group} = {value}",
            "How many {many} have the {group_phrase} {said}?", "Count the {many} whose {group_phrase} is {said}.",
        ),
        (
            "count_compare", "SELECT COUNT(*) FROM {t} WHERE {number} {op} {bound}",
            "How many {many} have {a_number} of {op_said} {bound}?",
            "Count the {many} with {a_number} of {op_said} {bound}.",
        ),
        (
            "list", "SELECT {label} FROM {t}",
            "List the {label_phrase} of all {many}.", "What is the {label_phrase} of each of the {many}?",
        ),
        (
            "list_two", "SELECT {label}, {number} FROM {t}",
            "List the {label_phrase} and the {number_phrase} of all {many}.",
            "Show every one of the {many} by {label_phrase} and {number_phrase}.",
        ),
        (
            "where", "SELECT {label} FROM {t} WHERE {group} = {value}",
            "Which {many} have the {group_phrase} {said}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} with {group_phrase} {said}.",
        ),
        (
            "where_not", "SELECT {label} FROM {t} WHERE {group} != {value}",
            "Which {many} have a {group_phrase} other than {said}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} whose {group_phrase} is not {said}.",
        ),
        (
            "compare", "SELECT {label} FROM {t} WHERE {number} {op} {bound}",
            "Which {many} have {a_number} of {op_said} {bound}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} with {a_number} of {op_said} {bound}.",
        ),
        (
            "between", "SELECT {label} FROM {t} WHERE {number} BETWEEN {low} AND {high}",
            "Which {many} have {a_number} between {low} and {high}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} whose {number_phrase} lies between {low} and {high}.",
        ),
        (
            "and", "SELECT {label} FROM {t} WHERE {group} = {value} AND {number} {op} {bound}",
            "Which {many} have the {group_phrase} {said} and {a_number} of {op_said} {bound}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} with {group_phrase} {said} and {a_number} of {op_said} {bound}.",
        ),
        (
            "in", "SELECT {label} FROM {t} WHERE {group} IN ({value}, {value2})",
            "Which {many} have the {group_phrase} {said} or {said2}? Give the {label_phrase}.",
            "List the {label_phrase} of {many} whose {group_phrase} is {said} or {said2}.",
        ),
        (
            "starts", "SELECT {label} FROM {t} WHERE {label} LIKE '{letter}%'",
            "Which {many} have a {label_phrase} that starts with {letter}? Give the {label_phrase}.",
            "List every {label_phrase} of the {many} that begins with {letter}.",
        ),
        (
            "contains", "SELECT {label}, {number} FROM {t} WHERE {label} LIKE '%{word}%'",
            "Give the {label_phrase} and {number_phrase} of the {many} whose {label_phrase} contains {word}.",
            "Find {many} with {word} in the {label_phrase}; show the {label_phrase} and the {number_phrase}.",
        ),
        (
            "aggregate", "SELECT {agg}({number}) FROM {t}",
            "What is the {agg_said} {number_phrase} of the {many}?",
            "Find the {agg_said} {number_phrase} over all {many}.",
        ),
        (
            "aggregate_where", "SELECT {agg}({number}) FROM {t} WHERE {group} = {value}",
            "What is the {agg_said} {number_phrase} of {many} with {group_phrase} {said}?",
            "Among the {many} whose {group_phrase} is {said}, what is the {agg_said} {number_phrase}?",
        ),
        (
            "min_max", "SELECT MIN({number}), MAX({number}) FROM {t}",
            "What are the lowest and the highest {number_phrase} of the {many}?",
            "Give the smallest and the largest {number_phrase} of all {many}.",
        ),
        (
            "distinct", "SELECT DISTINCT {group} FROM {t}",
            "Which different values of {group_phrase} do the {many} have?",
            "List each {group_phrase} of the {many} once.",
        ),
        (
            "count_distinct", "SELECT COUNT(DISTINCT {group}) FROM {t}",
            "How many different values of {group_phrase} do the {many} have?",
            "Count the distinct values of {group_phrase} among the {many}.",
        ),
        (
            "group_count", "SELECT {group}, COUNT(*) FROM {t} GROUP BY {group}",
            "How many {many} are there for each {group_phrase}?", "For each {group_phrase}, count the {many}.",
        ),
        (
            "group_aggregate", "SELECT {group}, {agg}({number}) FROM {t} GROUP BY {group}",
            "What is the {agg_said} {number_phrase} of the {many} for each {group_phrase}?",
            "For each {group_phrase}, find the {agg_said} {number_phrase} of the {many}.",
        ),
        (
            "having", "SELECT {group} FROM {t} GROUP BY {group} HAVING COUNT(*) > {k}",
            "Which values of {group_phrase} do more than {k} {many} share?",
            "Find each {group_phrase} that has more than {k} {many}.",
        ),
        (
            "most_common", "SELECT {group} FROM {t} GROUP BY {group} ORDER BY COUNT(*) DESC LIMIT 1",
            "Which {group_phrase} is the most common among the {many}?",
            "What {group_phrase} do most of the {many} have?",
        ),
        (
            "order", "SELECT {label} FROM {t} ORDER BY {number} {sort}",
            "List the {label_phrase} of the {many}, {sort_said} {number_phrase} first.",
            "Give the {label_phrase} of all {many} sorted by {number_phrase}, starting with the {sort_said}.",
        ),
        (
            "order_where", "SELECT {label} FROM {t} WHERE {group} = {value} ORDER BY {number} {sort}",
            "List the {label_phrase} of the {many} with {group_phrase} {said}, {sort_said} {number_phrase} first.",
            "Sort the {many} whose {group_phrase} is {said} by {number_phrase}, starting with the {sort_said}; give "
            "the {label_phrase}.",
        ),
        (
            "top", "SELECT {label} FROM {t} ORDER BY {number} {sort} LIMIT 1",
            "Which of the {many} has the {sort_said} {number_phrase}? Give the {label_phrase}.",
            "What is the {label_phrase} of the one with the {sort_said} {number_phrase} among the {many}?",
        ),
        (
            "top_k", "SELECT {label} FROM {t} ORDER BY {number} {sort} LIMIT {k}",
            "Which {k} {many} have the {sort_said} {number_phrase}? Give the {label_phrase}.",
            "List the {label_phrase} of the {k} {many} with the {sort_said} {number_phrase}.",
        ),
        (
            "join", "SELECT {t}.{label}, {p}.{p_label} FROM " + JOIN,
            "Show the {label_phrase} of each of the {many} with the {p_label_phrase} of its {p}.",
            "List all {many} by {label_phrase}, together with the {p_label_phrase} of the {p}.",
        ),
        (
            "join_where", "SELECT {t}.{label} FROM " + JOIN + " WHERE {p}.{p_group} = {p_value}",
            "Which {many} have a {p} with the {p_group_phrase} {p_said}? Give the {label_phrase}.",
            "List the {label_phrase} of the {many} whose {p} has the {p_group_phrase} {p_said}.",
        ),
        (
            "join_count", "SELECT COUNT(*) FROM " + JOIN + " WHERE {p}.{p_label} = {p_name}",
            "How many {many} does the {p} {p_named} have?", "Count the {many} that belong to the {p} {p_named}.",
        ),
        (
            "join_group", "SELECT {p}.{p_label}, COUNT(*) FROM " + JOIN + " GROUP BY {p}.id",
            "How many {many} does each {p} have? Show the {p_label_phrase} of the {p} and the count.",
            "For each {p} with {many}, give the {p_label_phrase} and the number of {many}.",
        ),
        (
            "join_aggregate", "SELECT {agg}({t}.{number}) FROM " + JOIN + " WHERE {p}.{p_group} = {p_value}",
            "What is the {agg_said} {number_phrase} of the {many} whose {p} has the {p_group_phrase} {p_said}?",
            "Find the {agg_said} {number_phrase} of {many} with a {p} of {p_group_phrase} {p_said}.",
        ),
        (
            "above_average", "SELECT {label} FROM {t} WHERE {number} > (SELECT AVG({number}) FROM {t})",
            "Which {many} have {a_number} above the average? Give the {label_phrase}.",
            "List the {label_phrase} of {many} whose {number_phrase} is higher than the average of all {many}.",
        ),
        (
            "not_in", "SELECT {p_label} FROM {p} WHERE id NOT IN (SELECT {link} FROM {t})",
            "Which {p_many} have no {many}? Give the {p_label_phrase}.",
            "List the {p_label_phrase} of the {p_many} without any {many}.",
        ),
        (
            "nested_in", "SELECT {p_label} FROM {p} WHERE id IN (SELECT {link} FROM {t} WHERE {group} = {value})",
            "Which {p_many} have {many} with the {group_phrase} {said}? Give the {p_label_phrase}.",
            "List the {p_label_phrase} of each {p} that has {many} whose {group_phrase} is {said}.",
        ),
    )
)  # fmt: skip


def ask(template: QuestionTemplate, schema: DatabaseSchema, rows: Rows, rng: random.Random) -> tuple[str, str]:
    """One question and its SQL: the template filled with a random table, columns and values."""
    tables = [table for table in schema.tables if table.links or not template.needs_parent]
    table = rng.choice(tables)
    slots = {**_own(table, rows[table.name], rng), **_words(rng)}
    if template.needs_parent:
        slots.update(_parent(schema, table, rows, rng))
    return rng.choice(template.asked).format_map(slots), template.sql.format_map(slots)


def _own(table: Table, rows: Sequence[Mapping[str, Any]], rng: random.Random) -> dict[str, Any]:
    group, number = rng.choice(table.groups), rng.choice(table.numbers)
    said, said2 = rng.sample(sorted({row[group.name] for row in rows}), 2)
    amounts = sorted(row[number.name] for row in rows)
    low = rng.randrange(len(amounts) // 2)
    high = rng.randrange(low + len(amounts) // 4, len(amounts))
    label = rng.choice(rows)[table.label.name]
    return {
        "t": table.name, "many": table.many, "label": table.label.name, "label_phrase": table.label.phrase,
        "group": group.name, "group_phrase": group.phrase,
        "said": said, "said2": said2, "value": quoted(said), "value2": quoted(said2),
        "number": number.name, "number_phrase": number.phrase,
        "a_number": f"a{'n' * (number.phrase[0] in 'aeiou')} {number.phrase}",
        "bound": rng.choice(amounts[2:-2]), "low": amounts[low], "high": amounts[high],
        "letter": label[0], "word": rng.choice(label.split()),
    }  # fmt: skip


def _words(rng: random.Random) -> dict[str, Any]:
    slots: dict[str, Any] = {"k": rng.randint(2, 9)}
    for name, pairs in (("op", COMPARE), ("agg", AGGREGATE), ("sort", SORT)):
        slots[name], slots[f"{name}_said"] = rng.choice(pairs)
    return slots


def _parent(schema: DatabaseSchema, table: Table, rows: Rows, rng: random.Random) -> dict[str, Any]:
    link = rng.choice(table.links)
    parent = next(other for other in schema.tables if other.name == link.parent)
    group = rng.choice(parent.groups)
    taken = rng.choice(rows[table.name])[link.name]  # a parent that has children
    row = rows[parent.name][taken - 1]
    return {
        "link": link.name, "p": parent.name, "p_many": parent.many,
        "p_label": parent.label.name, "p_label_phrase": parent.label.phrase,
        "p_group": group.name, "p_group_phrase": group.phrase,
        "p_said": row[group.name], "p_value": quoted(row[group.name]),
        "p_named": row[parent.label.name], "p_name": quoted(row[parent.label.name]),
    }  # fmt: skip


def quoted(text: str) -> str:
    """The text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
