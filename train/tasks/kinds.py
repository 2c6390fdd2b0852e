"""The kinds of task: each function draws one instruction with exactly one right answer.

The answers are short and plain, so that a small model learns their form within a few hundred rows, and so that comparing
answers letter by letter is fair.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from train.tasks import words


@dataclass(frozen=True)
class Task:
    """An instruction, what it is applied to, and the right answer."""

    instruction: str
    input: str
    output: str


def convert_units(random: Random) -> Task:
    """A whole number of a larger unit in a smaller one."""
    large, small, factor = random.choice(words.UNITS)
    amount = random.randint(2, 40)
    phrasing = random.choice(("Convert to {small}.", "How many {small} is this?", "Give this in {small}."))
    return Task(phrasing.format(small=small), f"{amount} {large}", f"{amount * factor} {small}")


def solve_word_problem(random: Random) -> Task:
    """A sum or a difference below 20, told as a story; the answer is the number."""
    name, thing = random.choice(words.NAMES), random.choice(words.THINGS)
    have, change = random.randint(6, 12), random.randint(1, 5)
    verb, sign = random.choice(
        (("finds", 1), ("buys", 1), ("gets", 1), ("loses", -1), ("sells", -1), ("gives away", -1))
    )
    story = f"{name} has {have} {thing} and {verb} {change}."
    phrasing = random.choice(("How many {thing} does {name} have now?", "How many {thing} are there in the end?"))
    return Task(phrasing.format(thing=thing, name=name), story, str(have + sign * change))


def extract_json(random: Random) -> Task:
    """A person and a city out of a sentence, as one JSON object."""
    name, city = random.choice(words.NAMES), random.choice(words.CITIES)
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
    chosen = random.sample(words.NOUNS, 3)
    phrasing = random.choice(
        ("Sort alphabetically.", "Put these words in alphabetical order.", "Order the words from A to Z.")
    )
    return Task(phrasing, _listed(chosen), _listed(sorted(chosen)))


def write_iso_date(random: Random) -> Task:
    """A date in words, in ISO 8601."""
    day = date(1990, 1, 1) + timedelta(days=random.randrange(40 * 365))
    month = words.MONTHS[day.month - 1]
    spelled = random.choice((f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"))
    phrasing = random.choice(("Write this date as YYYY-MM-DD.", "Give the ISO date.", "Convert the date to ISO 8601."))
    return Task(phrasing, spelled, day.isoformat())


def count_words(random: Random) -> Task:
    """How many words a list has."""
    chosen = random.sample(words.NOUNS, random.randint(2, 8))
    phrasing = random.choice(("How many words are listed?", "Count the words.", "How many items are in this list?"))
    return Task(phrasing, _listed(chosen), str(len(chosen)))


def join_words(random: Random) -> Task:
    """Words in the form of an identifier."""
    chosen = [random.choice(words.ADJECTIVES), *random.sample(words.NOUNS, random.choice((1, 2)))]
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
    number, place = random.randint(1, 49), random.choice(("Chapter", "Part", "Volume", "Book", "Act", "Section"))
    phrasing = random.choice(
        ("Write the number in Roman numerals.", "Use a Roman numeral.", "Change the number to Roman.")
    )
    return Task(phrasing, f"{place} {number}", f"{place} {roman(number)}")


def judge_review(random: Random) -> Task:
    """Whether a short review is positive or negative."""
    verdict = random.choice(("positive", "negative"))
    adjective = random.choice(words.PRAISE if verdict == "positive" else words.BLAME)
    thing, extent = random.choice(words.REVIEWED), random.choice(("was", "is", "was really", "was simply"))
    phrasing = random.choice(("Positive or negative?", "Is this review positive or negative?", "Name the sentiment."))
    return Task(phrasing, f"The {thing} {extent} {adjective}.", verdict)


def roman(number: int) -> str:
    """`number` (1 to 89) in Roman numerals."""
    symbols = ""
    for value, symbol in words.ROMAN:
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
