"""Checks of the GPU path: sections that run on a card in minutes, and on a processor with tiny shapes."""
