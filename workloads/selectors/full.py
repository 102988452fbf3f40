"""All of the prompt on the device: the yardstick."""

from dataclasses import dataclass

from torch import Tensor

from aquifer.workloads.selectors.base import ExactRows, Prompt, ends


@dataclass(frozen=True)
class Full:
    """Dense attention over the exact cache."""

    @property
    def shared(self) -> bool:
        return False

    def ranker(self) -> None:
        return None

    def store(self) -> ExactRows:
        return ExactRows()

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        return ends(prompt, prompt.tokens, 0)

    def selected(self, tokens: int) -> int:
        return 0
