"""How the users of a canary release are chosen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarec_client.canary import canary_model, parse_share
from llamarec_client.errors import InvalidRequest

USERS = [f"user {number}" for number in range(20_000)]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_share_of_the_users_is_the_one_asked_for(share):
    """The tolerance is four standard deviations of a binomial: 0.6 and 1.4 percentage points for 20,000 users."""
    chosen = sum(canary_model("llamarec", user, share) == "llamarec_canary" for user in USERS) / len(USERS)
    assert chosen == pytest.approx(share, abs=4 * (share * (1 - share) / len(USERS)) ** 0.5)


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_user_stays_while_the_share_grows(user, one, other):
    """A user chosen for a smaller share is chosen for every larger one; share 0 chooses no user and 1 chooses all."""
    small, large = sorted((one, other))
    if canary_model("llamarec", user, small) != "llamarec":
        assert canary_model("llamarec", user, large) == "llamarec_canary"
    assert canary_model("llamarec", user, 0) == "llamarec"
    assert canary_model("llamarec_retrieval", user, 1) == "llamarec_retrieval_canary"


def test_another_salt_draws_other_users():
    """Two independent draws of 10,000 of the 20,000 users have about 5,000 users in common."""
    first, second = ({user for user in USERS if canary_model("m", user, 0.5, salt) != "m"} for salt in ("a", "b"))
    assert 4_700 < len(first & second) < 5_300


def test_a_request_without_a_user_is_never_part_of_a_trial():
    assert canary_model("llamarec", None, 1.0) == "llamarec"


def test_a_share_is_a_percentage():
    """A share is given as a percentage or as a number from 0 to 1; `5` is refused because it would mean 500 %."""
    assert (parse_share("5%"), parse_share("0.05"), parse_share("100%")) == (0.05, 0.05, 1.0)
    for text in ("5", "-1%", "101%", "many", ""):
        with pytest.raises(InvalidRequest, match="percentage"):
            parse_share(text)
