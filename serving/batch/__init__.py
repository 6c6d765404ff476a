"""Recommends for all users at once, from the exported files and without a server.

:mod:`serving.batch.recommend_all` is the stage, :mod:`serving.batch.users` where users and their histories come from,
:mod:`serving.batch.folder` the output, and :mod:`serving.batch.partitions` the work on one part of it.
"""
