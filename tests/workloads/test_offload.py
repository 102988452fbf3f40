"""What a method may see, what it costs, and that seeing everything changes nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import greedy_reference, tiny_model
from torch import Tensor

from aquifer.kernels.landmarks import select_tokens
from aquifer.server.models.adapter import Attend, DecoderAdapter
from aquifer.workloads.guesses import Guesser
from aquifer.workloads.offload import Decoded, Method, decode, prefill
from aquifer.workloads.selectors.base import ExactKeys, Prompt, attention_share, choose
from aquifer.workloads.selectors.coded import (
    FourBitRows,
    Landmarks,
    ResidualRows,
    encoded_tokens,
    token_codec,
)
from aquifer.workloads.selectors.shadowkv import LowRankKeys
from aquifer.workloads.selectors.spec import parse_method

TOKENS = 1237
ROOM = 24
EOS = (299,)
FAMILIES = ("llama", "llama3-rope", "qwen3")


def prompt_ids(tokens: int = TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 298, (tokens,), generator=generator).tolist()


class Case:
    """A tiny model, one prompt read by it, and what plain `generate` answers."""

    def __init__(self, family: str) -> None:
        model = tiny_model(family)
        self.adapter = DecoderAdapter(model, max_tokens=4096)
        means = torch.linspace(-1, 1, self.adapter.spec.channels).expand(self.adapter.spec.num_layers, -1)
        self.prompt, self.logits = prefill(self.adapter, prompt_ids(), means.to(self.adapter.device))
        self.expected = greedy_reference(model, prompt_ids(), ROOM)

    def answers(
        self, *specs: str, guesser: Guesser | None = None, eos: tuple[int, ...] = EOS
    ) -> list[Decoded]:
        methods = [Method.of(spec, parse_method(spec)) for spec in specs]
        return decode(
            self.adapter, self.prompt, self.logits, methods, room=ROOM, eos_token_ids=eos, guesser=guesser
        )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("llama")


ALL_OF_IT = [
    "window:1",
    "oracle:1",
    "oracle:1:heads=shared",
    "landmarks:1:rows=exact",
    "landmarks:1:rows=exact:heads=shared:mean=off",
    "chunks:1:rows=exact",
    "chunks:1:rows=exact:chunk=7",
    "quest:1",
    "shadowkv:1:rank=32",
    "shadowkv:1:rank=32:outliers=0:window=0",
]


def test_full_answers_like_plain_generate(case: Case) -> None:
    (answer,) = case.answers("full")
    assert [*answer.tokens, *(EOS if answer.stopped else ())] == case.expected


def test_a_whole_budget_of_exact_rows_answers_like_full(case: Case) -> None:
    full, *others = case.answers("full", *ALL_OF_IT)
    for spec, other in zip(ALL_OF_IT, others, strict=True):
        if "shadowkv" in spec:  # keys of full rank, rounded to 16 bits
            assert other.tokens[:4] == full.tokens[:4], spec
        else:
            assert other.tokens == full.tokens, spec
        assert other.costs.budget == 1.0, spec


def test_answers_do_not_depend_on_what_else_is_in_the_batch(llama: Case) -> None:
    specs = ["landmarks:0.2", "full", "landmarks:0.1", "oracle:0.1", "quest:0.2"]
    together = llama.answers(*specs)
    for spec, answer in zip(specs, together, strict=True):
        assert llama.answers(spec)[0].tokens == answer.tokens, spec


def test_a_small_budget_changes_answers(llama: Case) -> None:
    full, window = llama.answers("full", "window:0.01")
    assert full.tokens != window.tokens


def test_an_answer_ends_at_the_end_token_and_does_not_hold_it(llama: Case) -> None:
    (answer,) = llama.answers("full")
    end = answer.tokens[5]
    (cut,) = llama.answers("full", eos=(298, end))
    assert cut.stopped and cut.tokens == answer.tokens[: answer.tokens.index(end)]


EVERY_KIND = [
    "full",
    "window:0.1",
    "oracle:0.1",
    "oracle:0.1:heads=shared",
    "landmarks:0.1",
    "landmarks:0.1:heads=shared:rows=residual",
    "chunks:0.1",
    "quest:0.2",
    "shadowkv:0.1:rank=8:outliers=80",
]


class Passes:
    """Counts the tokens of every pass through a model."""

    def __init__(self, adapter: DecoderAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        forward = adapter.forward

        def counted(ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
            self.sizes.append(len(ids))
            return forward(ids, positions, attend)

        monkeypatch.setattr(adapter, "forward", counted)


@pytest.mark.parametrize("kind", ["right", "one wrong", "one left out", "all wrong", "nothing known"])
def test_guesses_change_neither_tokens_nor_recall(case: Case, kind: str) -> None:
    one_by_one = case.answers(*EVERY_KIND)
    right = one_by_one[0].tokens
    expected = {
        "right": right,
        "one wrong": [*right[:7], 5, *right[8:]],
        "one left out": [*right[:7], *right[8:]],
        "all wrong": [(token + 1) % 298 for token in right],
        "nothing known": [],
    }[kind]
    prompt = [] if kind == "nothing known" else prompt_ids()
    guessed = case.answers(*EVERY_KIND, guesser=Guesser(prompt, expected))
    for spec, plain, fast in zip(EVERY_KIND, one_by_one, guessed, strict=True):
        assert (fast.tokens, fast.stopped, fast.costs) == (plain.tokens, plain.stopped, plain.costs), spec
        assert fast.recall == pytest.approx(plain.recall, abs=1e-3), spec


def test_a_guessed_end_is_the_end(llama: Case) -> None:
    (answer,) = llama.answers("full")
    end = answer.tokens[5]
    guesser = Guesser(prompt_ids(), answer.tokens)
    assert llama.answers("full", guesser=guesser, eos=(end,)) == llama.answers("full", eos=(end,))


def test_right_guesses_are_checked_many_at_a_time(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama.answers("full")[0].tokens
    for longest, sizes in ((0, [1] * (ROOM - 1)), (8, [9, 9, 5]), (99, [ROOM - 1])):
        passes = Passes(llama.adapter, monkeypatch)
        llama.answers("full", guesser=Guesser([], right, longest))
        assert passes.sizes == sizes
        monkeypatch.undo()


def test_wrong_guesses_become_few(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(llama.adapter, monkeypatch)
    first = llama.answers("full")[0].tokens[0]
    passes.sizes.clear()
    llama.answers("full", guesser=Guesser([], [first] * 99))
    assert passes.sizes[0] == ROOM - 1 and max(passes.sizes[1:]) <= 5


def test_the_oracle_recalls_everything_and_others_do_not(llama: Case) -> None:
    oracle, shared, landmarks, chunks = llama.answers(
        "oracle:0.1", "oracle:0.1:heads=shared", "landmarks:0.1", "chunks:0.1"
    )
    layers = llama.adapter.spec.num_layers
    assert oracle.recall == shared.recall == [1.0] * layers
    assert all(0 < layer < 1 for layer in landmarks.recall) and len(landmarks.recall) == layers
    assert sum(chunks.recall) < sum(landmarks.recall)


def test_methods_that_choose_nothing_have_no_recall(llama: Case) -> None:
    assert [answer.recall for answer in llama.answers("full", "window:0.1")] == [[], []]


@pytest.mark.parametrize(
    ("spec", "exact", "selected"),
    [
        ("full", TOKENS, 0),
        ("window:0.1", 124, 0),
        ("oracle:0.1", 68, 124 - 68),
        ("landmarks:0.1", 68, 124 - 68),
        ("chunks:0.1", 8 + 69, 40),
        ("quest:0.2", 32 + 80 + 5, 128),
        ("shadowkv:0.1:rank=8:outliers=80", 80 + 32 + 5, 120),
        ("shadowkv:0.1:rank=8:outliers=0", 32 + 5, 120),
    ],
)
def test_budget_and_bytes_are_accounted_for(llama: Case, spec: str, exact: int, selected: int) -> None:
    method = Method.of(spec, parse_method(spec))
    kept = method.selector.exact_tokens(llama.prompt)
    assert kept.shape[2] == exact
    assert all(len(set(head.tolist())) == exact for head in kept.flatten(0, 1))
    assert method.selector.selected(TOKENS) == selected
    costs = llama.answers(spec)[0].costs
    assert costs.budget == pytest.approx((exact + selected) / TOKENS)
    if method.ranker is not None:
        assert costs.fetched_bytes == selected * method.store.read(llama.prompt).host_bytes


def test_bytes_of_each_part_of_a_method(llama: Case) -> None:
    heads, head_dim, layers = 2, 16, 3
    exact = 68 / TOKENS * layers * heads * head_dim * 2 * 2
    separate, residual, oracle = llama.answers("landmarks:0.1", "landmarks:0.1:rows=residual", "oracle:0.1")
    # Landmark: 2 bits per value and a scale; row: key and value of 4 bits and two scales.
    assert separate.costs.device_bytes == pytest.approx(layers * heads * (head_dim / 4 + 2) + exact)
    assert separate.costs.fetched_bytes == 56 * layers * heads * (head_dim + 4)
    assert residual.costs.device_bytes == separate.costs.device_bytes
    assert residual.costs.fetched_bytes == 56 * layers * heads * (head_dim / 4 + 2 + head_dim / 2 + 2)
    assert separate.costs.bits - residual.costs.bits == pytest.approx(1.0)
    assert oracle.costs.fetched_bytes == 56 * layers * heads * head_dim * 4


@pytest.mark.parametrize("spec", ["landmarks:0.05", "oracle:0.05", "chunks:0.06", "quest:0.05"])
def test_a_budget_that_leaves_nothing_to_choose_is_refused(llama: Case, spec: str) -> None:
    with pytest.raises(ValueError, match=f"of {TOKENS} tokens"):
        llama.answers(spec)


def test_a_rank_beyond_the_channels_is_refused(llama: Case) -> None:
    with pytest.raises(ValueError, match="rank is 40; keys of this model have 32 channels"):
        llama.answers("shadowkv:0.1:rank=40")


def test_without_means_the_mean_must_be_switched_off(llama: Case) -> None:
    prompt, logits = prefill(llama.adapter, prompt_ids(200), None)
    for spec in ("landmarks:0.5", "landmarks:0.5:mean=off"):
        methods = [Method.of(spec, parse_method(spec))]
        if "off" in spec:
            assert decode(llama.adapter, prompt, logits, methods, room=2, eos_token_ids=EOS)
        else:
            with pytest.raises(ValueError, match="aquifer calibrate"):
                decode(llama.adapter, prompt, logits, methods, room=2, eos_token_ids=EOS)


def random_queries(prompt: Prompt, steps: int) -> Tensor:
    return torch.randn(steps, 6, 16, generator=torch.Generator().manual_seed(2)).to(prompt.keys.device)


@pytest.mark.parametrize("mean", [True, False])
def test_decoded_landmarks_score_like_packed_codes(llama: Case, mean: bool) -> None:
    prompt = llama.prompt
    codec, scorer = token_codec(prompt, mean), Landmarks(mean).read(prompt)
    queries = random_queries(prompt, 3)
    for layer, encoded in enumerate(encoded_tokens(prompt, mean)):
        scores = scorer.score(layer, queries)
        for query, found in zip(queries, scores, strict=True):
            torch.testing.assert_close(
                found, codec.score(query, encoded.codes, encoded.scales), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_are_chosen_as_the_kernel_chooses_them(llama: Case, shared: bool) -> None:
    scores = ExactKeys().read(llama.prompt).score(0, random_queries(llama.prompt, 1))[0]
    nothing_barred = torch.zeros(1 if shared else 2, TOKENS, dtype=torch.bool, device=scores.device)
    chosen = choose(attention_share(scores), nothing_barred, 50, 1).sort(dim=1).values
    assert torch.equal(chosen, select_tokens(scores, 2, 50, shared=shared))


def test_without_its_ends_a_prompt_is_ranked_by_the_rest_alone(llama: Case) -> None:
    queries = random_queries(llama.prompt, 2)
    scores = Landmarks(True, ends=False).read(llama.prompt).score(1, queries)
    assert scores[..., :4].isneginf().all() and scores[..., -64:].isneginf().all()
    everywhere = Landmarks(True).read(llama.prompt).score(1, queries)
    assert torch.equal(scores[..., 4:-64], everywhere[..., 4:-64])


def test_a_model_in_half_precision_is_simulated_in_single(llama: Case) -> None:
    adapter = DecoderAdapter(tiny_model("llama").bfloat16(), max_tokens=4096)
    prompt, logits = prefill(adapter, prompt_ids(300), torch.zeros(3, 32))
    assert {t.dtype for t in (prompt.keys, prompt.raw_keys, prompt.values, *prompt.rope)} == {torch.float32}
    methods = [Method.of(spec, parse_method(spec)) for spec in ("full", "landmarks:0.4", "quest:0.7")]
    full, *others = decode(adapter, prompt, logits, methods, room=4, eos_token_ids=EOS)
    assert full.costs.device_bytes == 3 * 32 * 2 * 2
    assert all(other.tokens[0] == full.tokens[0] for other in others)


def test_a_token_kept_exact_is_never_chosen() -> None:
    shares = torch.arange(24.0).expand(2, 24)
    barred = torch.zeros(1, 6, dtype=torch.bool)
    barred[0, 5] = True
    chosen = choose(shares.reshape(2, 6, 4).amax(2), barred, 8, 4)
    assert set(chosen[0].tolist()) == set(range(12, 20))


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).square().mean() / true.square().mean())


def test_rows_come_back_with_the_error_of_their_bits(llama: Case) -> None:
    prompt = llama.prompt
    four_bit, residual = FourBitRows(True).read(prompt), ResidualRows(True).read(prompt)
    assert 0.004 < relative_error(four_bit.values, prompt.values) < 0.02
    assert 0.004 < relative_error(four_bit.keys, prompt.keys) < 0.03
    assert relative_error(four_bit.keys, prompt.keys) < relative_error(residual.keys, prompt.keys) < 0.06
    assert torch.equal(residual.values, four_bit.values)


def test_keys_of_full_rank_are_exact_and_lower_ranks_lose_more(llama: Case) -> None:
    errors = [
        relative_error(LowRankKeys(rank).read(llama.prompt).keys, llama.prompt.keys) for rank in (32, 16, 4)
    ]
    assert errors[0] < 1e-4 < errors[1] < errors[2]
