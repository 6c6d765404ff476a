"""The command line: bad input ends with one sentence and exit code 2; results are printed as tables and as JSON."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from serving.server.programs import free_ports

COMMANDS = [
    "preprocess",
    "train-retriever",
    "tune",
    "train-ranker",
    "evaluate",
    "export",
    "serve",
    "recommend",
    "bench",
    "demo",
    "doctor",
]


def test_help_names_every_command(run):
    """`llamarec --help` lists every command."""
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    """`--help` of each command exits with code 0 and explains its options."""
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Options" in out


def refused(result, *parts):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_stages_out_of_order_name_the_one_to_run_first(run, tmp_path):
    """In an empty folder, each stage names the command that makes its input, and writes nothing."""
    refused(run("train-retriever", "--artifacts", tmp_path), "llamarec preprocess")
    refused(run("tune", "--artifacts", tmp_path), "llamarec preprocess")
    refused(run("train-ranker", "--artifacts", tmp_path), "llamarec preprocess")
    refused(run("export", "--artifacts", tmp_path, "--repository", tmp_path / "r"), "llamarec preprocess")
    refused(run("evaluate", "--artifacts", tmp_path, "--repository", tmp_path), "llamarec export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--preset", "quick"), "demo, paper"),
        (("--model", "gru"), "lrurec"),
        (("--dropout", "1"), "dropout"),
        (("--epochs", "0"), "epochs"),
        (("--titles", "covers"), "none, words, model"),
        (("--second", "quick"), "default, demo, paper"),
        (("--preset", "paper", "--second", "sasrec-beauty"), "use signals too"),
        (("--base", "smollm2-135m-instruct"), "--titles model"),
        (("--device", "tpu"), "choose auto, cpu, gpu or gpu:N"),
        (("--device", "gpu:99"), "gpu:99 cannot be used"),
    ],
)
def test_options_out_of_range_are_refused(run, tmp_path, options, part):
    """The error names the option or its valid values."""
    refused(run("train-retriever", "--artifacts", tmp_path, *options), part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--space", "huge"), "paper, dropout, wide"),
        (("--budget", "0"), "budget"),
        (("--model", "gru"), "lrurec"),
        (("--preset", "quick"), "demo, paper"),
    ],
)
def test_a_search_out_of_range_is_refused(run, tmp_path, options, part):
    """The error names the option or its valid values, and no folder is created."""
    refused(run("tune", "--artifacts", tmp_path / "a", *options), part)
    assert not (tmp_path / "a").exists()


@pytest.mark.thorough
def test_tune_prints_a_table_and_json(run, artifacts, tmp_path):
    """`tune` prints the best training and the command that uses it; run again, it prints the same result as JSON."""
    (tmp_path / "data").symlink_to(artifacts / "data")
    ask = ("tune", "--artifacts", tmp_path, "--space", "dropout", "--budget", 1, "--epochs", 1)
    code, out, _ = run(*ask)
    assert code == 0
    code, printed, _ = run(*ask, "--json")
    assert code == 0
    best = json.loads(printed)["best"]
    assert f"{best['validation_Recall@10']:.4f}" in out
    assert f"train-retriever --preset paper --model lrurec --dropout {best['dropout']:g}" in out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--preset", "fastest"), "demo, quick, paper, llama2-7b, smollm2-135m"),
        (("--candidates", "60"), "2 to 52"),
        (("--negatives", "random", "--order", "retriever"), "set negatives to retriever"),
        (("--layers", "0"), "layers must be at least 1"),
        (("--device", "tpu"), "choose auto, cpu, gpu or gpu:N"),
        (("--device", "gpu:99"), "gpu:99 cannot be used"),
    ],
)
def test_ranker_options_that_cannot_train_are_refused(run, tmp_path, options, part):
    """The error names the valid values or a valid combination: random negatives cannot be in the retriever's order."""
    refused(run("train-ranker", "--artifacts", tmp_path, *options), part)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.02, "it is worth its pass here"),
        (-0.001, 0.02, "the retrieval stage alone (llamarec_retrieval) is as good here"),
        (-0.02, -0.001, "it makes the list worse: serve the retrieval stage alone"),
    ],
)
def test_what_the_language_model_is_worth_is_said(run, monkeypatch, tmp_path, low, high, said):
    """The command says what follows from the interval of the gain: above 0, around 0, or below 0."""
    found = {name: {"NDCG@10": 0.4} for name in ("retriever", "alone", "fused")} | {"users": 9}
    sample = {"users": 9, "untuned": {"NDCG@10": 0.2}}
    metrics = {"validation": found, "sample": sample, "best_step": 0, "weight": 0.95}
    metrics["gain"] = {"mean": (low + high) / 2, "low": low, "high": high}
    monkeypatch.setattr("models.ranker.training.train_ranker", lambda *given: metrics)
    code, out, _ = run("train-ranker", "--artifacts", tmp_path, "--preset", "quick")
    assert code == 0
    assert f"NDCG@10 for 9 validation users with their next item in the list: {said}" in out


