"""Scores of the reference model by free generation on held-out samples."""

from collections.abc import Iterator

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from aquifer.workloads.reference.card import Score
from aquifer.workloads.reference.generate import GreedyGenerator
from aquifer.workloads.reference.tokenizer import BOS_ID, PieceEncoder
from aquifer.workloads.registry import MAKERS, SCORERS
from aquifer.workloads.tasks import TaskName

CASES: tuple[tuple[TaskName, int], ...] = (
    ("text2json", 2048),
    ("text2json", 4096),
    ("text2json", 8192),
    ("text2json", 16384),
    ("needles", 8192),
    ("table", 4096),
    ("table", 8192),
)


def evaluate(
    model: LlamaForCausalLM,
    encoder: PieceEncoder,
    tokenizer: PreTrainedTokenizerFast,
    samples: int,
    cases: tuple[tuple[TaskName, int], ...] = CASES,
) -> Iterator[Score]:
    """Score the first question of `samples` held-out documents (seeds 0, 1, ...) for each case."""
    generator = GreedyGenerator(model)
    for task, length in cases:
        drawn = [MAKERS[task](seed, length, encoder.count, "heldout") for seed in range(samples)]
        prompts = [[BOS_ID, *encoder.encode(s.document), *encoder.encode(s.inputs)] for s in drawn]
        # A correct answer's length and a little more: what runs on past it is wrong already.
        longest = max(encoder.count(s.answer) for s in drawn) + 32
        texts = [str(tokenizer.decode(ids)) for ids in generator(prompts, longest)]
        marks = [SCORERS[task](text, s.answer) for text, s in zip(texts, drawn, strict=True)]
        yield Score(task, length, samples, 100 * sum(marks) / samples)
