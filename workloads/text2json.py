"""Text2JSON: find every record of one kind in a long text and write them as JSON.

Records of several kinds are written as prose in many phrasings and lie scattered among filler sentences
and each other. Names resemble each other on purpose: an answer is right only if it was copied.
"""

import json
import random

from aquifer.workloads.kinds import KINDS, Field, Kind
from aquifer.workloads.prose import (
    LEADS,
    Budget,
    capitalized,
    coined_word,
    digits,
    filler,
    invented_word,
    paragraph_breaks,
)
from aquifer.workloads.tasks import CountTokens, Question, Sample, Split

# {head} is the noun phrase with the name, {a} and {b} the two clauses in either order. Last two held out.
_FRAMES = (
    "{head} {a} and {b}.",
    "{head} {a}, and {b}.",
    "{head} {a}. {Pronoun} also {b}.",
    "{head} {a}; {pronoun} {b}.",
    "according to the records, {head} {a} and {b}.",
    "{head}, so the register says, {a} and {b}.",
    "we know that {head} {a} and that {pronoun} {b}.",
    "it was noted that {head} {a} and {b}.",
    "the records say that {head} {a}, and that {pronoun} also {b}.",
)
_HELDOUT_FRAMES = 2

# Last two held out.
_QUESTIONS = (
    "Extract all {plural} as JSON.",
    "Extract all {plural} as JSON.",
    "Extract all {plural} as JSON",
    "extract all {plural} as json",
    "Extract every {singular} with {fields} as JSON.",
    "List all {plural} as JSON.",
    "List every {singular} as JSON.",
    "Return all {plural} as a JSON list.",
    "Give me a JSON list of all {plural} with {fields}.",
    "Which {plural} are mentioned? Answer in JSON.",
    "Find all {plural} in the text and write them as JSON.",
    "What {plural} are there? Write {fields} as JSON.",
    "Write all {plural} of the text as a JSON list.",
    "Find every {singular} and return JSON.",
)
_HELDOUT_QUESTIONS = 2

# Training also composes noun phrases from these, never the one that is held out for the kind.
_HEAD_STARTS = ("", "", "the ", "this ", "a certain ")
_HEAD_LINKS = (
    *("", "", "called ", "named ", "no. ", "number ", "code ", "model "),
    *("node ", "type ", "labelled ", "known as ", "entry "),
    *("Dr ", "Prof ", "Sir "),
)
_VARIED_SHARE = 0.7
_VARIED_HEADS_SHARE = 0.5
_INVENTED_CLAUSES_SHARE = 0.35
_HELDOUT_PHRASING_SHARE = 0.3
_REUSED_NAME_SHARE = 0.06
_SIMILAR_NAME_SHARE = 0.3


def make_text2json(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout"
) -> Sample:
    """A document with records of several kinds, and one question for each kind in it (at least two).

    The prompt (beginning-of-text token, document and longest question) has at most `target_tokens` tokens
    and at least 95 % of it; `count_tokens` counts without special tokens. Answers stay below about 1,000
    tokens up to 8k and 1,400 beyond. Raises ValueError if `target_tokens` is too small for two kinds.
    """
    if target_tokens < 256:
        raise ValueError(f"target_tokens is {target_tokens}; Text2JSON needs at least 256")
    rng = random.Random(f"text2json/{split}/{seed}")
    while True:
        records, document, questions = _draw(rng, target_tokens, count_tokens, split)
        asked = [kind for kind in records if records[kind]]
        if len(asked) >= 2:
            rng.shuffle(asked)
            return Sample("text2json", document, tuple(_ask(kind, questions, records) for kind in asked))


def _ask(kind: Kind, questions: dict[str, str], records: dict[Kind, list[dict[str, str]]]) -> Question:
    return Question(questions[kind.singular], json.dumps(records[kind], ensure_ascii=False))


