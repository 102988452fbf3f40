"""Quality is measured from the cache that came back from the store, and the codec's worth is visible."""

from pathlib import Path

import pytest

from aquifer.server.settings import Settings
from aquifer.workloads.evaluation import EvalPlan, EvalResult, evaluate
from aquifer.workloads.tasks import Question, Sample, write_samples

TOKENS = 1536
SAMPLES = 3


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def measured() -> dict[str, EvalResult]:
    """Negative log likelihood of the expected answers under every kind of cache, bundled model."""
    settings = Settings(ram_bytes=1 << 30, device="cpu")
    plans = {kv: EvalPlan("perplexity", kv, TOKENS, SAMPLES) for kv in ("full", "raw", "aqua:2", "higgs:2")}
    return {kv: evaluate(plan, settings, silent) for kv, plan in plans.items()}


def nll(result: EvalResult) -> float:
    assert result.nll is not None
    return result.nll


def test_the_store_itself_costs_nothing(measured: dict[str, EvalResult]) -> None:
    assert nll(measured["raw"]) == pytest.approx(nll(measured["full"]), abs=1e-4)


def test_answers_are_scored_over_restored_segments(measured: dict[str, EvalResult]) -> None:
    assert measured["full"].restored_tokens == 0
    for kv in ("raw", "aqua:2", "higgs:2"):
        # All but the tail of each prompt, which is shorter than a segment.
        assert measured[kv].prompt_tokens - measured[kv].restored_tokens <= SAMPLES * 256
        assert measured[kv].restored_tokens > 0


def test_two_bits_with_predictors_are_near_lossless_and_without_are_not(
    measured: dict[str, EvalResult],
) -> None:
    loss = {kv: nll(result) - nll(measured["full"]) for kv, result in measured.items()}
    assert loss["aqua:2"] < 0.001
    assert loss["higgs:2"] > 0.005


def test_equal_bits_for_both(measured: dict[str, EvalResult]) -> None:
    assert measured["aqua:2"].bits_per_value == measured["higgs:2"].bits_per_value
    assert measured["aqua:2"].bits_per_value < 2.6 < measured["raw"].bits_per_value


def test_a_file_in_the_published_format_is_read_and_its_unusable_answers_left_out(tmp_path: Path) -> None:
    answer = '[{"name": "Mowmir", "city": "Vofgos", "badge": "A1-1111"}]'
    document = "The resident Mowmir carries badge A1-1111; she lives in Vofgos. " * 6
    repeated = '[{"name": "Mowmir"}, {"name": "Mowmir"}]'
    samples = [
        Sample("text2json", document, (Question("Extract all persons as JSON.", text),))
        for text in (answer, repeated)
    ]
    write_samples(tmp_path / "file.jsonl", samples)
    plan = EvalPlan("text2json", "full", data=tmp_path / "file.jsonl")
    result = evaluate(plan, Settings(ram_bytes=1 << 28, device="cpu"), silent)
    assert result.samples == 1
    assert result.score is not None


def test_a_file_without_usable_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"problem": "x", "answer": "no list"}\n')
    with pytest.raises(ValueError, match="no usable samples"):
        evaluate(EvalPlan("text2json", "full", data=tmp_path / "file.jsonl"), Settings(device="cpu"), silent)
