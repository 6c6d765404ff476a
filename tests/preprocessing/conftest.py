"""Imports what sets Dask's options before any test module imports Dask, as the command line does."""

import preprocessing  # noqa: F401
