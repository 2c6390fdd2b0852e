"""The kinds of task: each function draws one instruction that has exactly one right answer.

Answers are short and plain. So a small model learns their form within a few hundred rows, and comparing them letter by letter is fair.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Common English words, most of them a single token in any vocabulary.
NAMES = _words("Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Nina Omar Paul Rosa Sam Tom Vera")
CITIES = _words(
    "Athens Berlin Cairo Dublin Florence Geneva Hamburg Istanbul Jakarta Kyoto Lima Lisbon London Madrid Milan Nairobi Oslo "
    "Paris Prague Rome Seoul Sydney Tokyo Vienna Warsaw"
)
THINGS = _words("apples books coins cards eggs keys pens stamps shells tickets")
NOUNS = _words(
    "apple bird bread bridge chair cloud door dream engine field fire flower garden glass hand house island jacket kitchen "
    "lake letter light market mirror money mountain music night ocean orange paper pencil piano plant price queen rain river "
    "road school ship snow stone summer table train tree village voice wall water window winter yard"
)
ADJECTIVES = _words("big blue cold daily first full green happy local new old quick red small")
MONTHS = _words("January February March April May June July August September October November December")
REVIEWED = _words(
    "album book breakfast concert dinner film game hotel meal movie play room service show soup story trip view"
)
PRAISE = _words("amazing beautiful brilliant excellent fantastic great lovely perfect superb wonderful")
BLAME = _words("awful bad boring disappointing dreadful horrible poor sad terrible weak")

# A unit, a smaller one, and how many of the smaller make one.
UNITS = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000),
    ("euros", "cents", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
)
# A symbol per value, the subtractive pairs included, so that greedy division writes 44 as XL IV.
ROMAN = ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


@dataclass(frozen=True)
class Task:
    """An instruction, the input that it applies to, and the right answer."""

    instruction: str
    input: str
    output: str


def convert_units(random: Random) -> Task:
    """A whole number of a larger unit, converted to a smaller one."""
    large, small, factor = random.choice(UNITS)
    amount = random.randint(2, 40)
    phrasing = random.choice(("Convert to {small}.", "How many {small} is this?", "Give this in {small}."))
    return Task(phrasing.format(small=small), f"{amount} {large}", f"{amount * factor} {small}")


def solve_word_problem(random: Random) -> Task:
    """A sum or a difference below 20, told as a story; the answer is the number."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    have, change = random.randint(6, 12), random.randint(1, 5)
    verb, sign = random.choice(
        (("finds", 1), ("buys", 1), ("gets", 1), ("loses", -1), ("sells", -1), ("gives away", -1))
    )
    story = f"{name} has {have} {thing} and {verb} {change}."
    phrasing = random.choice(("How many {thing} does {name} have now?", "How many {thing} are there in the end?"))
    return Task(phrasing.format(thing=thing, name=name), story, str(have + sign * change))


def extract_json(random: Random) -> Task:
    """The person and the city of a sentence, as one JSON object."""
    name, city = random.choice(NAMES), random.choice(CITIES)
    sentence = random.choice(
        (
            "{name} lives in {city}.",
            "{name} moved to {city} last year.",
            "In {city} I met {name}.",
            "{name} flew to {city}.",
        )
    )
    phrasing = random.choice(
        ("Extract name and city as JSON.", "Who and where? Answer in JSON.", "Write name and city in JSON.")
    )
    return Task(phrasing, sentence.format(name=name, city=city), json.dumps({"name": name, "city": city}))


def sort_numbers(random: Random) -> Task:
    """Three or four different numbers in ascending order."""
    numbers = random.sample(range(1, 60), random.choice((3, 4)))
    phrasing = random.choice(("Sort the numbers.", "Put these in ascending order.", "Order from smallest to largest."))
    return Task(phrasing, _listed(numbers), _listed(sorted(numbers)))


def sort_words(random: Random) -> Task:
    """Three words in alphabetical order."""
    chosen = random.sample(NOUNS, 3)
    phrasing = random.choice(
        ("Sort alphabetically.", "Put these words in alphabetical order.", "Order the words from A to Z.")
    )
    return Task(phrasing, _listed(chosen), _listed(sorted(chosen)))


def write_iso_date(random: Random) -> Task:
    """A date in words, rewritten in ISO 8601."""
    day = date(1990, 1, 1) + timedelta(days=random.randrange(40 * 365))
    month = MONTHS[day.month - 1]
    spelled = random.choice((f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"))
    phrasing = random.choice(("Write this date as YYYY-MM-DD.", "Give the ISO date.", "Convert the date to ISO 8601."))
    return Task(phrasing, spelled, day.isoformat())


def count_words(random: Random) -> Task:
    """How many words a list has."""
    chosen = random.sample(NOUNS, random.randint(2, 8))
    phrasing = random.choice(("How many words are listed?", "Count the words.", "How many items are in this list?"))
    return Task(phrasing, _listed(chosen), str(len(chosen)))


def join_words(random: Random) -> Task:
    """Words joined into an identifier."""
    chosen = [random.choice(ADJECTIVES), *random.sample(NOUNS, random.choice((1, 2)))]
    phrasing, answer = random.choice(
        (
            ("Write this in snake_case.", "_".join(chosen)),
            ("Write this in kebab-case.", "-".join(chosen)),
            ("Write this as a file name with dots.", ".".join(chosen)),
        )
    )
    return Task(phrasing, " ".join(chosen), answer)


def write_roman(random: Random) -> Task:
    """A number below 50 that names a chapter, king or part, in Roman numerals."""
    number, part = random.randint(1, 49), random.choice(("Chapter", "Part", "Volume", "Book", "Act", "Section"))
    phrasing = random.choice(
        ("Write the number in Roman numerals.", "Use a Roman numeral.", "Change the number to Roman.")
    )
    return Task(phrasing, f"{part} {number}", f"{part} {roman(number)}")


def judge_review(random: Random) -> Task:
    """Whether a short review is positive or negative."""
    verdict = random.choice(("positive", "negative"))
    adjective = random.choice(PRAISE if verdict == "positive" else BLAME)
    thing, extent = random.choice(REVIEWED), random.choice(("was", "is", "was really", "was simply"))
    phrasing = random.choice(("Positive or negative?", "Is this review positive or negative?", "Name the sentiment."))
    return Task(phrasing, f"The {thing} {extent} {adjective}.", verdict)


def roman(number: int) -> str:
    """`number` (1 to 89) in Roman numerals."""
    symbols = ""
    for value, symbol in ROMAN:
        repeat, number = divmod(number, value)
        symbols += symbol * repeat
    return symbols


def _listed(items: list[int] | list[str]) -> str:
    return ", ".join(str(item) for item in items)


KINDS: dict[str, Callable[[Random], Task]] = {
    "units": convert_units,
    "word_problem": solve_word_problem,
    "json": extract_json,
    "sort_numbers": sort_numbers,
    "sort_words": sort_words,
    "date": write_iso_date,
    "count": count_words,
    "case": join_words,
    "roman": write_roman,
    "sentiment": judge_review,
}
