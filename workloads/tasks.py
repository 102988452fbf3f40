"""What a context-intensive task is: one long document, one or more questions about it, exact answers.

On disk a question is one JSON line. `problem` (document and question together) and `answer` are the two
fields of the published Text2JSON set; `document` and `inputs` keep the parts apart, because a server that
stores the document's KV cache must know where the document ends.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

TaskName = Literal["text2json", "needles", "table"]
Split = Literal["train", "heldout"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """A question as the user types it after the document, and the text a perfect model generates."""

    inputs: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One document and what is asked about it; `questions` is never empty.

    A sample read from a file that holds only `problem` has an empty document: the whole prompt is `inputs`.
    """

    task: TaskName
    document: str
    questions: tuple[Question, ...]

    @property
    def inputs(self) -> str:
        return self.questions[0].inputs

    @property
    def answer(self) -> str:
        return self.questions[0].answer


def token_counter(tokenizer: PreTrainedTokenizerBase) -> CountTokens:
    """How many tokens a text has, special tokens not counted."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON line per question."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            for question in sample.questions:
                line = {
                    "problem": sample.document + question.inputs,
                    "answer": question.answer,
                    "task": sample.task,
                    "document": sample.document,
                    "inputs": question.inputs,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> Iterator[Sample]:
    """Read a JSON Lines file; neighbouring questions about the same document become one Sample.

    Lines need `problem` and `answer`; `task` defaults to "text2json", an `answer` that is not a string
    is taken as JSON data. Raises ValueError with the line number if a line is none of this.
    """
    current: Sample | None = None
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            sample = _parse_line(line, f"{path}:{number}")
            if current is None:
                current = sample
            elif sample.document and (sample.task, sample.document) == (current.task, current.document):
                current = Sample(current.task, current.document, current.questions + sample.questions)
            else:
                yield current
                current = sample
    if current is not None:
        yield current


def _parse_line(line: str, where: str) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or "answer" not in record:
        raise ValueError(f"{where}: expected an object with `problem` and `answer`")
    answer = record["answer"]
    if not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    if "document" in record and "inputs" in record:
        document, inputs = record["document"], record["inputs"]
    elif "problem" in record:
        document, inputs = "", record["problem"]
    else:
        raise ValueError(f"{where}: expected `problem`, or `document` and `inputs`")
    return Sample(record.get("task", "text2json"), document, (Question(inputs, answer),))
