"""Scores of one answer, each between 0 and 1. A set's score is 100 times the mean."""

import json
import re
from collections import Counter
from typing import Any

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def score_text2json(prediction: str, answer: str) -> float:
    """Compare two JSON lists of flat objects that have a `name` and further string fields.

    The prediction must hold exactly one `[` and one `]`, and the slice between them must parse as JSON.
    Items match by exact name. With n fields besides the name in the expected item, a matched item counts
    1, minus 1/n per missing or null field, minus 1/(2n) per wrong value. Unknown, nameless and repeated
    items each enlarge the denominator: sum / (expected items + spurious items).

    Raises ValueError if `answer` itself is no list of objects with distinct names (see `is_scoreable`).
    Source: KV-Cache Offloading for Context-Intensive Tasks, arXiv 2604.08426 (n = 2 there).
    """
    expected = _expected_items(answer)
    if expected is None:
        raise ValueError("the expected answer is no JSON list of objects with distinct names")
    predicted = _parse_list(prediction)
    if predicted is None:
        return 0.0

    total, spurious, seen = 0.0, 0, set[str]()
    for item in predicted:
        name = _text(item.get("name")) if isinstance(item, dict) else None
        if name is None or name not in expected or name in seen:
            spurious += 1
            continue
        seen.add(name)
        total += _item_score(item, expected[name])
    denominator = len(expected) + spurious
    return total / denominator if denominator else 1.0


def is_scoreable(answer: str) -> bool:
    """Whether an expected answer is usable; published sets hold a few with repeated names."""
    return _expected_items(answer) is not None


def score_needles(prediction: str, answer: str) -> float:
    """Share of the expected values that occur in the prediction.

    answer: a JSON object {place: value} or a JSON list of values.
    """
    expected = json.loads(answer)
    values = list(expected.values()) if isinstance(expected, dict) else list(expected)
    if not values:
        raise ValueError("the expected answer names no needle")
    return sum(str(value) in prediction for value in values) / len(values)


def score_table(prediction: str, answer: str) -> float:
    """F1 over rows of two TSV texts whose first line is the header (which is not counted).

    Rows match exactly after normalization: lower case, no punctuation, no articles, no white space.
    Source: LongProc, HTML to TSV.
    """
    header, *expected_rows = _rows(answer)
    predicted_rows = _rows(prediction)
    if predicted_rows and predicted_rows[0] == header:
        predicted_rows = predicted_rows[1:]
    expected, predicted = Counter(expected_rows), Counter(predicted_rows)
    if not expected or not predicted:
        return float(expected == predicted)
    # 2PR/(P+R) with P = hits/predicted and R = hits/expected.
    return 2 * (expected & predicted).total() / (expected.total() + predicted.total())


def _expected_items(answer: str) -> dict[str, dict[str, Any]] | None:
    try:
        items = json.loads(answer)
    except json.JSONDecodeError:
        return None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return None
    by_name = {name: item for item in items if (name := _text(item.get("name"))) is not None}
    return by_name if len(by_name) == len(items) else None


def _parse_list(prediction: str) -> list[Any] | None:
    if prediction.count("[") != 1 or prediction.count("]") != 1:
        return None
    try:
        items = json.loads(prediction[prediction.index("[") : prediction.index("]") + 1])
    except (json.JSONDecodeError, RecursionError):
        return None
    return items if isinstance(items, list) else None


def _item_score(item: dict[str, Any], expected: dict[str, Any]) -> float:
    fields = [field for field in expected if field != "name"]
    if not fields:
        return 1.0
    penalty = 0.0
    for field in fields:
        value = _text(item.get(field))
        if value is None:
            penalty += 1.0
        elif value != _text(expected[field]):
            penalty += 0.5
    return 1.0 - penalty / len(fields)


def _text(value: Any) -> str | None:
    """A value as the string it is compared by; None for null. Containers compare by their JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    # Models write the typographic apostrophe where the document has the plain one, and the reverse.
    return text.replace("’", "'")


def _rows(tsv: str) -> list[tuple[str, ...]]:
    return [tuple(_normal(cell) for cell in line.split("\t")) for line in tsv.strip().splitlines() or [""]]


def _normal(cell: str) -> str:
    words = _PUNCTUATION.sub("", cell.lower()).split()
    return "".join(word for word in words if word not in _ARTICLES)
