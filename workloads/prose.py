"""Coined words, codes and filler sentences that the generated documents are made of.

Nothing here can be guessed: a model that answers correctly has read the document.
"""

import random
import string
from collections.abc import Callable
from zlib import crc32

from aquifer.workloads.tasks import CountTokens, Split


def _list(text: str, separator: str = "|") -> tuple[str, ...]:
    return tuple(text.split(separator))


_CONSONANTS = "bdfghjklmnprstvwz"
_VOWELS = "aeiou"
_UNUSED_LETTERS = "cqxy"
_ENDINGS = ("", "", "a", "o", "en", "is")
_MONTHS = _list("January February March April May June July August September October November December", " ")
_WEEKDAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday", " ")
_SUBJECTS = _list(
    "the harbour office|the council|the night watch|an old teacher|the local paper|the gardener|a visitor|"
    "the railway board|the museum|a group of students|the baker|the ferry crew|the archive|the choir|"
    "the weather station|a retired judge|the road crew|the library|the market hall|the mayor"
)
_VERBS = _list(
    "discussed|ignored|praised|repaired|described|forgot|painted|measured|announced|closed|visited|"
    "postponed|photographed|inspected|remembered|rebuilt|questioned|approved"
)
_OBJECTS = _list(
    "the old bridge|the new timetable|a quiet street|the north gate|the summer festival|the clock tower|"
    "the water supply|a broken lamp|the long winter|the fish market|a stone wall|the annual budget|"
    "the reading room|the second platform|a small garden|the southern road|the tide tables|the empty hall"
)
_TAILS = _list(
    "before noon|without much noise|for the third time|in heavy rain|with some delay|as usual|after lunch|"
    "during the holidays|despite the cold|at the end of the week|by candle light|with great care"
)
_SHORT = ("It rained.", "Nobody spoke.", "The day was long.", "Time passed.", "All was quiet that evening.")

# What stands between a document and a question in practice; most clients send the bare question.
LEADS = ("", "", "", "\n", "\n\n", " ", "\n\nQuestion: ")


def _syllables(split: Split) -> list[str]:
    every = [a + v + b for a in _CONSONANTS for v in _VOWELS for b in _CONSONANTS]
    return [s for s in every if (crc32(s.encode()) % 5 == 0) == (split == "heldout")]


# Three letters each, and endings of 0, 1 or 2 letters: a word splits into syllables in one way only, so
# words of the two splits can never coincide.
_SYLLABLES: dict[Split, list[str]] = {"train": _syllables("train"), "heldout": _syllables("heldout")}


def coined_word(rng: random.Random, split: Split) -> str:
    """A capitalized word that exists in no other split, of two or three syllables.

    One training word in four is a string of random letters instead, so that a model learns to copy what
    it has never seen. It holds a letter that no syllable has, which keeps the splits apart.
    """
    if split == "train" and rng.random() < 0.25:
        word = rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))
        word[rng.randrange(len(word))] = rng.choice(_UNUSED_LETTERS)
        return "".join(word).capitalize()
    syllables = rng.choices(_SYLLABLES[split], k=rng.choice((2, 2, 2, 3)))
    return ("".join(syllables) + rng.choice(_ENDINGS)).capitalize()


def invented_word(rng: random.Random) -> str:
    """A lower-case word of one or two training syllables, with or without a verb's ending."""
    return "".join(rng.choices(_SYLLABLES["train"], k=rng.randint(1, 2))) + rng.choice(("", "s", "ed", "es"))


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=count))


def date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2049)
    if rng.random() < 0.5:
        return f"{year}-{month + 1:02d}-{day:02d}"
    return f"{day} {_MONTHS[month]} {year}"


def filler(rng: random.Random, split: Split) -> str:
    """A sentence that answers no question; some carry a name or a number, as real text does."""
    subject, verb = rng.choice(_SUBJECTS), rng.choice(_VERBS)
    target, tail = rng.choice(_OBJECTS), rng.choice(_TAILS)
    shape = rng.randrange(6)
    if shape == 0:
        sentence = f"on {rng.choice(_WEEKDAYS)} {subject} {verb} {target} {tail}."
    elif shape == 1:
        sentence = f"{subject} {verb} {target}, and {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} it {tail}."
    elif shape == 2:
        sentence = f"{subject} {verb} {target} near {coined_word(rng, split)}."
    elif shape == 3:
        sentence = f"in {rng.randint(1900, 2049)} {subject} {verb} {target}."
    elif shape == 4:
        sentence = f"{coined_word(rng, split)} {coined_word(rng, split)} {verb} {target} {tail}."
    else:
        sentence = f"{subject} {verb} {target} {tail}."
    return capitalized(sentence)


def capitalized(sentence: str) -> str:
    """First letter in upper case, the rest untouched (str.capitalize would lower it)."""
    return sentence[0].upper() + sentence[1:]


def paragraph_breaks(rng: random.Random) -> Callable[[], str]:
    """What follows a sentence: one document has paragraphs, another one line per sentence, or one block."""
    line_share = rng.choice((0.0, 0.15, 0.15, 1.0))
    return lambda: "\n" if rng.random() < line_share else " "


class Budget:
    """Counts the tokens of pieces as they are added to a document."""

    def __init__(self, tokens: int, count_tokens: CountTokens) -> None:
        self.left = tokens
        self._count = count_tokens

    def take(self, piece: str) -> bool:
        """Book a piece if it still fits."""
        cost = self._count(piece)
        if cost > self.left:
            return False
        self.left -= cost
        return True

    def fill(self, rng: random.Random, split: Split, separator: Callable[[], str]) -> list[str]:
        """Filler sentences, ever shorter, until next to nothing fits any more."""
        pieces: list[str] = []
        misses = 0
        while misses < 6:
            sentence = filler(rng, split) if misses < 3 else rng.choice(_SHORT)
            piece = sentence + separator()
            if self.take(piece):
                pieces.append(piece)
            else:
                misses += 1
        return pieces