def test_an_unknown_data_set_is_refused(run, tmp_path):
    """The error names the unknown data set and lists the supported ones."""
    refused(run("preprocess", "--dataset", "netflix", "--artifacts", tmp_path), "netflix", "movielens-100k")


def test_a_missing_base_is_refused_before_anything_is_written(run, artifacts, tmp_path):
    """A base that is neither a folder nor on the hub is named in the error, and no ranker folder is created."""
    for stage in ("data", "retriever"):
        shutil.copytree(artifacts / stage, tmp_path / stage)
    refused(run("train-ranker", "--artifacts", tmp_path, "--base", tmp_path / "no-llama"), "no-llama")
    assert not (tmp_path / "ranker").exists()


def test_no_server_listening(run):
    """The error names the address, or each of several, and the command that starts a server."""
    first, second = (f"127.0.0.1:{port}" for port in free_ports(2))
    refused(run("recommend", "--history", "50", "--server", first), first, "llamarec serve")
    refused(run("recommend", "--history", "50", "--server", f"{first}, {second}"), first, second, "llamarec serve")


def test_a_port_in_use(tmp_path):
    """If another process holds its port, `llamarec serve` exits with code 2 and names the port and the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "llamarec.cli", "serve", "--repository", tmp_path, "--grpc-port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 2
    assert str(port) in ended.stderr
    assert "--grpc-port" in ended.stderr


@pytest.mark.thorough
def test_the_page_beside_something_on_its_port(run, artifacts, repository):
    """If its port is taken, `demo --ui` names the port and the option, and stops the server that it started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ("--ui-port", port, "--artifacts", artifacts, "--repository", repository)
        code, _, err = run("demo", "--ui", *options)
    assert code == 2
    assert f"port {port} of 127.0.0.1 is in use" in err
    assert "--ui-port" in err


def test_the_page_refuses_a_repository_of_other_data(run, artifacts, repository, tmp_path):
    """A repository exported from other data is refused, because its answers would be shown with the wrong titles."""
    shutil.copytree(artifacts / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "another"}))
    refused(run("demo", "--ui", "--artifacts", tmp_path, "--repository", repository), "llamarec export")


def test_comparing_what_is_no_measurement(run, tmp_path):
    """`bench --compare` names a file that cannot be read, and the command that writes one."""
    refused(run("bench", "--compare", tmp_path / "a.csv", tmp_path / "b.csv"), "a.csv", "llamarec bench")


def test_recommend_prints_json_and_a_table(run, server, artifacts):
    """The two candidates are printed as JSON, and as a table with titles if the artifacts are given.

    Item 50 of MovieLens-100K is Star Wars.
    """
    ask = ("recommend", "--history", "181", "--candidates", "50", "--candidates", "100", "--server", server.url)
    code, out, _ = run(*ask, "--json")
    assert code == 0
    answer = json.loads(out)
    assert {row["item_id"] for row in answer} == {"50", "100"}
    code, out, _ = run(*ask, "--artifacts", artifacts)
    assert code == 0
    assert "Star Wars (1977)" in out


def test_top_k_out_of_range_is_refused_by_the_server(run, server):
    """The server's INVALID_ARGUMENT becomes exit code 2 and a message with the name of the tensor."""
    refused(run("recommend", "--top-k", "21", "--server", server.url), "TOP_K")


def test_a_policy_of_the_command_line_reaches_the_server(run, server, tmp_path):
    """A repeated item comes back, a rule about groups is refused by items without any, and a file has to be there."""
    ask = ("recommend", "--history", "50", "--server", server.url, "--json", "--policy")
    code, out, _ = run(*ask, '{"repeats": "all", "boosts": {"50": 1e9}}')
    assert code == 0
    assert json.loads(out)[0]["item_id"] == "50"
    refused(run(*ask, '{"max_per_group": 1}'), "POLICY: max_per_group", "--group-column")
    refused(run(*ask, tmp_path / "absent.json"), "--policy", "absent.json")


def test_evaluate_prints_the_papers_tables_as_json(run, artifacts, repository):
    """The JSON has the documented shape, and users outside the subset count as misses.

    Therefore each overall Recall@10 is that of the subset times the subset's share of the users.
    """
    code, out, _ = run("evaluate", "--artifacts", artifacts, "--repository", repository, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["dataset"] == "movielens-100k"
    share = result["subset_users"] / result["users"]
    for name in ("retriever", "ranker_alone", "ranker"):
        assert result[name]["overall"]["Recall@10"] == pytest.approx(share * result[name]["subset"]["Recall@10"])


def test_preprocess_prints_the_papers_table_2_row(run, artifacts):
    """A finished stage prints the figures of its manifest; MovieLens-100K has 943 users and 100,000 ratings.

    What was read is under "reading" in JSON, and in sentences above the table.
    """
    code, out, _ = run("preprocess", "--artifacts", artifacts, "--json")
    assert code == 0
    assert json.loads(out)["users"] == 943
    assert json.loads(out)["reading"]["interactions"] == 100_000
    _, out, _ = run("preprocess", "--artifacts", artifacts)
    assert "read ml-100k.inter (text): 100,000 rows\n" in out
    assert "times: numbers in seconds, from 1997-09-20" in out
