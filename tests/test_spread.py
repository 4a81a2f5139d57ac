"""Rows that workers of a cluster compute: the same bytes as here, in order, whatever dies, and an error as one line."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from richkd import cache, distill, estimate, zeroshot
from richkd.command import Stop
from richkd.errors import ConfigError, Interrupted
from richkd.layers import build, read, to_dict
from tune import first, spread
from tune.display import Display

EACH = {"CPU": 1}


def config(root: Path, *words: str):
    return build(read([f"cache={root}", *words]))


@pytest.fixture
def shards(monkeypatch):
    """Tables of shards as small as pieces, so that the digits have several."""
    monkeypatch.setattr(cache, "SHARD", spread.PIECE)


@pytest.fixture
def fresh(miniature, cache_root, tmp_path) -> Path:
    """A cache that has the miniature, and no features."""
    for kind in ("clip-cards", "miniature"):
        (tmp_path / "fresh").mkdir(exist_ok=True)
        (tmp_path / "fresh" / kind).symlink_to(cache_root / kind)
    return tmp_path / "fresh"


def rows_of(root: Path) -> bytes:
    (path,) = root.glob("clip-images/[!.]*/rows.npy")
    return path.read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_workers_fill_a_table_with_the_bytes_of_a_straight_fill_which_goes_on_where_they_were_cut(
    cluster, miniature, fresh, shards, tmp_path
):
    made, told = config(fresh), []
    images = distill.open_task(made).dataset.train
    straight = zeroshot.ZeroShot(miniature.identity, lambda: miniature.encoder, tmp_path / "here")
    zeroshot.image_features(straight, images, tmp_path / "here")
    # nothing of it is computed in this process
    clip = zeroshot.ZeroShot(miniature.identity, pytest.fail, fresh)

    def by_all(missing):
        told.append(missing)
        yield from spread.spread(
            spread.image_features_of, (to_dict(made), 0, 0), 2, EACH, lambda: None, missing
        )

    def cut(_what, done, _total):
        told.append(done)
        if done == 3 * spread.PIECE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zeroshot.image_features(clip, images, fresh, cut, by_all)
    zeroshot.image_features(straight, images, fresh, lambda *at: told.append(at[1]))
    ranges = [(0, 256), (256, 512), (512, 768), (768, 997)]
    assert told == [0, ranges, 256, 512, 768, 768, 997]
    assert rows_of(fresh) == rows_of(tmp_path / "here")


@pytest.mark.timeout(120)
def test_what_a_worker_raises_is_its_users_error_and_names_the_machine(cluster, tmp_path):
    made = config(tmp_path, "data.source=arrays", f"data.path={tmp_path}/none.npz")
    with pytest.raises(ConfigError, match=r"^[^ ]+: data.path must be an .npz file .* is no file"):
        next(
            spread.spread(
                spread.image_features_of, (to_dict(made), 0, 0), 2, EACH, lambda: None, [(0, 9)]
            )
        )


def number(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.float32)[:, None]


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_rows_of_a_worker_that_died_are_computed_again_in_order(cluster, tmp_path):
    def make(sentinel):
        def compute(start, stop):
            if start == 3 * 256 and not os.path.exists(sentinel):
                open(sentinel, "x").close()
                os.kill(os.getpid(), 9)
            return np.arange(start, stop, dtype=np.float32)[:, None]

        return compute

    missing = [(0, 1024), (2048, 3072), (5000, 5001)]
    found = spread.spread(make, (str(tmp_path / "x"),), 2, EACH, lambda: None, missing)
    for block, (start, stop) in zip(found, missing, strict=True):
        assert np.array_equal(block, number(start, stop))
    assert (tmp_path / "x").exists()


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_stop_is_heard_while_workers_compute_and_gives_their_cpus_back(cluster):
    import ray

    def make():
        return lambda start, stop: time.sleep(600)

    beats = []

    def beat():
        beats.append(ray.available_resources().get("CPU", 0))
        if beats[-1] == 0:
            raise Interrupted(2, "interrupted")

    with pytest.raises(Interrupted):
        next(spread.spread(make, (), 2, EACH, beat, [(0, 1024)]))
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == 2


# when it is done


@pytest.fixture
def asked(monkeypatch):
    """What is left to workers, instead of starting any."""
    found = []
    monkeypatch.setattr(spread, "features", lambda made, *_, **__: found.append(made.clip.views))
    return found


@pytest.mark.parametrize(
    ("words", "seconds", "expected"),
    [
        ([], 25.0, ["whole"]),
        (["clip.views=4"], 25.0, [4]),
        ([], 19.0, []),
        (["fusion.alpha=1"], 25.0, []),
        (["method.name=ce"], 25.0, []),
    ],
)
def test_workers_are_started_for_what_takes_long_and_is_used(
    fresh, asked, monkeypatch, words, seconds, expected
):
    made = config(fresh, *words)
    lack = estimate.Lack(what="all", bytes=1, seconds=seconds)
    monkeypatch.setattr(estimate, "unseen", lambda *_: [lack])
    first.look_at_all(made, distill.open_task(made), lambda *_: None)
    assert asked == expected


@pytest.mark.parametrize(
    ("views", "rows"), [("whole", 1797), (3, 1797 + 2 * 997), ("online", 1797)]
)
def test_what_is_unseen_counts_stored_views_and_the_whole_image_once(fresh, views, rows):
    made = config(fresh, f"clip.views={views}")
    task = distill.open_task(made)
    (lack,) = estimate.unseen(made, task)
    assert lack.what == f"miniature over {rows} images"
    assert lack.bytes == 4 * rows * 48


@pytest.fixture
def told(monkeypatch):
    """Lines of a preparation, instead of a bar."""
    found = []
    monkeypatch.setattr(Display, "line", lambda _, text, *__: found.append(text))
    return found


def test_all_that_runs_share_is_computed_as_on_one_machine(fresh, told):
    layers = read([f"cache={fresh}", "teacher.epochs=2"])
    answer = first.compute(layers, command="again", stop=Stop(), address=None, dashboard=None)
    made = build(layers)
    task = distill.open_task(made)
    assert answer == distill.prepared(task, distill.open_teacher(made, task))
    assert {"teacher", "clip", "fused"} < set(answer)
    assert {line.partition(":")[0] for line in told} >= {"clip-images", "teacher"}


def test_signal_ends_it_with_the_line_that_goes_on(fresh, told):
    stop = Stop()
    stop.signum = 2
    with pytest.raises(Interrupted, match="interrupted while .*; go on with: again") as caught:
        first.compute(
            read([f"cache={fresh}"]), command="again", stop=stop, address=None, dashboard=None
        )
    assert caught.value.exit_code == 130


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_workers_fill_a_teachers_table_with_the_bytes_of_a_straight_fill(
    cluster, cache_root, fresh, tmp_path
):
    words = ["teacher.views=exact", "teacher.epochs=2", "method.name=kd", "device=cpu"]
    here = config(tmp_path / "here", *words)
    straight = distill.open_teacher(here, distill.open_task(here)).task
    straight.fill(lambda *_: None)
    made = config(fresh, *words)
    teacher = distill.open_teacher(made, distill.open_task(made)).task
    teacher.table.get(np.arange(100, 150), teacher.of_numbers)
    told = []

    def cut(_what, done, total):
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    launch = {"stop": Stop(), "address": None, "dashboard": None}
    with pytest.raises(KeyboardInterrupt):
        spread.crops(made, teacher, cut, **launch)
    teacher.of_numbers = pytest.fail  # the workers have teachers of their own
    spread.crops(made, teacher, lambda *at: told.append(at[1:]), **launch)
    assert told[2][0] > 0
    assert told[3] == told[2]  # it goes on where it was cut
    assert teacher.table.known() == len(teacher.table) == 997 * 9
    expected = (straight.table.folder / "rows.npy").read_bytes()
    assert (teacher.table.folder / "rows.npy").read_bytes() == expected
