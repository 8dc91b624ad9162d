"""The record of a benchmark: its keys are a contract, its ratios are of the same round."""

import json

import pytest

from patchmill.benchmarks.record import Record, in_turns, machine, row, versions


def test_ratios_are_taken_round_by_round():
    made = row("ours", [10, 40, 90], "tiles/s", baseline=("theirs", [10, 20, 30]), limit=("GEMM", [20, 50, 100]))
    assert (made.value, made.spread) == (40, (10, 90))
    assert made.ratio == 2  # the median of 1, 2, 3, where the ratio of the medians is 2 by chance too
    assert made.of_limit == 0.8  # the median of 0.5, 0.8, 0.9
    drifting = row("ours", [10, 20, 400], "tiles/s", baseline=("theirs", [100, 20, 40]))
    assert drifting.ratio == 1  # of 0.1, 1, 10; the ratio of the medians is 0.5


def test_what_was_not_measured_is_null():
    made = row("ours", [1.0], "MiB")
    assert (made.baseline, made.ratio, made.limit, made.of_limit) == (None, None, None, None)


def test_rounds_must_match():
    with pytest.raises(ValueError, match="zip"):
        row("ours", [1, 2], "tiles/s", baseline=("theirs", [1]))


def test_cases_are_measured_in_turns_and_warmed_up():
    told = []
    cases = {name: lambda name=name: told.append(name) or float(len(told)) for name in "ab"}
    values = in_turns(cases, rounds=2)
    assert told == ["a", "b"] * 3
    assert values == {"a": [3, 5], "b": [4, 6]}


def test_the_json_object_has_the_promised_keys():
    rows = (row("ours", [1.0], "tiles/s"),)
    record = Record(benchmark="x", machine=machine(), versions=versions(), rows=rows)
    value = json.loads(json.dumps(record.as_dict()))
    assert {"benchmark", "machine", "versions", "rows"} <= value.keys()
    assert list(value["rows"][0]) == ["case", "value", "spread", "unit", "baseline", "ratio", "limit", "of_limit"]
    assert value["versions"]["patchmill"]
    assert value["machine"]["cores"] >= 1
    assert "ours" in record.text()
