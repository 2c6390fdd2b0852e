"""The vocabulary of the tasks: common English words, most of them one token in any vocabulary."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


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
ROMAN = ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
