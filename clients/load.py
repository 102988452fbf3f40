"""A small load generator: so many askers at once, and how long they waited.

    python -m aquifer.clients.load http://localhost:8080 contract.txt "Who signed?" --askers 8 --questions 5

Every asker puts its questions one after the other, all about the same document. What counts is the
time to the first token as the client sees it, network and tokenization included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from aquifer.clients.client import AsyncClient
from aquifer.clients.errors import AquiferError
from aquifer.clients.protocol import Sampling
from aquifer.clients.types import Answer, Token


@dataclass(frozen=True)
class Sample:
    """One answered question, as its asker saw it."""

    ttft_seconds: float
    total_seconds: float
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class LoadReport:
    """What a run showed. Percentiles are of single requests; tokens_per_second of all together."""

    requests: int
    errors: int
    seconds: float
    ttft_p50_seconds: float
    ttft_p90_seconds: float
    ttft_p99_seconds: float
    tokens_per_second: float
    cached_ratio: float


async def run_load(
    url: str,
    document: str,
    question: str,
    *,
    askers: int,
    questions: int,
    max_new_tokens: int = 64,
    api_key: str | None = None,
) -> LoadReport:
    """Put `askers * questions` questions, `askers` at a time. Refused requests count as errors."""
    started = time.perf_counter()
    async with AsyncClient(url, api_key=api_key) as client:
        sampling = Sampling(max_new_tokens=max_new_tokens)
        rounds = await asyncio.gather(
            *(_ask(client, document, question, sampling, questions) for _ in range(askers))
        )
    seconds = time.perf_counter() - started
    return _report([sample for samples in rounds for sample in samples], askers * questions, seconds)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] if ordered else 0.0


async def _ask(
    client: AsyncClient, document: str, question: str, sampling: Sampling, questions: int
) -> list[Sample]:
    samples = []
    for _ in range(questions):
        started = time.perf_counter()
        first: float | None = None
        try:
            async for item in client.generate_stream(question, document=document, sampling=sampling):
                if isinstance(item, Token) and first is None:
                    first = time.perf_counter() - started
                if isinstance(item, Answer):
                    total = time.perf_counter() - started
                    samples.append(
                        Sample(
                            first or total,
                            total,
                            item.generated_tokens,
                            item.prompt_tokens,
                            item.cached_tokens.total,
                        )
                    )
        except AquiferError:
            # Counted by its absence: the report compares samples with requests.
            continue
    return samples


def _report(samples: list[Sample], requests: int, seconds: float) -> LoadReport:
    waits = [sample.ttft_seconds for sample in samples]
    prompt_tokens = sum(sample.prompt_tokens for sample in samples)
    return LoadReport(
        requests=requests,
        errors=requests - len(samples),
        seconds=seconds,
        ttft_p50_seconds=percentile(waits, 0.5),
        ttft_p90_seconds=percentile(waits, 0.9),
        ttft_p99_seconds=percentile(waits, 0.99),
        tokens_per_second=sum(sample.generated_tokens for sample in samples) / seconds,
        cached_ratio=sum(sample.cached_tokens for sample in samples) / prompt_tokens
        if prompt_tokens
        else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("file", type=Path, help="the document")
    parser.add_argument("question")
    parser.add_argument("--askers", type=int, default=4)
    parser.add_argument("--questions", type=int, default=4, help="per asker")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--api-key")
    options = parser.parse_args()
    report = asyncio.run(
        run_load(
            options.url,
            options.file.read_text(),
            options.question,
            askers=options.askers,
            questions=options.questions,
            max_new_tokens=options.max_new_tokens,
            api_key=options.api_key,
        )
    )
    print(json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
