"""Multi-needle retrieval: eleven facts at depths 0 to 100 % of a long text, asked for all at once.

Source of the layout: KV-Cache Offloading for Context-Intensive Tasks, arXiv 2604.08426.
"""

import json
import random

from aquifer.workloads.prose import LEADS, Budget, coined_word, digits, filler, letters, paragraph_breaks
from aquifer.workloads.tasks import CountTokens, Question, Sample, Split

NEEDLES = 11
_SECRETS = ("access code", "magic number", "locker key", "radio call sign", "vault number")
_PHRASES = (
    "The {secret} of {place} is {value}.",
    "For {place} the {secret} is {value}.",
    "{place} has the {secret} {value}.",
    "Note that the {secret} of {place} is {value}.",
    "In {place} they use the {secret} {value}.",  # held out
)
_QUESTIONS = (
    "What are the {secret}s? Answer in JSON.",
    "Give me every {secret} as JSON.",
    "List the {secret} of every place as JSON.",
    "Find every {secret} in the text and return JSON.",  # held out
)


def make_needles(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout"
) -> Sample:
    """A long filler text with eleven facts of one sort (and a few of another) and one question.

    The answer is a JSON object {place: value} in document order. Prompt length as in `make_text2json`.
    Raises ValueError if `target_tokens` is too small to hold the facts.
    """
    if target_tokens < 512:
        raise ValueError(f"target_tokens is {target_tokens}; eleven needles need at least 512")
    rng = random.Random(f"needles/{split}/{seed}")
    unseen = split == "heldout" and rng.random() < 0.3
    asked, decoy = rng.sample(_SECRETS, k=2)
    question = rng.choice(LEADS) + rng.choice(_QUESTIONS if unseen else _QUESTIONS[:-1]).format(secret=asked)
    phrases = _PHRASES if unseen else _PHRASES[:-1]
    separator = paragraph_breaks(rng)

    budget = Budget(target_tokens - 1 - count_tokens(question), count_tokens)
    facts: dict[str, str] = {}
    needles: list[str] = []
    decoys: list[str] = []
    for _ in range(NEEDLES):
        place, value = _fact(rng, split, facts)
        needles.append(rng.choice(phrases).format(secret=asked, place=place, value=value) + separator())
    for _ in range(rng.randint(0, 6)):
        # A decoy may speak of a place that also has the secret asked for.
        place = rng.choice(list(facts)) if rng.random() < 0.5 else coined_word(rng, split)
        text = rng.choice(phrases).format(secret=decoy, place=place, value=_value(rng)) + separator()
        decoys.append(text)
    for piece in needles + decoys:
        if not budget.take(piece):
            raise ValueError(f"target_tokens is {target_tokens}: the needles alone do not fit")

    hay: list[str] = []
    while budget.take(piece := filler(rng, split) + separator()):
        hay.append(piece)
    hay += budget.fill(rng, split, separator)
    for text in decoys:
        hay.insert(rng.randint(0, len(hay)), text)
    depths = [round(len(hay) * number / (NEEDLES - 1)) for number in range(NEEDLES)]
    for depth, text in zip(reversed(depths), reversed(needles), strict=True):
        hay.insert(depth, text)  # from the last to the first, so that earlier depths do not shift
    return Sample("needles", "".join(hay), (Question(question, json.dumps(facts, ensure_ascii=False)),))


def _fact(rng: random.Random, split: Split, facts: dict[str, str]) -> tuple[str, str]:
    """Add one place that is new to `facts`, with its value."""
    while (place := coined_word(rng, split)) in facts:
        pass
    facts[place] = _value(rng)
    return place, facts[place]


def _value(rng: random.Random) -> str:
    return digits(rng, 7) if rng.random() < 0.5 else f"{letters(rng, 2)}-{digits(rng, 5)}"
