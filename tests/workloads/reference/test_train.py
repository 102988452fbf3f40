"""A few steps of a tiny model: the loop, its checkpoints and the export; not whether it learns the task."""

import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aquifer.workloads.reference.card import read_card
from aquifer.workloads.reference.data import ANSWER, make_example
from aquifer.workloads.reference.scores import evaluate
from aquifer.workloads.reference.tokenizer import BOS_ID, EOS_ID, PieceEncoder, load_tokenizer
from aquifer.workloads.reference.train import Settings, Stage, train_reference

TINY = Settings(
    total_seconds=4.0,
    step_tokens=1152,
    workers=0,
    layers=1,
    hidden=32,
    mlp=48,
    stages=(Stage({576: 1.0}, 100.0, 1.0, 0.1), Stage({1152: 1.0}, 0.0, 1.0, 0.1)),
    tokenizer_samples=40,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:  # as many steps on a slow machine as on a fast one
        patch.setattr(time, "monotonic", lambda: 0.1 * next(calls))
        train_reference(folder / "model", TINY, checkpoint=folder / "state.pt", evaluate_after=False)
    return folder


def test_the_export_loads_with_transformers_and_the_card_tells_the_run(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    card = read_card(trained / "model")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == EOS_ID
    assert tokenizer.decode(tokenizer.encode("Kelmora 417\n")) == "Kelmora 417\n"
    assert card.steps > 0 and card.train_tokens >= card.steps * 576
    assert any("stage 1" in line for line in card.log)


@pytest.mark.parametrize("source", ["state.pt", "model"])
def test_training_resumes_from_a_checkpoint_and_from_weights_alone(
    trained: Path, tmp_path: Path, source: str
) -> None:
    before = read_card(trained / "model")
    longer = replace(TINY, total_seconds=before.train_seconds + 2.0)
    card = train_reference(tmp_path / "model", longer, resume=trained / source, evaluate_after=False)
    assert card.steps > before.steps and card.train_tokens > before.train_tokens
    assert card.log[: len(before.log)] == before.log
    tokenizer = (trained / "model" / "tokenizer.json").read_text()
    assert (tmp_path / "model" / "tokenizer.json").read_text() == tokenizer


def test_an_example_is_document_question_answer_and_fits(trained: Path) -> None:
    encoder = PieceEncoder(load_tokenizer(trained / "model"))
    rng = random.Random(0)
    for length in (576, 1152, 2304):
        task, ids, roles = make_example(rng, length, encoder)
        assert ids[0] == BOS_ID and ids[-1] == EOS_ID and len(ids) == len(roles) <= length
        assert roles[-1] == ANSWER and roles == sorted(roles)
        assert task in ("text2json", "needles", "table")


def test_an_untrained_model_scores_nothing(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = load_tokenizer(trained / "model")
    cases = (("text2json", 512), ("needles", 700), ("table", 600))
    scores = list(evaluate(model, PieceEncoder(tokenizer), tokenizer, samples=2, cases=cases))
    assert [(score.task, score.prompt_tokens, score.samples) for score in scores] == [
        (t, n, 2) for t, n in cases
    ]
    assert all(score.score < 20 for score in scores)
