"""Calibration texts for the bundled model: documents of its own kind, from the training split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from aquifer.workloads.needles import make_needles
from aquifer.workloads.tables import make_table
from aquifer.workloads.tasks import CountTokens
from aquifer.workloads.text2json import make_text2json

_LENGTHS = (2048, 4096, 8192)
# Mostly the main task, as in training.
_MAKERS = (make_text2json, make_text2json, make_needles, make_text2json, make_table)


def calibration_texts(seed: int, count_tokens: CountTokens) -> Iterator[str]:
    """Endless documents, each followed by a question and its answer; tasks and lengths take turns."""
    for number in itertools.count():
        make = _MAKERS[number % len(_MAKERS)]
        sample = make(seed * 1_000_000 + number, _LENGTHS[number % len(_LENGTHS)], count_tokens, "train")
        yield sample.document + sample.inputs + sample.answer
