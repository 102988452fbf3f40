from __future__ import annotations

import itertools
import pickle
import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquifer.cachestore.keys import PromptNamer, SegmentKey, chain_keys, make_namespace, pack_ids

NAMESPACE = make_namespace("model", "codec", "")


def test_namespace_fields_do_not_run_into_each_other() -> None:
    split_differently = [("ab", "c", ""), ("a", "bc", ""), ("abc", "", ""), ("", "abc", ""), ("", "", "abc")]
    assert len({make_namespace(*fields) for fields in split_differently}) == len(split_differently)


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=2, max_size=8, unique=True))
def test_different_fields_give_different_namespaces(fields: list[tuple[str, str, str]]) -> None:
    namespaces = [make_namespace(*triple) for triple in fields]
    assert len(set(namespaces)) == len(namespaces)
    assert {len(namespace) for namespace in namespaces} == {16}


def test_two_salts_never_share_a_key() -> None:
    ids = list(range(1024))
    keys: list[SegmentKey] = []
    for salt in ("tenant a", "tenant b"):
        prompt = chain_keys(make_namespace("model", "codec", salt), ids)
        assert prompt.sinks is not None
        keys += [prompt.sinks, *prompt.segments]
    assert len({key.digest for key in keys}) == len(keys)
    assert len({key.redis_name for key in keys}) == len(keys)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=64), st.data())
def test_one_changed_token_changes_its_segment_and_all_later_ones_only(
    ids: list[int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(ids) - 1))
    changed = list(ids)
    changed[position] ^= 1 + data.draw(st.integers(0, 2**20))
    before = chain_keys(NAMESPACE, ids, segment_tokens=8)
    after = chain_keys(NAMESPACE, changed, segment_tokens=8)
    same = [a == b for a, b in zip(before.segments, after.segments, strict=True)]
    assert same == [index < position // 8 for index in range(len(same))]
    assert (before.sinks == after.sinks) == (position >= 4)


def test_a_key_does_not_depend_on_the_tokens_behind_it() -> None:
    short, long = chain_keys(NAMESPACE, range(512)), chain_keys(NAMESPACE, range(1000))
    assert short.segments == long.segments[:2]
    assert short.sinks == long.sinks


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=6), st.integers(0, 3)),
        max_size=20,
    )
)
def test_a_prompt_is_named_alike_whatever_was_named_before(
    prompts: list[tuple[str, list[int], int]],
) -> None:
    """Each a tenant, segments of few kinds, and a tail."""
    namer = PromptNamer(segment_tokens=4, most=3)
    for tenant, kinds, tail in prompts:
        namespace = make_namespace("model", "codec", tenant)
        ids = pack_ids([kind for kind in kinds for _ in range(4)] + [7] * tail)
        named, wanted = namer.keys(namespace, ids), chain_keys(namespace, ids, segment_tokens=4)
        assert named == wanted
        assert [key.parent for key in named.segments] == [key.parent for key in wanted.segments]


def test_what_a_prompt_shares_with_one_before_is_not_hashed_again() -> None:
    namer = PromptNamer(most=2)
    document = list(range(1000))
    first = namer.keys(NAMESPACE, pack_ids(document)).segments
    longer = namer.keys(NAMESPACE, pack_ids(document + document)).segments
    other = namer.keys(NAMESPACE, pack_ids([*document[:600], *document])).segments
    assert len(first) == 3 and all(a is b for a, b in zip(first, longer, strict=False))
    assert all(a is b for a, b in zip(longer[:2], other, strict=False)) and longer[2] != other[2]
    namer.keys(NAMESPACE, pack_ids([5] * 256))  # for which `longer` is forgotten
    fresh = namer.keys(NAMESPACE, pack_ids(document)).segments
    assert fresh == first and fresh[0] is first[0] and fresh[2] is not first[2]
    for prompt in ([6] * 256, document, [7] * 256, document):  # what is asked about again is kept
        again = namer.keys(NAMESPACE, pack_ids(prompt)).segments
    assert all(a is b for a, b in zip(again, fresh, strict=True))


@pytest.mark.parametrize(
    ("tokens", "segments", "has_sinks"),
    [
        (0, 0, False),
        (3, 0, False),
        (4, 0, True),
        (255, 0, True),
        (256, 1, True),
        (511, 1, True),
        (512, 2, True),
    ],
)
def test_only_full_segments_have_keys(tokens: int, segments: int, has_sinks: bool) -> None:
    prompt = chain_keys(NAMESPACE, range(tokens))
    assert len(prompt.segments) == segments
    assert (prompt.sinks is not None) == has_sinks


def test_every_form_of_the_same_token_ids_gives_the_same_keys() -> None:
    ids = [(7919 * i) % 151_936 for i in range(600)]
    raw = array("i", ids)
    forms = [ids, tuple(ids), raw, raw.tobytes(), bytearray(raw.tobytes()), memoryview(raw), array("q", ids)]
    assert len({chain_keys(NAMESPACE, form) for form in forms}) == 1


def test_keys_are_the_same_in_every_process_and_version() -> None:
    # Stored data outlives the process: a change of these values abandons every cache in the field.
    prompt = chain_keys(make_namespace("model", "codec", "salt"), range(256))
    assert prompt.sinks is not None
    assert prompt.sinks.redis_name.decode() == (
        "aquifer:s:d1a1d485aa10b959123e9be191dd2005:4f8048ba063e80426d3ae5a023a413a6560bba97d4ccc81ff71deb2d5753fcaf"
    )
    assert prompt.segments[0].redis_name.decode() == (
        "aquifer:s:d1a1d485aa10b959123e9be191dd2005:902963732f0b56fc617bb37812503863d0f5abc5c5fbc23350142934c746bf2c"
    )


def test_parents_link_a_prompt_in_order_and_are_no_part_of_a_key() -> None:
    prompt = chain_keys(NAMESPACE, range(1024))
    assert prompt.sinks is not None
    chain = [prompt.sinks, *prompt.segments]
    assert chain[0].parent is None
    assert all(child.parent == parent.digest for parent, child in itertools.pairwise(chain))
    last = chain[-1]
    assert SegmentKey(last.namespace, last.digest) == last
    assert hash(SegmentKey(last.namespace, last.digest)) == hash(last)


@pytest.mark.parametrize("bad", [b"12345", array("f", [1.0]), memoryview(array("d", [1.0]))])
def test_what_holds_no_integers_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"integers|int32"):
        chain_keys(NAMESPACE, bad)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 1.5, "7", None])
def test_a_token_id_that_is_no_int32_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match=f"token id {re.escape(repr(bad))} at place 2 is no integer of 32"):
        chain_keys(NAMESPACE, [1, 2, bad, bad])  # type: ignore[list-item]  # on purpose


def test_a_namespace_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, got 3"):
        chain_keys(b"abc", [1, 2, 3, 4])


def test_a_copy_of_a_key_is_that_key() -> None:
    *_, last = chain_keys(NAMESPACE, range(600)).segments
    other = pickle.loads(pickle.dumps(last))
    assert other == last and other.parent == last.parent


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 and 32 bytes"):
        SegmentKey(NAMESPACE, b"short")
