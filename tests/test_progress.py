"""What preparations tell of themselves, on a stream and under a signal."""

import signal

import pytest

from richkd.errors import Interrupted
from richkd.progress import lines, stoppable


@pytest.mark.parametrize("total", [1, 2, 3, 50, 1000])
def test_a_plain_stream_gets_a_line_at_the_start_the_half_and_the_end(total):
    printed: list[str] = []
    progress = lines(printed.append)
    for done in range(total + 1):
        progress("teacher", done, total)
    assert printed[0] == "teacher: 0 %"
    assert printed[-1] == "teacher: 100 %"
    assert len(printed) == min(total + 1, 3)


def test_a_signal_ends_a_preparation_and_names_it():
    signals = iter([None, signal.SIGTERM])
    told: list[tuple] = []
    progress = stoppable(lambda *what: told.append(what), lambda: next(signals))
    progress("miniature CLIP", 1, 9)
    with pytest.raises(Interrupted, match="while preparing the miniature CLIP") as caught:
        progress("miniature CLIP", 2, 9)
    assert caught.value.exit_code == 143
    assert told == [("miniature CLIP", 1, 9)]
