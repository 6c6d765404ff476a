"""The data stage, and what the later stages and the server read of its results."""

import os

# Set here because Dask reads them at its first import, and worker processes that are started from here inherit them.
# Merlin 23.8 is written for the data frames and the object columns of Dask 2023. Newer versions of Dask, which cuDF
# needs, would plan queries instead and turn text into Arrow's strings; Dask 2023.7 does as the options say anyway.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")
