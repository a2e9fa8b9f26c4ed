"""Traffic over time: the made traces are what they say, and a CSV of one's own is read or refused by line."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.autoscaling import traces
from serve_app.autoscaling.traces import TraceError, from_csv


def test_a_flash_sale_is_ten_times_the_calls_within_ten_seconds():
    trace = traces.flash_sale()
    calls = trace.calls_per_s.sum(axis=1)
    start = int(np.argmax(calls > calls[0]))
    assert calls[start + 10] == pytest.approx(10 * calls[0])
    assert calls[:start].max() == calls[0]


def test_bursts_of_documents_add_more_tokens_than_calls():
    trace = traces.bursty()
    calls, tokens = trace.calls_per_s.sum(axis=1), trace.tokens_per_s
    documents = trace.calls_per_s[:, 2] > trace.calls_per_s[0, 2] * 7.9
    others = trace.calls_per_s[:, :2] == trace.calls_per_s[0, :2]
    alone = documents & others.all(axis=1)
    assert alone.any()
    assert calls[alone].max() < 1.2 * calls[0]
    assert tokens[alone].min() > 4 * tokens[0]


def test_a_day_has_a_quiet_night_and_a_busy_evening():
    trace = traces.diurnal()
    hour = trace.starts_s / 3600
    night, evening = trace.tokens_per_s[(hour > 3) & (hour < 5)], trace.tokens_per_s[(hour > 20) & (hour < 21)]
    assert evening.mean() > 5 * night.mean()


@pytest.mark.parametrize("name", list(traces.MADE))
def test_made_traces_are_the_same_each_time(name):
    one, other = traces.MADE[name](), traces.MADE[name]()
    assert np.array_equal(one.calls_per_s, other.calls_per_s)
    assert (one.calls_per_s >= 0).all()


def test_a_csv_row_holds_until_the_next_and_the_last_as_long_as_the_one_before(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("seconds, calls_per_s, tokens_per_call\n100,5,1500\n160,50,300\n")
    trace = from_csv(path)
    assert (trace.name, trace.seconds) == ("mine", 120)
    assert trace.tokens_per_s.tolist() == [7500, 15000]
    assert trace.pairs_per_call.tolist() == [[10], [2]]
    assert trace.steps(np.array([0.0, 59.9, 60.0, 119.0])).tolist() == [0, 0, 1, 1]


def test_rows_of_one_second_are_several_kinds_of_calls(tmp_path):
    path = tmp_path / "mix.csv"
    path.write_text(
        "seconds,calls_per_s,tokens_per_call,pairs_per_call\n0,80,600,5\n0,2,60000,200\n\n60,80,600,5\n60,20,60000,200\n"
    )
    trace = from_csv(path)
    assert trace.calls_per_s.tolist() == [[80, 2], [80, 20]]
    assert trace.pairs_per_call.tolist() == [[5, 200], [5, 200]]


def test_a_day_of_several_kinds_is_read_in_seconds(tmp_path):
    path = tmp_path / "day.csv"
    rows = [f"{second},{calls},600" for second in range(20_000) for calls in (80, 16)]
    path.write_text("\n".join(["seconds,calls_per_s,tokens_per_call", *rows]))
    began = time.process_time()
    trace = from_csv(path)
    assert time.process_time() - began < 5
    assert trace.calls_per_s.shape == (20_000, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.csv:1: the columns are none; allowed: seconds, calls_per_s, tokens_per_call and"),
        ("seconds,calls\n0,1\n", "mine.csv:1: the columns are seconds, calls; allowed: seconds, calls_per_s"),
        ("seconds,calls_per_s,tokens_per_call\n0,1\n", "mine.csv:2: has 2 values; allowed: 3"),
        (
            "seconds,calls_per_s,tokens_per_call\n0,1,9\n5,x,9\n",
            "mine.csv:3: calls_per_s is 'x'; allowed: a number",
        ),
        (
            "seconds,calls_per_s,tokens_per_call\n0,-1,9\n",
            "mine.csv:2: calls_per_s is '-1'; allowed: a number from 0",
        ),
        (
            "seconds,calls_per_s,tokens_per_call\n0,1,0\n",
            "mine.csv:2: tokens_per_call is '0'; allowed: a number from 1",
        ),
        ("seconds,calls_per_s,tokens_per_call\n0,nan,9\n", "calls_per_s is 'nan'"),
        ("seconds,calls_per_s,tokens_per_call\n0,inf,9\n", "calls_per_s is 'inf'"),
        ("seconds,calls_per_s,tokens_per_call\n9,1,9\n5,1,9\n", "mine.csv:3: seconds is 5; allowed: 9 or more"),
        ("seconds,calls_per_s,tokens_per_call\n0,1,9\n", "mine.csv: has 1 moments; allowed: 2 or more"),
        (
            "seconds,calls_per_s,tokens_per_call\n1700000000000,1,9\n1700003600000,1,9\n",
            "mine.csv: lasts 7,200,000 s; allowed: up to 2,678,400 (31 days); are these milliseconds?",
        ),
    ],
)
def test_a_bad_csv_is_refused_by_file_line_and_value(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as refused:
        from_csv(path)
    assert message in str(refused.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        from_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="is not CSV in UTF-8"):
        from_csv(tmp_path / "binary.csv")


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1e4), st.floats(1, 1e6)), min_size=2, max_size=20)
)
def test_what_a_csv_says_is_what_the_trace_has(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    starts = np.cumsum([step for step, _, _ in rows])
    lines = [f"{start},{calls!r},{tokens!r}" for start, (_, calls, tokens) in zip(starts, rows, strict=True)]
    path.write_text("\n".join(["seconds,calls_per_s,tokens_per_call", *lines]))
    trace = from_csv(path)
    assert trace.tokens_per_s.tolist() == [calls * tokens for _, calls, tokens in rows]
    assert trace.seconds == starts[-1] - starts[0] + starts[-1] - starts[-2]
