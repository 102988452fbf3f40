"""Training examples, generated while training runs: no epoch, no file, no example twice."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aquifer.workloads.reference.tokenizer import BOS_ID, EOS_ID, PAD_ID, PieceEncoder
from aquifer.workloads.registry import MAKERS
from aquifer.workloads.tasks import CountTokens, Sample, TaskName

TASK_SHARES: dict[TaskName, float] = {"text2json": 0.65, "needles": 0.2, "table": 0.15}
TASKS: tuple[TaskName, ...] = tuple(TASK_SHARES)
# Eleven needles with their answer, or a page of tables, need this much room.
_ALL_TASKS_FROM = 1100

PADDING, DOCUMENT, ANSWER = 0, 1, 2


class Example(NamedTuple):
    """One row: token ids, and for each of them whether it is DOCUMENT (or question) or ANSWER."""

    task: TaskName
    ids: list[int]
    roles: list[int]


class Batch(NamedTuple):
    """ids: [B, T] int16, roles: [B, T] uint8, tasks: [B] index into TASKS."""

    ids: Tensor
    roles: Tensor
    tasks: Tensor


def make_sample(task: TaskName, seed: int, target_tokens: int, count_tokens: CountTokens) -> Sample:
    """A training-split sample of any task."""
    return MAKERS[task](seed, target_tokens, count_tokens, "train")


def make_example(rng: random.Random, length: int, encoder: PieceEncoder) -> Example:
    """<bos> document question answer <eos>, at most `length` tokens; the parts are tokenized separately."""
    task: TaskName = "text2json"
    if length >= _ALL_TASKS_FROM:
        task = rng.choices(TASKS, list(TASK_SHARES.values()))[0]
    target = int(length * rng.uniform(0.74, 0.98))
    while True:
        target = max(target, 256 if task == "text2json" else 640)
        sample = make_sample(task, rng.getrandbits(48), target, encoder.count)
        question = rng.choice(sample.questions)
        prompt = [BOS_ID, *encoder.encode(sample.document), *encoder.encode(question.inputs)]
        answer = [*encoder.encode(question.answer), EOS_ID]
        excess = len(prompt) + len(answer) - length
        if excess <= 0:
            return Example(task, prompt + answer, [DOCUMENT] * len(prompt) + [ANSWER] * len(answer))
        target -= max(excess, 16)


@dataclass(frozen=True)
class BatchStream(IterableDataset[Batch]):
    """Endless batches; each has one length, drawn by `length_shares`, and `tokens` tokens."""

    length_shares: dict[int, float]
    tokens: int
    encoder: PieceEncoder
    seed: str

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        lengths, shares = list(self.length_shares), list(self.length_shares.values())
        while True:
            yield self._batch(rng, rng.choices(lengths, shares)[0])

    def _batch(self, rng: random.Random, length: int) -> Batch:
        rows = self.tokens // length
        ids = torch.full((rows, length), PAD_ID, dtype=torch.int16)
        roles = torch.full((rows, length), PADDING, dtype=torch.uint8)
        tasks = torch.empty(rows, dtype=torch.int64)
        for row in range(rows):
            example = make_example(rng, length, self.encoder)
            ids[row, : len(example.ids)] = torch.tensor(example.ids, dtype=torch.int16)
            roles[row, : len(example.ids)] = torch.tensor(example.roles, dtype=torch.uint8)
            tasks[row] = TASKS.index(example.task)
        return Batch(ids, roles, tasks)


def batches(stream: BatchStream, workers: int) -> Iterator[Batch]:
    """Iterate over `stream`, made by `workers` processes (0: in this one)."""
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )
