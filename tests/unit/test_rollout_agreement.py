"""Agreement of two orders, against values computed by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.rollout.agreement import compare, kendall_tau, rank_biased_overlap, top1_agreement

orders = st.permutations("abcdefghijkl").flatmap(lambda p: st.integers(0, 12).map(lambda n: p[:n]))


def test_top1_is_about_the_first_document_only():
    assert top1_agreement("abc", "acb")
    assert not top1_agreement("abc", "bac")
    assert top1_agreement("", "")
    assert not top1_agreement("a", "")
    assert top1_agreement(["a", "b"], ("a", "c"))


def test_rank_biased_overlap_of_orders_of_one_length():
    # Overlaps at depth 1, 2, 3 are 1, 1, 3, so agreements 1, 1/2, 1. With p = 0.5:
    # (1-p)/p (p + p^2/2 + p^3) + p^3 = 0.5 + 0.125 + 0.125 + 0.125.
    assert rank_biased_overlap("abc", "acb", p=0.5) == pytest.approx(0.875)
    # Overlaps 0, 2: (1-p)/p (0 + p^2) + p^2 = 0.25 + 0.25.
    assert rank_biased_overlap("ab", "ba", p=0.5) == pytest.approx(0.5)


def test_rank_biased_overlap_of_orders_of_two_lengths():
    # s = 1, l = 2, X_1 = 0, X_2 = 1 (a of the short order is second): (1-p)/p (0 + p^2/2 + 0) + (1/2 + 0) p^2.
    assert rank_biased_overlap("a", "ba", p=0.5) == pytest.approx(0.25)
    # X_1 = X_2 = 1: (1-p)/p (p + p^2/2 + p^2 (2-1)/(1*2)) + (0 + 1) p^2 = 0.5 + 0.25 + 0.25: nothing disagrees.
    assert rank_biased_overlap("a", "ab", p=0.5) == pytest.approx(1.0)


def test_rank_biased_overlap_of_nothing():
    assert rank_biased_overlap("", "") == 1
    assert rank_biased_overlap("", "ab") == 0


def test_kendall_counts_pairs_in_order_among_common_documents():
    assert kendall_tau("abcd", "abcd") == 1
    assert kendall_tau("abcd", "dcba") == -1
    # One of six pairs is turned: (5 - 1) / 6.
    assert kendall_tau("abcd", "abdc") == pytest.approx(2 / 3)
    # x and y are in one order each; a, b, c are left, with one of three pairs turned.
    assert kendall_tau("axbc", "bayc") == pytest.approx(1 / 3)
    assert kendall_tau("ax", "ay") is None


def test_only_the_first_ten_count():
    tail = compare("abcdefghijXY", "abcdefghijYX")
    assert (tail.top1, tail.rbo, tail.tau) == (True, pytest.approx(1), 1)


def test_a_document_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        compare("aab", "abc")


@given(orders, orders)
def test_agreement_is_symmetric_and_bounded(a, b):
    there, back = compare(a, b), compare(b, a)
    assert there.top1 == back.top1
    assert there.rbo == pytest.approx(back.rbo)
    assert there.tau == pytest.approx(back.tau) if there.tau is not None else back.tau is None
    assert 0 <= there.rbo <= 1


@given(orders)
def test_an_order_agrees_with_itself(a):
    same = compare(a, a)
    assert same.top1
    assert same.rbo == pytest.approx(1)
    assert same.tau in (1, None)


def test_a_shuffle_of_ten_documents_is_seen_by_tau_rather_than_by_overlap():
    rng = random.Random(0)
    found = [compare(range(10), rng.sample(range(10), 10)) for _ in range(2_000)]
    assert sum(one.tau for one in found) / 2_000 == pytest.approx(0, abs=0.03)
    # Whatever the order, ten of ten agree at depth 10: sum of 0.1 * 0.9^(d-1) * d/10, and 0.9^10.
    assert sum(one.rbo for one in found) / 2_000 == pytest.approx(0.651, abs=0.02)
