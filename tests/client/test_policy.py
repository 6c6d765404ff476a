"""The policy of a request as the JSON of its tensor, and the options of the command line that name one."""

import json

import numpy as np
import pytest

from llamarec.commands.recommend import read_policy
from llamarec_client import Policy, Request
from preprocessing.errors import InputError
from serving.policy import read_policy as read_in_server


def sent(policy: Policy) -> dict:
    """Return the fields that the server reads."""
    (tensor,) = [tensor for tensor in Request([], policy=policy).inputs() if tensor.name() == "POLICY"]
    assert tensor.shape() == [1, 1]
    raw = tensor.raw_data() if hasattr(tensor, "raw_data") else tensor._raw_content
    return read_in_server(raw[4:], "POLICY")  # the length in 4 bytes comes first


def test_a_field_that_is_not_set_is_not_sent():
    """None is sent, because it sets a field of the release's own policy to nothing."""
    assert sent(Policy()) == {}
    assert sent(Policy(max_per_group=None, repeats="all")) == {"max_per_group": None, "repeats": "all"}


def test_every_field_is_sent_as_the_server_reads_it():
    """Numbers of NumPy are numbers, and any sequence of names is a list."""
    policy = Policy(
        max_per_group=np.int64(2),
        only_groups=("Film noir", "Übersee"),
        never_groups=[],
        boosts={"50": np.float32(0.5), "181": 2},
        repeats=7,
    )
    assert sent(policy) == {
        "max_per_group": 2,
        "only_groups": ("Film noir", "Übersee"),
        "never_groups": (),
        "boosts": {"50": 0.5, "181": 2.0},
        "repeats": 7,
    }


def test_a_request_without_a_policy_has_no_such_tensor():
    """So that servers of versions without policies answer it."""
    assert [tensor.name() for tensor in Request([]).inputs()] == ["HISTORY"]


def test_the_command_line_takes_json_or_a_file(tmp_path):
    """`llamarec recommend --policy`; null stays null."""
    fields = {"max_per_group": None, "boosts": {"50": 2}}
    (tmp_path / "policy.json").write_text(json.dumps(fields))
    for given in (json.dumps(fields), str(tmp_path / "policy.json")):
        assert read_policy(given) == Policy(max_per_group=None, boosts={"50": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.json", "--policy absent.json cannot be read .*: give a file, or a JSON object"),
        ("{", "--policy is not JSON"),
        ('{"only": []}', "--policy holds only: a policy has max_per_group, only_groups"),
    ],
)
def test_what_is_no_policy_is_refused(given, message):
    """One sentence that names the option and the remedy."""
    with pytest.raises(InputError, match=message):
        read_policy(given)
