"""Where the raw data sets are found, and what is said when they are not."""

import argparse
from pathlib import Path

import pytest

from experiments.datasets import DEFAULT, SOURCES, add_data_option, data_folder, preprocessing_of
from preprocessing.errors import InputError


def test_the_option_goes_before_the_environment_and_the_default_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    option, variable = tmp_path / "option", tmp_path / "variable"
    for folder in (option, variable):
        folder.mkdir()
    monkeypatch.setenv("LLAMAREC_DATA", str(variable))
    assert data_folder(option) == option
    assert data_folder(None) == variable
    monkeypatch.delenv("LLAMAREC_DATA")
    monkeypatch.setattr("experiments.datasets.DEFAULT", option)
    assert data_folder(None) == option
    assert DEFAULT.parts[-3:] == ("..", "shared", "data")


def test_an_absent_folder_names_the_option_and_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMAREC_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere does not exist.*--data DIR.*LLAMAREC_DATA"):
        data_folder(None)


def test_the_option_is_called_data():
    parser = argparse.ArgumentParser()
    add_data_option(parser)
    assert parser.parse_args(["--data", "folder"]).data == Path("folder")
    assert parser.parse_args([]).data is None


@pytest.mark.shared_data
def test_both_data_sets_are_in_the_folder(shared_data: Path):
    for dataset in SOURCES:
        raw = preprocessing_of(dataset, shared_data).raw
        assert raw is not None
        assert raw.is_dir()
