"""New lines of a log that grows, is cut back by a resumption, and is read by several starts."""

import json

from fastsiam.follow.tail import Place, new_lines, read_place, write_place
from tests.support.run_folders import at, train_line


def text(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def steps(lines):
    return [(line["kind"], line.get("step")) for line in lines]


def all_new(log, place):
    found = []
    while True:
        lines, after = new_lines(log, place)
        if after == place:
            return found, place
        found, place = found + lines, after


def test_lines_come_whole_and_once(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert new_lines(log, Place()) == ([], Place())
    second = text(train_line(2))
    log.write_text(text({"kind": "header"}, train_line(1)) + second[:20])
    found, place = all_new(log, Place())
    assert steps(found) == [("train", 1)]
    assert all_new(log, place) == ([], place)
    with open(log, "a") as file:
        file.write(second[20:])
    write_place(tmp_path / "place.json", place)
    found, place = all_new(log, read_place(tmp_path / "place.json"))
    assert steps(found) == [("train", 2)]
    assert (place.rows, place.sent, place.offset) == (2, {"train": 2}, log.stat().st_size)
    for damaged in ("{", "[]", '{"x": 1}'):
        (tmp_path / "place.json").write_text(damaged)
        assert read_place(tmp_path / "place.json") == Place()


def test_a_long_log_comes_in_parts(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(text(*map(train_line, range(1, 2001))))
    first, place = new_lines(log, Place())
    assert 0 < len(first) < 2000
    rest, place = all_new(log, place)
    assert [line["step"] for line in first + rest] == [*range(1, 2001)]
    assert place.rows == 2000


def test_after_a_resumption_steps_that_were_sent_are_not_sent_again(tmp_path):
    """The log is cut back to step 6; it is then shorter than before, or longer, when it is looked at again."""
    log = tmp_path / "metrics.jsonl"
    begun = [{"kind": "header"}, *map(train_line, range(1, 7))]
    again = [train_line(step, wall_seconds=99.0 + step) for step in range(7, 40)]
    resumed = at("resume", 6, world_size=1)
    knn = at("knn", 9, knn_top1=50.0)
    for length in (2, 33):
        log.write_text(text(*begun, *map(train_line, (7, 8, 9, 10)), knn, at("end", 10, status="preempted")))
        _, place = all_new(log, Place())
        log.write_text(text(*begun, resumed, *again[:length]))
        found, place = all_new(log, place)
        assert steps(found) == [("resume", 6), *(("train", step) for step in range(11, 7 + length))]
        with open(log, "a") as file:
            file.write(text(*again[length:], knn, at("knn", 39, knn_top1=60.0), at("end", 39, status="done")))
        found, place = all_new(log, place)
        assert steps(found) == [
            *(("train", step) for step in range(max(11, 7 + length), 40)), ("knn", 39), ("end", 39)
        ]  # fmt: skip
        assert place.rows == 12 + 1 + 29 + 2
