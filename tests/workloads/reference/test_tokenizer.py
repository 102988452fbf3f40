from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import aquifer.server.models
from aquifer.workloads.needles import make_needles
from aquifer.workloads.reference.tokenizer import BOS_ID, EOS_ID, PAD_ID, PieceEncoder, load_tokenizer
from aquifer.workloads.tables import make_table
from aquifer.workloads.tasks import CountTokens, Sample
from aquifer.workloads.text2json import make_text2json

FOLDER = Path(aquifer.server.models.__file__).parent / "reference"
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
ENCODER = PieceEncoder(load_tokenizer(FOLDER))

Make = Callable[[int, int, CountTokens], Sample]


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet="aB1 \n\t.<>és日"))
def test_any_text_survives_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet="aB1 \n\t.<>és日"))
def test_composed_ids_are_the_tokenizers_ids(text: str) -> None:
    assert ENCODER.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("make", [make_text2json, make_needles, make_table])
def test_composed_ids_are_the_tokenizers_ids_on_documents(make: Make) -> None:
    sample = make(1, 2000, ENCODER.count)
    assert ENCODER.encode(sample.document) == TOKENIZER.encode(sample.document)


def test_special_tokens_are_never_made_from_text() -> None:
    assert [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id] == [
        BOS_ID,
        EOS_ID,
        PAD_ID,
    ]
    assert not {BOS_ID, EOS_ID, PAD_ID} & set(TOKENIZER.encode("x <eos> <bos> <pad>"))


def test_a_value_has_the_same_tokens_in_prose_and_in_json() -> None:
    value = TOKENIZER.encode("Kelmora 417")
    for text in ("shipment Kelmora 417 left", '{"name": "Kelmora 417"}'):
        ids = TOKENIZER.encode(text)
        assert any(ids[i : i + len(value)] == value for i in range(len(ids)))


@pytest.mark.parametrize("make", [make_text2json, make_needles, make_table])
@pytest.mark.parametrize("target", [1024, 8192])
def test_prompts_have_the_length_asked_for_and_answers_stay_short(make: Make, target: int) -> None:
    for seed in range(8):
        sample = make(seed, target, ENCODER.count)
        longest = max(ENCODER.count(question.inputs) for question in sample.questions)
        assert 0.95 * target <= 1 + ENCODER.count(sample.document) + longest <= target
        assert all(ENCODER.count(question.answer) <= 1100 for question in sample.questions)
