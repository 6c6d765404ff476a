"""Recommendations for all users on a Dask cluster of two worker processes, and on a disk that is full."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from distributed import LocalCluster

from preprocessing.errors import InputError
from serving.batch.recommend_all import RecommendAll, recommend_all
from serving.batch.users import ArtifactUsers

pytestmark = pytest.mark.thorough


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "recommendations").iterdir()}


def test_the_loss_of_a_worker_does_not_lose_a_partition(artifacts, repository, tmp_path):
    """One of the two workers is killed once two of the 19 partitions are there: the files are those of one machine."""
    options = RecommendAll(stage="retrieval", partition_size=50)
    recommend_all(options, repository, ArtifactUsers(artifacts), tmp_path / "here")
    killed = []
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid

        def kill():
            while len(list((tmp_path / "cluster").glob("recommendations/part-*"))) < 2:
                time.sleep(0.001)
            os.kill(victim, signal.SIGKILL)
            killed.append(len(list((tmp_path / "cluster").glob("recommendations/part-*"))))

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        given = RecommendAll(stage="retrieval", partition_size=50, scheduler_address=cluster.scheduler_address)
        manifest = recommend_all(given, repository, ArtifactUsers(artifacts), tmp_path / "cluster")
        thread.join(10)
    assert killed[0] < manifest.facts["partitions"] == 19, "killed in the middle"
    assert contents(tmp_path / "cluster") == contents(tmp_path / "here")
    assert sorted(path.name for path in (tmp_path / "cluster").iterdir()) == ["manifest.json", "recommendations"]


def test_no_scheduler_is_said(artifacts, repository, tmp_path):
    """And the folder can be used with one, or without."""
    options = RecommendAll(stage="retrieval", scheduler_address="127.0.0.1:9")
    with pytest.raises(InputError, match=r"no Dask scheduler answers at 127.0.0.1:9"):
        recommend_all(options, repository, ArtifactUsers(artifacts), tmp_path / "out")
    recommend_all(RecommendAll(stage="retrieval"), repository, ArtifactUsers(artifacts), tmp_path / "out")


def test_a_full_disk_ends_the_command_with_one_sentence(artifacts, repository, tmp_path):
    """A process whose files cannot exceed 64 KiB, as if the disk were full: the histories alone take more."""
    code = (
        "import resource, signal, sys; from llamarec.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10,) * 2)\n"
        "main()"
    )
    command = ["recommend-all", "--stage", "retrieval", "--artifacts", artifacts, "--repository", repository]
    command += ["--output", tmp_path / "out"]
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "make room, or name folders that can be written" in ended.stderr
    assert not any((tmp_path / "out").iterdir())
