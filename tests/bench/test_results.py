"""Rows on disk and on the screen; files of an older make stay readable."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ddfast.bench import results

ROOT = Path(__file__).resolve().parents[2]
OLD = results.COLUMNS[:22]


def row(**more):
    return {
        "operator": "mmd",
        "case": "gaussian, n=m=100",
        "provider": "ddfast",
        "mode": "forward",
        "median_ms": 0.1234,
        "low_ms": 0.12,
        "high_ms": 0.13,
        "interval": "95%",
        "ratio_to_eager": 12.34,
        "ratio_low": 11.0,
        "ratio_high": 13.0,
        "share_of_floor": 0.5,
        "bound": "bandwidth",
        "peak_mib": 1.5,
        "verified": "yes",
        "size": "cifar10",
        "times_ms": [0.12, 0.13],
        **more,
    }


def write_old(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, OLD, restval="")
        writer.writeheader()
        writer.writerows(rows)


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "results.csv"
    results.append(path, [row()])
    results.append(path, [row(mode="backward"), row(verified='failed: RuntimeError: a, "b"')])
    found = results.read(path)
    assert [r["mode"] for r in found] == ["forward", "backward", "forward"]
    assert found[0] == {n: str(row().get(n, "")) for n in results.COLUMNS}
    assert found[2]["verified"] == 'failed: RuntimeError: a, "b"'


def test_an_older_file_gets_the_new_columns(tmp_path):
    path = tmp_path / "results.csv"
    old = {"operator": "mmd", "case": "a, b", "provider": "eager", "mode": "m", "median_ms": "1.5"}
    write_old(path, [old])
    assert results.read(path) == [dict.fromkeys(results.COLUMNS, "") | old]
    results.append(path, [row()])
    found = results.read(path)
    assert found[0] == dict.fromkeys(results.COLUMNS, "") | old
    assert found[1]["interval"] == "95%"
    assert path.read_text().splitlines()[0] == ",".join(results.COLUMNS)


def test_the_published_files_can_be_read():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        assert all(r["operator"] and r["verified"] for r in results.read(path))


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("method,dataset\ndm,digits\n")
    with pytest.raises(ValueError, match="without case, mode, operator, provider"):
        results.read(path)


def test_json_keeps_every_time(tmp_path):
    path = tmp_path / "results.json"
    results.write_json(path, {"device": "some processor"}, [row()])
    assert json.loads(path.read_text()) == {
        "machine": {"device": "some processor"},
        "rows": [row()],
    }


def test_block():
    text = results.block(
        [row(provider="eager", ratio_to_eager=1, ratio_low=1, ratio_high=1), row()]
    )
    title, eager, ours = text.splitlines()
    assert title == "mmd: gaussian, n=m=100, forward; cifar10"
    assert "1 x" in eager and "[1, 1]" not in eager
    for part in (
        "ddfast",
        "0.123 ms [0.12, 0.13]",
        "12.3 x [11, 13]",
        "50 % of bandwidth",
        "1.5 MiB",
    ):
        assert part in ours
    assert results.block([row(verified="WRONG (allowed 1e-05)")]).endswith("WRONG (allowed 1e-05)")


def written(r):
    """A row as a file has it."""
    return {name: str(r.get(name, "")) for name in results.COLUMNS}


def test_the_readme_says_whether_it_shows_intervals_or_quartiles():
    from ddfast.benchmarks import readme_table  # of the checkout only

    new = row(share_of_copy=0.5, first_call_ms=7.0, device="new", threads=1, torch="2", date="d")
    old = dict.fromkeys(results.COLUMNS, "") | {
        name: value for name, value in written(new).items() if name in OLD
    }
    old |= {"device": "old", "case": "gaussian, n=m=10"}
    new = written(new)
    assert readme_table.spread([old]) == "quartiles"
    assert readme_table.spread([new]) == "95 % interval"
    assert readme_table.spread([old, new]) == "95 % interval, or quartiles*"
    assert "| 12.3 (11 to 13*) |" in readme_table.summary([old, new])
    assert readme_table.ratio(new | {"interval": "75%"}, [new]) == "12.3 (11 to 13, 75 %)"
    first, second = readme_table.markdown([old, new]).split("\n\n")[1:4:2]
    assert first.splitlines()[-1].endswith("| ddfast | 0.123 | 12.3 (11 to 13) | 50 % | 7 |")
    assert second.splitlines()[-1].endswith("| 50 % | 7 | 50 % (bandwidth) | 1.5 |")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.0, "1"), (99.94, "99.9"), (123.4, "123"), ("", None)],
)
def test_three_digits(value, text):
    if text is None:
        with pytest.raises(ValueError):
            results.number(value)
    else:
        assert results.number(value) == text
