"""Guesses of how an answer goes on, so that a model can check many tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST_MATCH = 32
"""Last tokens of an answer that are looked for, at most."""


@dataclass(frozen=True)
class Guesser:
    """Goes on as the expected answer does, or the prompt, or the answer itself, where they read the same.

    A wrong answer mostly copies other values of the prompt, repeats itself, or comes back to what is expected
    behind a single wrong value; so most tokens are guessed right either way.
    """

    prompt: Sequence[int]
    expected: Sequence[int]
    longest: int = 32
    """Tokens guessed at once; 0 for none"""

    def after(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow an answer that begins with `tokens`; tokens: not empty.

        Looks for the place where the most of the last tokens stand in a row, and of several such places takes
        the one nearest to where the expected answer is as long as `tokens`.
        """
        source = np.array([*self.prompt, *tokens[:-1], *self.expected])
        aim = len(self.prompt) + len(tokens) - 1 + len(tokens)
        behind = np.flatnonzero(source == tokens[-1]) + 1
        for back in range(2, min(len(tokens), LONGEST_MATCH) + 1):
            longer = behind[behind >= back]
            longer = longer[source[longer - back] == tokens[-back]]
            if not len(longer):
                break
            behind = longer
        if not len(behind):
            return []
        place = behind[np.abs(behind - aim).argmin()]
        guess: list[int] = source[place : place + min(count, self.longest)].tolist()
        return guess
