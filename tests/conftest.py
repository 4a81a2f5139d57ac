"""What several tests share: one cache, and the miniature CLIP in it, built once."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving import launched
from small import SMALL, copy_of

from richkd import zeroshot

torch.set_num_threads(
    1
)  # for nets of milliseconds threads that wait for each other cost more than they bring


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory) -> Path:
    """A cache for the whole session; RICHKD_CACHE, where it is set, keeps it from run to run."""
    configured = os.environ.get("RICHKD_CACHE")
    return Path(configured) if configured else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def miniature(cache_root) -> zeroshot.ZeroShot:
    """The miniature CLIP, trained if the cache does not have it."""
    return zeroshot.load("miniature", None, device=torch.device("cpu"), root=cache_root)


@pytest.fixture(scope="session")
def cluster():
    """One local Ray for all tests that need one inside the process."""
    import ray

    from tune.runner import ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": ENVIRONMENT},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def swept(cluster, miniature, cache_root, tmp_path_factory):
    """The answer of one small sweep, and the client of the MLflow that it wrote to."""
    from mlflow.tracking import MlflowClient

    from richkd.layers import read
    from tune import launch as sweeps

    folder = tmp_path_factory.mktemp("sweep")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    layers = read([*SMALL, f"cache={cache_root}", f"storage={folder / 'runs'}", "sweep.name=small"])
    answer = sweeps.start(layers.over("", {"tracking.uri": uri}))
    return answer, MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="session")
def server(swept, tmp_path_factory) -> Iterator[str]:
    """The address of an `mlflow server` that shows the finished sweep, and takes new runs."""
    place = tmp_path_factory.mktemp("server")
    shutil.copy(Path(swept[0]["sweep"]).parent.parent / "mlflow.db", place)
    with launched(place) as address:
        yield address


@pytest.fixture
def copied(swept, tmp_path) -> Iterator[Path]:
    """A copy of the finished sweep with an MLflow of its own, to be damaged and gone on with."""
    with copy_of(Path(swept[0]["sweep"]), tmp_path / "copy") as folder:
        yield folder
