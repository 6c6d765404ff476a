"""The folders of refreshes, and their lock."""

import subprocess
import sys

import pytest

from llamarec.refresh.folders import generations, next_folder, only_refresh, refused_folder, work_folder
from preprocessing.errors import InputError

HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_artifacts_of_refreshes_are_numbered_after_the_first_ones(tmp_path):
    """By number, not by name; a refused candidate, a candidate in the making and other data sets do not count."""
    artifacts = tmp_path / "shop-100k"
    assert generations(artifacts) == []
    names = [
        "shop-100k",
        "shop-100k-2",
        "shop-100k-10",
        "shop-100k-refused",
        ".shop-100k.refresh",
        "shop-100k-x",
        "shop",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "shop-100k-11").write_text("a file")
    assert [path.name for path in generations(artifacts)] == ["shop-100k", "shop-100k-2", "shop-100k-10"]
    assert next_folder(artifacts).name == "shop-100k-11"
    assert next_folder(tmp_path / "shop").name == "shop-2"
    assert work_folder(artifacts).name in names
    assert refused_folder(artifacts).name in names


def test_a_second_refresh_is_refused_until_the_first_ends(tmp_path):
    """Also after a kill, which leaves the lock's file behind. Another data set beside it has a lock of its own."""
    artifacts = tmp_path / "shop"
    with only_refresh(artifacts):
        (file,) = tmp_path.iterdir()
        with pytest.raises(InputError, match=r"another refresh of .*shop is running: wait"), only_refresh(artifacts):
            pass
        with only_refresh(tmp_path / "other"):
            pass
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another refresh"), only_refresh(artifacts):
            pass
        process.kill()
    with only_refresh(artifacts):
        pass
