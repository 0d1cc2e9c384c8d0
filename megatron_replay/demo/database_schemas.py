"""The six small databases of the demo task: their tables, and the word lists from which their rows are drawn.

All are invented here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """A text that names the row: one word of each list, and no two rows have the same."""

    name: str
    phrase: str
    words: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Group:
    """A text that is the same in several rows."""

    name: str
    phrase: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """An amount, different in every row, so that "the largest" is one row.

    It lies in low..high, in steps of 1, or of 0.1 with one decimal.
    """

    name: str
    phrase: str
    low: int
    high: int
    decimals: int = 0


@dataclass(frozen=True)
class Link:
    """A foreign key to another table's id."""

    name: str
    parent: str


@dataclass(frozen=True)
class Table:
    """A table with `id` as its key, and the words that a question has for its rows."""

    name: str
    many: str
    rows: int
    label: Label
    groups: tuple[Group, ...]
    numbers: tuple[Number, ...]
    links: tuple[Link, ...] = ()

    def columns(self) -> Iterator[tuple[str, str]]:
        """Name and SQLite type of each column, in order."""
        yield "id", "INTEGER PRIMARY KEY"
        yield self.label.name, "TEXT"
        yield from ((group.name, "TEXT") for group in self.groups)
        yield from ((number.name, "REAL" if number.decimals else "INTEGER") for number in self.numbers)
        yield from ((link.name, f"INTEGER REFERENCES {link.parent}(id)") for link in self.links)


@dataclass(frozen=True)
class DatabaseSchema:
    """One database; a table comes after those it links to."""

    db_id: str
    tables: tuple[Table, ...]

    def compact(self) -> str:
        """The schema as the prompt shows it: one line a table."""
        lines = []
        for table in self.tables:
            parents = {link.name: f"{link.name} -> {link.parent}.id" for link in table.links}
            lines.append(f"{table.name}({', '.join(parents.get(name, name) for name, _ in table.columns())})")
        return "\n".join(lines)


def words(text: str) -> tuple[str, ...]:
    """The words of a text: a list that is easy to read."""
    return tuple(text.split())


FIRST = words(
    "Ada Bela Carl Dora Emil Fay Gus Hana Igor June Karl Lena Milo Nora Otto Pia Ravi Sara Tom Uma Vera Wim Yara Zeno"
)
LAST = words(
    "Abel Brook Cole Dunn Ekman Ford Gray Hale Ito Jansen Klein Lund Moss Novak Okoye Park Quist Reed Silva Tran "
    "Vogel Webb"
)
PEOPLE = (FIRST, LAST)
LANDS = ("Brazil", "Canada", "Egypt", "Finland", "India", "Japan", "Kenya", "Norway")
TOWNS = ("Ashford", "Birchwood", "Cliffside", "Deepwell", "Eastmere", "Foxhill")
MOODS = words("Silent Golden Hidden Broken Distant Gentle Lost Painted Quiet Restless Scarlet Wandering")
THINGS = words("River Garden Lantern Mountain Letter Orchestra Window Harvest Island Compass Winter Mirror")
SKIES = words("North South Morning Evening Silver Amber Coral Misty Bright Stormy")
BIRDS = words("Heron Gull Swan Falcon Petrel Tern Osprey Plover Curlew Puffin")

