"""Measures the time to encode one request: 200 history items against a catalogue of 100,000.

python -m benchmarks.feature_encoding --json
"""

import argparse
import json
import statistics
import timeit
from typing import Any

import numpy as np

from preprocessing.catalogue import Catalogue
from preprocessing.features import FeatureEncoder

ITEMS = 100_000
HISTORY = 200
FLOOR_US = 50.0
"""Most microseconds that a request may take."""


def measure(repeats: int, calls: int = 1000) -> dict[str, Any]:
    """Return the median microseconds of one call over several runs."""
    ids = [f"item-{number}".encode() for number in range(ITEMS)]
    encoder = FeatureEncoder(Catalogue(ids, [""] * ITEMS, [1] * ITEMS))
    history = [ids[place] for place in np.random.default_rng(0).integers(0, ITEMS, HISTORY)]
    runs = timeit.repeat(lambda: encoder.encode(history), number=calls, repeat=repeats)
    microseconds = statistics.median(runs) / calls * 1e6
    return {"history": HISTORY, "microseconds": round(microseconds, 1), "floor_met": microseconds < FLOOR_US}


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="Runs; their median is printed.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a line.")
    given = parser.parse_args()
    result = measure(given.repeats)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{result['microseconds']} microseconds for {HISTORY} items; floor met: {result['floor_met']}")


if __name__ == "__main__":
    main()
