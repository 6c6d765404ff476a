"""Titles as they appear in a prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.titles import movie_title, product_title


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Beautiful Mind, A (2001)", "A Beautiful Mind (2001)"),
        ("Seven (a.k.a. Se7en) (1995)", "Seven (1995)"),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)", "The City of Lost Children (1995)"),
        ("Avventura, L' (Adventure, The) (1960)", "L'Avventura (1960)"),
        ("Moonlight", "Moonlight"),
        ("Hello, Dolly! (1969)", "Hello, Dolly! (1969)"),
        ("(500) Days of Summer (2009)", "(500) Days of Summer (2009)"),
        ("(Untitled) (2009)", "(Untitled) (2009)"),
        ("Babylon 5 ", "Babylon 5"),
    ],
)
def test_movie_titles_read_naturally(raw, title):
    """By hand: articles move to the front, alternative titles go and the year stays, as in the authors' clean-up."""
    assert movie_title(raw) == title


@given(st.text())
def test_no_movie_loses_its_title(raw):
    """A title that is not blank never becomes empty, and cleaning never raises an error."""
    assert bool(movie_title(raw)) == bool(raw.strip())


def test_product_titles_lose_entities_and_runs_of_space():
    """8.6 % of Beauty's titles contain HTML entities; the expected value is by hand."""
    assert product_title("L&#39;Oreal  Shampoo &amp; Conditioner\n") == "L'Oreal Shampoo & Conditioner"
