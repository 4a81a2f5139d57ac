"""What the spool keeps when a line is cut off, when a signal comes between, and when the disk is full."""

import errno
import os
import signal
import threading

import pytest

from tune.spool import Spool


def put(spool: Spool, text: str) -> None:
    spool.write({"name": "tag", "text": text})


def texts(spool: Spool) -> list[str]:
    return [record["text"] for record, _ in spool.waiting()]


def test_what_was_put_waits_until_it_is_done_also_for_the_next_driver(tmp_path):
    spool = Spool(tmp_path / "spool.jsonl")
    for text in ("a", "b\n\u2028ß\ud800", "c"):
        put(spool, text)
    assert texts(spool) == texts(Spool(spool.path)) == ["a", "b\n\u2028ß\ud800", "c"]
    spool.done(spool.waiting()[1][1])
    put(spool, "d")
    assert texts(spool) == texts(Spool(spool.path)) == ["c", "d"]
    spool.done(spool.waiting()[-1][1])
    assert texts(spool) == texts(Spool(spool.path)) == []
    spool.remove()
    assert not spool.path.exists()


def test_a_line_that_is_cut_at_any_byte_is_dropped_and_the_next_one_is_read(tmp_path):
    spool = Spool(tmp_path / "whole")
    for text in ("a", "b"):
        put(spool, text)
    spool.done(spool.waiting()[0][1])
    before = spool.path.stat().st_size
    put(spool, "{} ä \\ \n")
    content, cuts = spool.path.read_bytes(), 0
    for length in range(before, len(content) + 1):
        path = tmp_path / f"cut-{length}"
        path.write_bytes(content[:length])
        torn = Spool(path)
        assert texts(torn) == (["b"] if length < len(content) else ["b", "{} ä \\ \n"])
        cuts += length < len(content)
        put(torn, "next")
        # only the newline is missing: its writer has heard no other than that it is not there, or is dead
        whole = length >= len(content) - 1
        expected = ["b", "{} ä \\ \n", "next"] if whole else ["b", "next"]
        assert texts(torn) == texts(Spool(path)) == expected
    assert cuts > 30


def test_a_cut_note_of_what_is_done_leaves_it_waiting(tmp_path):
    spool = Spool(tmp_path / "whole")
    put(spool, "a")
    before = spool.path.stat().st_size
    spool.done(spool.waiting()[0][1])
    content = spool.path.read_bytes()
    for length in range(before, len(content)):
        path = tmp_path / f"cut-{length}"
        path.write_bytes(content[:length])
        assert texts(Spool(path)) == ["a"]
    assert texts(Spool(spool.path)) == []


def test_threads_and_a_signal_handler_that_interrupts_them_write_whole_lines_in_their_order(
    tmp_path,
):
    spool, fired = Spool(tmp_path / "spool.jsonl"), []

    def handle(*_) -> None:
        fired.append(len(fired))
        put(spool, f"signal {fired[-1]}")

    def write(name: str) -> None:
        for k in range(1000):
            put(spool, f"{name} {k} {'x' * (k % 50) * 100}")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        threads = [threading.Thread(target=write, args=(f"thread-{n}",)) for n in range(3)]
        for thread in threads:
            thread.start()
        write("main")
        for thread in threads:
            thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(fired) > 10
    found = [text.split()[:2] for text in texts(spool)]
    for name in ("main", *(f"thread-{n}" for n in range(3))):
        assert [int(k) for who, k in found if who == name] == list(range(1000))
    # not in order: a handler is interrupted by the next one, too
    assert sorted(int(k) for who, k in found if who == "signal") == fired
    assert len(found) == 4000 + len(fired)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "spool.jsonl").symlink_to("/dev/full")  # whose every write fails as on a full disk
    spool = Spool(tmp_path / "spool.jsonl")
    with pytest.raises(OSError, match="No space left") as caught:
        put(spool, "a")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "spool.jsonl")


def test_a_line_that_a_full_disk_takes_in_part_is_an_error_and_spoils_no_other(
    tmp_path, monkeypatch
):
    spool = Spool(tmp_path / "spool.jsonl")
    put(spool, "a")
    usual, written = os.write, []

    def part(file: int, line: bytes) -> int:
        written.append(usual(file, line[: len(line) // 2]))
        return written[-1]

    monkeypatch.setattr(os, "write", part)
    with pytest.raises(OSError, match="No space left"):
        put(spool, "half")
    monkeypatch.undo()
    assert written[0] > 10
    put(spool, "b")
    assert texts(spool) == texts(Spool(spool.path)) == ["a", "b"]
