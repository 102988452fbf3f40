import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aquifer.workloads.kinds import KINDS
from aquifer.workloads.needles import NEEDLES, make_needles
from aquifer.workloads.scoring import score_needles, score_table, score_text2json
from aquifer.workloads.tables import make_table
from aquifer.workloads.tasks import Sample, read_samples, write_samples
from aquifer.workloads.text2json import make_text2json

MAKERS = [make_text2json, make_needles, make_table]
SCORERS = {"text2json": score_text2json, "needles": score_needles, "table": score_table}
Maker = Callable[..., Sample]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_same_seed_gives_the_same_sample(make: Maker, split: str) -> None:
    assert make(3, 900, len, split) == make(3, 900, len, split)
    assert make(3, 900, len, split) != make(4, 900, len, split)


@pytest.mark.parametrize("make", MAKERS)
def test_splits_differ(make: Maker) -> None:
    assert make(3, 900, len, "train").document != make(3, 900, len, "heldout").document


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("target", [2000, 5000, 65536])
def test_the_prompt_fills_the_length_asked_for(make: Maker, target: int) -> None:
    for seed in range(10):
        sample = make(seed, target, lambda text: -(-len(text) // 2))
        longest = max(-(-len(question.inputs) // 2) for question in sample.questions)
        # Pieces are counted one by one, each rounded up, so the whole is a little shorter than their sum.
        assert 0.9 * target <= 1 + len(sample.document) // 2 + longest <= target


@pytest.mark.parametrize("make", MAKERS)
def test_every_expected_answer_scores_full_marks(make: Maker) -> None:
    for seed in range(20):
        sample = make(seed, 3000, len)
        for question in sample.questions:
            assert SCORERS[sample.task](question.answer, question.answer) == 1.0


@pytest.mark.parametrize("make", MAKERS)
def test_too_short_a_length_is_refused_with_the_number(make: Maker) -> None:
    with pytest.raises(ValueError, match="100"):
        make(0, 100, len)


def test_text2json_asks_several_questions_whose_values_stand_in_the_document_in_order() -> None:
    fields_of = {("name", *(field.key for field in kind.fields)) for kind in KINDS}
    for seed in range(20):
        sample = make_text2json(seed, 6000, len)
        assert len(sample.questions) >= 2
        for question in sample.questions:
            records = json.loads(question.answer)
            assert {tuple(record) for record in records} <= fields_of
            assert len({record["name"] for record in records}) == len(records) > 0
            for record in records:
                for value in record.values():
                    assert value in sample.document
                    assert not set(value) & set('[]{}"\\')
            place = 0
            for record in records:
                place = sample.document.index(record["name"], place) + 1


def test_needles_are_spread_over_the_whole_document() -> None:
    sample = make_needles(1, 12_000, len)
    values = list(json.loads(sample.answer).values())
    depths = [sample.document.index(value) / len(sample.document) for value in values]
    assert len(values) == NEEDLES
    for number, depth in enumerate(depths):
        assert depth == pytest.approx(number / (NEEDLES - 1), abs=0.08)


def test_names_of_the_splits_never_coincide() -> None:
    def names(split: str) -> set[str]:
        found = set()
        for seed in range(60):
            for question in make_text2json(seed, 6000, len, split).questions:
                for record in json.loads(question.answer):
                    for value in record.values():
                        found |= {word for word in value.split() if word.isalpha() and len(word) > 5}
        return found

    train, heldout = names("train"), names("heldout")
    assert len(train) > 500 and len(heldout) > 500
    assert train & heldout <= {
        "January",
        "February",
        "August",
        "September",
        "October",
        "November",
        "December",
    }


def test_samples_survive_a_file(tmp_path: Path) -> None:
    samples = [make(1, 3000, len) for make in MAKERS]
    write_samples(tmp_path / "set.jsonl", samples)
    assert list(read_samples(tmp_path / "set.jsonl")) == samples


def test_a_file_with_only_problem_and_answer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "published.jsonl"
    path.write_text(
        '{"problem": "text. question?", "answer": [{"name": "x"}]}\n\n{"problem": "b", "answer": "[]"}\n'
    )
    first, second = read_samples(path)
    assert (first.document, first.inputs, json.loads(first.answer)) == (
        "",
        "text. question?",
        [{"name": "x"}],
    )
    assert (second.inputs, second.answer) == ("b", "[]")


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"problem": "x"}', '{"answer": "x"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        list(read_samples(path))
