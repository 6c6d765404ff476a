"""Titles as they appear in a prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.titles import BLANK, LONGEST_TITLE, SCRIPT, movie_title, prompt_title


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


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("L&#39;Oreal  Shampoo &amp; Conditioner\n", "L'Oreal Shampoo & Conditioner"),
        ("<b>Bold</b> &amp; more", "Bold & more"),
        ('<span class="a-size-medium">Soap</span>, <i>12</i> pieces', "Soap, 12 pieces"),
        ("Two<br/>lines<!-- and a comment -->", "Two lines"),
        ('Gel<script type="text/javascript">var x = 1;</script>', "Gel"),
        ("I <3 you & <Unknown> friends: a < b > c", "I <3 you & <Unknown> friends: a < b > c"),
        ("The &lt;b&gt; element", "The <b> element"),
        ("AT&T", "AT&T"),
        ("x" * 5000, "x" * LONGEST_TITLE),
    ],
)
def test_html_is_cleaned(raw, title):
    """By hand, as a browser shows the text: 8.6 % of Beauty's titles contain HTML entities.

    A sign that belongs to no element of HTML stays.
    """
    assert prompt_title(raw) == (title, "")


def test_a_script_is_no_title():
    """Amazon's metadata of 2018 has scripts as titles; its public loaders drop what contains "getTime"."""
    assert prompt_title("var aPageStart = (new Date()).getTime();\nvar ue_t0=...") == ("", SCRIPT)


@pytest.mark.parametrize("raw", ["", " \t", "\x07\n", "<br>", "&nbsp;"])
def test_nothing_to_see_is_blank(raw):
    assert prompt_title(raw) == ("", BLANK)
