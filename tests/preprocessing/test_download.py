"""Downloads of public data sets from a local server that breaks off, refuses and serves wrong files on demand."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preprocessing import download
from preprocessing.download import PublicFile, download_public, public_files
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess

CONTENT = bytes(range(256)) * 20_000


class Server:
    """Serves ``files`` and sends at most ``cut`` bytes of a body before the connection breaks."""

    def __init__(self):
        self.files, self.requests, self.cut, self.ranges = {}, [], None, True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name, asked = self.path.lstrip("/"), self.headers.get("Range")
                server.requests.append((name, asked))
                if name not in server.files:
                    self.send_error(404)
                    return
                body = server.files[name]
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:][: server.cut])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(download, "GROUPLENS", server.url)
    monkeypatch.setattr(download, "SNAP", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.mark.parametrize("ranges", [True, False], ids=["continues", "starts over"])
def test_a_break_is_resumed(tmp_path, server, ranges):
    """The connection breaks after 1,000,000 bytes; the next attempt requests the rest, or starts over if it must."""
    server.files["data.bin"], server.cut = CONTENT, 1_000_000
    file = PublicFile(f"{server.url}/data.bin")
    with pytest.raises(InputError, match=r"broke after 1,000,000 of 5,120,000 bytes.*run the command again"):
        download.download(file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin.part"]
    server.cut, server.ranges = None, ranges
    assert download.download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [("data.bin", None), ("data.bin", "bytes=1000000-")]
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_a_complete_part_is_taken_as_it_is(tmp_path, server):
    """The machine stopped after the last byte was written and before the file was renamed."""
    server.files["data.bin"] = CONTENT
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download.download(PublicFile(f"{server.url}/data.bin"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("right", [True, False])
def test_the_published_checksum_is_checked(tmp_path, server, right):
    """A file with another checksum is deleted, so that the next attempt does not resume it."""
    server.files["data.bin"] = CONTENT if right else CONTENT[:-1] + b"!"
    server.files["data.bin.md5"] = f"MD5 (data.bin) = {hashlib.md5(CONTENT).hexdigest()}\n".encode()
    file = PublicFile(f"{server.url}/data.bin", f"{server.url}/data.bin.md5")
    if right:
        assert download.download(file, tmp_path).read_bytes() == CONTENT
    else:
        with pytest.raises(InputError, match="has the MD5 sum"):
            download.download(file, tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_is_absent_or_unreachable_is_said(tmp_path, server, monkeypatch):
    """The errors name a missing file, an unreachable server and an unknown edition."""
    with pytest.raises(InputError, match=r"404.*set --raw to its folder"):
        download_public("amazon", None, tmp_path)
    monkeypatch.setattr(download, "GROUPLENS", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be downloaded"):
        download_public("movielens", None, tmp_path)
    with pytest.raises(InputError, match="no edition 'ml-3m' of movielens: choose one of ml-latest-small"):
        download_public("movielens", "ml-3m", tmp_path)


def test_checksums_are_asked_for_where_grouplens_publishes_them():
    """GroupLens publishes one for every numbered edition; ml-latest-small changes over time and has none."""
    assert public_files("movielens", "ml-25m")[1][0].md5_url.endswith("/ml-25m.zip.md5")
    assert public_files("movielens", None) == (
        "ml-latest-small",
        (PublicFile(f"{download.GROUPLENS}/ml-latest-small.zip"),),
    )


def test_preprocess_fetches_what_it_is_not_given(tmp_path, server):
    """`--dataset movielens` without `--raw` downloads once, unpacks, and uses the edition as the name in tables."""
    ratings = "userId,movieId,rating,timestamp\n" + "".join(
        f"{user},{item},4,{user * item}\n" for user in range(1, 6) for item in range(1, 7)
    )
    movies = "movieId,title,genres\n" + "".join(f"{item},Film {item} (1999),Drama\n" for item in range(1, 7))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("ml-latest-small/ratings.csv", ratings)
        archive.writestr("ml-latest-small/movies.csv", movies)
    server.files["ml-latest-small.zip"] = packed.getvalue()
    for _ in range(2):
        row = preprocess(Preprocessing(dataset="movielens"), tmp_path).row()
        assert (row["dataset"], row["users"], row["items"], row["interactions"]) == ("ml-latest-small", 5, 6, 30)
    assert server.requests == [("ml-latest-small.zip", None)]