LIBRARY = DatabaseSchema(
    "library",
    (
        Table(
            "author", "authors", 24, Label("name", "name", PEOPLE), (Group("country", "country", LANDS),),
            (Number("birth_year", "birth year", 1900, 1990), Number("awards", "number of awards", 0, 40)),
        ),
        Table(
            "branch", "branches", 20, Label("name", "name", (SKIES, ("Square", "Street", "Park", "Hill"))),
            (Group("town", "town", TOWNS),),
            (Number("seats", "number of seats", 20, 240), Number("visitors", "number of visitors", 500, 9000)),
        ),
        Table(
            "book", "books", 60, Label("title", "title", (MOODS, THINGS)),
            (Group("genre", "genre", ("history", "mystery", "poetry", "romance", "science", "travel")),),
            (Number("pages", "number of pages", 80, 900), Number("price", "price", 5, 60, 1)),
            (Link("author_id", "author"), Link("branch_id", "branch")),
        ),
    ),
)  # fmt: skip
CLINIC = DatabaseSchema(
    "clinic",
    (
        Table(
            "ward", "wards", 20, Label("name", "name", (SKIES, ("Wing", "Ward"))),
            (Group("floor", "floor", ("ground", "first", "second")),),
            (Number("beds", "number of beds", 4, 48), Number("nurses", "number of nurses", 2, 40)),
        ),
        Table(
            "doctor", "doctors", 26, Label("name", "name", PEOPLE),
            (Group("specialty", "specialty", ("cardiology", "neurology", "pediatrics", "surgery", "dermatology")),),
            (Number("salary", "salary", 40_000, 160_000), Number("experience", "years of experience", 1, 42)),
            (Link("ward_id", "ward"),),
        ),
        Table(
            "patient", "patients", 60, Label("name", "name", PEOPLE),
            (Group("town", "town", TOWNS), Group("blood_type", "blood type", ("A", "B", "AB", "O"))),
            (Number("age", "age", 1, 99), Number("weight", "weight", 20, 120, 1)),
            (Link("doctor_id", "doctor"),),
        ),
    ),
)  # fmt: skip
CINEMA = DatabaseSchema(
    "cinema",
    (
        Table(
            "director", "directors", 24, Label("name", "name", PEOPLE), (Group("nationality", "nationality", LANDS),),
            (Number("age", "age", 25, 88), Number("debut_year", "debut year", 1950, 2015)),
        ),
        Table(
            "studio", "studios", 20, Label("name", "name", (BIRDS, ("Pictures", "Films"))),
            (Group("town", "town", TOWNS),),
            (Number("founded", "founding year", 1910, 2010), Number("employees", "number of employees", 5, 900)),
        ),
        Table(
            "film", "films", 56, Label("title", "title", (MOODS, THINGS)),
            (Group("genre", "genre", ("comedy", "drama", "horror", "musical", "thriller", "western")),),
            (Number("minutes", "length in minutes", 60, 210), Number("budget", "budget", 1, 90, 1)),
            (Link("director_id", "director"), Link("studio_id", "studio")),
        ),
    ),
)  # fmt: skip
SCHOOL = DatabaseSchema(
    "school",
    (
        Table(
            "teacher", "teachers", 22, Label("name", "name", PEOPLE),
            (Group("subject", "subject", ("art", "biology", "chemistry", "geography", "history", "music")),),
            (Number("age", "age", 23, 66), Number("salary", "salary", 28_000, 76_000)),
        ),
        Table(
            "club", "clubs", 24,
            Label("name", "name", (words("Chess Drama Robot Rowing Choir Garden"), words("Club Circle Team Guild"))),
            (Group("weekday", "weekday", ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")),),
            (Number("fee", "fee", 5, 80), Number("places", "number of places", 8, 60)),
            (Link("teacher_id", "teacher"),),
        ),
        Table(
            "pupil", "pupils", 60, Label("name", "name", PEOPLE),
            (Group("village", "village", TOWNS), Group("class", "class", ("1A", "1B", "2A", "2B", "3A"))),
            (Number("height", "height", 110, 190, 1), Number("points", "number of points", 0, 300)),
            (Link("club_id", "club"),),
        ),
    ),
)  # fmt: skip
HARBOUR = DatabaseSchema(
    "harbour",
    (
        Table(
            "captain", "captains", 22, Label("name", "name", PEOPLE), (Group("nationality", "nationality", LANDS),),
            (Number("age", "age", 28, 70), Number("voyages", "number of voyages", 3, 240)),
        ),
        Table(
            "ship", "ships", 30, Label("name", "name", (SKIES, BIRDS)),
            (Group("type", "type", ("ferry", "tanker", "trawler", "tug", "yacht")),
             Group("home_port", "home port", TOWNS)),
            (Number("length", "length", 12, 330, 1), Number("built", "building year", 1950, 2022)),
            (Link("captain_id", "captain"),),
        ),
        Table(
            "shipment", "shipments", 60,
            Label("code", "code",
                  (words("Alpha Bravo Delta Echo Kilo Lima Oscar Tango"), words("21 22 23 34 35 36 47 48 49"))),
            (Group("goods", "goods", ("coffee", "grain", "machines", "salt", "steel", "timber")),),
            (Number("tonnes", "weight in tonnes", 1, 900), Number("value", "value", 1000, 99_000)),
            (Link("ship_id", "ship"),),
        ),
    ),
)  # fmt: skip
ORCHARD = DatabaseSchema(
    "orchard",
    (
        Table(
            "grower", "growers", 20, Label("name", "name", PEOPLE), (Group("village", "village", TOWNS),),
            (Number("age", "age", 24, 80), Number("hectares", "number of hectares", 2, 90, 1)),
        ),
        Table(
            "plot", "plots", 28, Label("name", "name", (SKIES, ("Field", "Slope", "Terrace", "Meadow"))),
            (Group("soil", "soil", ("chalk", "clay", "loam", "peat", "sand")),),
            (Number("area", "area", 1, 40, 1), Number("altitude", "altitude", 40, 900)),
            (Link("grower_id", "grower"),),
        ),
        Table(
            "tree", "trees", 60,
            Label("tag", "tag", (words("Red Blue Green White Black Gold"), words("1 2 3 4 5 6 7 8 9 10 11 12"))),
            (Group("fruit", "fruit", ("apple", "cherry", "fig", "pear", "plum")),
             Group("health", "health", ("good", "fair", "poor"))),
            (Number("height", "height", 1, 12, 1), Number("planted", "planting year", 1930, 2020)),
            (Link("plot_id", "plot"),),
        ),
    ),
)  # fmt: skip

TRAIN = (LIBRARY, CLINIC, CINEMA, SCHOOL)
TEST = (HARBOUR, ORCHARD)