def _draw(
    rng: random.Random, target_tokens: int, count_tokens: CountTokens, split: Split
) -> tuple[dict[Kind, list[dict[str, str]]], str, dict[str, str]]:
    writer = _Writer(rng, split)
    kinds = rng.sample(KINDS, k=rng.randint(2, 4) if target_tokens < 3000 else rng.randint(3, 8))
    questions = {kind.singular: writer.question(kind) for kind in kinds}
    budget = Budget(target_tokens - 1 - max(map(count_tokens, questions.values())), count_tokens)

    record_share = rng.uniform(0.3, 1.0)
    weights = [rng.uniform(0.2, 1.0) for _ in kinds]
    separator = paragraph_breaks(rng)
    limit = 16 if target_tokens <= 10_000 else 24
    found: dict[Kind, list[dict[str, str]]] = {kind: [] for kind in kinds}
    pieces: list[str] = []
    while True:
        kind = rng.choices(kinds, weights)[0]
        if rng.random() < record_share and len(found[kind]) < limit:
            values = writer.record(kind)
            piece = writer.prose(kind, values) + separator()
            if not budget.take(piece):
                break
            found[kind].append(values)
        else:
            piece = filler(rng, split) + separator()
            if not budget.take(piece):
                break
        pieces.append(piece)
    pieces += budget.fill(rng, split, separator)
    return found, "".join(pieces), questions


class _Writer:
    """Draws the records of one document and puts them into words."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng, self._split = rng, split
        self._names: dict[Kind, list[str]] = {}
        # Most training documents hold phrases that are composed anew, partly of words that mean nothing:
        # what a value is must then be seen from the sentence and from its form, which is what held-out
        # phrases ask for.
        self._varied = split == "train" and rng.random() < _VARIED_SHARE
        unseen = split == "heldout" and rng.random() < _HELDOUT_PHRASING_SHARE
        self._frames = _FRAMES if unseen else _FRAMES[:-_HELDOUT_FRAMES]
        self._questions = _QUESTIONS if unseen else _QUESTIONS[:-_HELDOUT_QUESTIONS]
        self._phrases = slice(None) if unseen else slice(-1)

    def record(self, kind: Kind) -> dict[str, str]:
        values = {"name": self._name(kind)}
        for field in kind.fields:
            values[field.key] = field.value(self._rng, self._split)
        return values

    def prose(self, kind: Kind, values: dict[str, str]) -> str:
        head = self._head(kind).format(values["name"])
        clauses = [self._clause(field).format(values[field.key]) for field in kind.fields]
        self._rng.shuffle(clauses)
        frame = self._rng.choice(self._frames)
        pronoun = kind.pronoun
        return capitalized(
            frame.format(head=head, a=clauses[0], b=clauses[1], pronoun=pronoun, Pronoun=pronoun.capitalize())
        )

    def _head(self, kind: Kind) -> str:
        if self._varied and self._rng.random() < _VARIED_HEADS_SHARE:
            word = invented_word(self._rng)
            noun = self._rng.choice(
                (kind.singular,) * 3 + (f"{word} {kind.singular}", f"{kind.singular} {word}")
            )
            head = f"{self._rng.choice(_HEAD_STARTS)}{noun} {self._rng.choice(_HEAD_LINKS)}{{}}"
            if head != kind.heads[-1]:
                return head
        return self._rng.choice(kind.heads[self._phrases])

    def _clause(self, field: Field) -> str:
        if self._varied and self._rng.random() < _INVENTED_CLAUSES_SHARE:
            words = [invented_word(self._rng) for _ in range(self._rng.randint(1, 3))]
            return " ".join([*words, "{}"])
        return self._rng.choice(field.clauses[self._phrases])

    def question(self, kind: Kind) -> str:
        fields = f"name, {kind.fields[0].key} and {kind.fields[1].key}"
        text = self._rng.choice(self._questions).format(
            singular=kind.singular, plural=kind.plural, fields=fields
        )
        return self._rng.choice(LEADS) + text

    def _name(self, kind: Kind) -> str:
        """A name new to its kind; often close to an earlier one, now and then that of another kind."""
        own = self._names.setdefault(kind, [])
        while True:
            draw = self._rng.random()
            others = [
                n for k, names in self._names.items() if k is not kind and k.name is kind.name for n in names
            ]
            if draw < _REUSED_NAME_SHARE and others:
                name = self._rng.choice(others)
            elif draw < _REUSED_NAME_SHARE + _SIMILAR_NAME_SHARE and own:
                name = self._similar(self._rng.choice(own))
            else:
                name = kind.name(self._rng, self._split)
            if name not in own:
                own.append(name)
                return name

    def _similar(self, name: str) -> str:
        """One word replaced, or else one digit changed."""
        words = name.split(" ")
        place = self._rng.randrange(len(words))
        if words[place].isalpha():
            words[place] = coined_word(self._rng, self._split)
            return " ".join(words)
        spots = [i for i, c in enumerate(name) if c.isdigit()]
        spot = self._rng.choice(spots)
        return name[:spot] + digits(self._rng, 1) + name[spot + 1 :]
