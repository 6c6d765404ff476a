"""The data stage on a Dask cluster of two worker processes."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from distributed import LocalCluster

from preprocessing import ingest, workflows
from preprocessing.data import read_sequences
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess

pytestmark = pytest.mark.thorough

USERS, ITEMS, ROWS = 300, 80, 12_000


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "user": random.integers(0, USERS, ROWS),
            "item": random.integers(0, ITEMS, ROWS),
            "timestamp": random.integers(0, 1000, ROWS),
        }
    )
    frame["title"] = "Film " + frame["item"].astype(str)
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    frame.to_parquet(path)
    return Preprocessing(dataset="table", raw=path)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(ingest, "PARTITION_ROWS", 1500)
    monkeypatch.setattr(workflows, "BUCKET_ROWS", 2000)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def contents(folder):
    """Return what is written, bit for bit where it does not depend on the number of files."""
    tables = [table.to_pydict() for table in read_sequences(folder / "data")]
    return tables, (folder / "data" / "items.parquet").read_bytes()


def test_two_workers_write_what_one_machine_writes(tmp_path, log, cluster):
    """With eight partitions and six buckets, the cluster writes the files of one machine."""
    preprocess(log, tmp_path / "here")
    preprocess(replace(log, scheduler_address=cluster.scheduler_address), tmp_path / "cluster")
    assert contents(tmp_path / "cluster") == contents(tmp_path / "here")


def test_the_loss_of_a_worker_does_not_lose_the_job(tmp_path, log, cluster):
    """One of the two workers is killed while the first bucket is written, and its work is repeated."""
    preprocess(log, tmp_path / "here")
    victim, killed = next(iter(cluster.workers.values())).pid, threading.Event()

    def kill():
        while not any((tmp_path / "cluster").glob(".data.scratch-*/encoded/bucket=*")):
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    preprocess(replace(log, scheduler_address=cluster.scheduler_address), tmp_path / "cluster")
    thread.join(10)
    assert killed.is_set()
    assert contents(tmp_path / "cluster") == contents(tmp_path / "here")


def test_no_scheduler_is_said(tmp_path, log):
    with pytest.raises(InputError, match=r"no Dask scheduler answers at 127.0.0.1:9"):
        preprocess(replace(log, scheduler_address="127.0.0.1:9"), tmp_path)
