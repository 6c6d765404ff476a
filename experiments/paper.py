"""The results that the paper reports (LlamaRec, Yue et al. 2023), for the comparisons on the results pages."""

METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10")
"""Columns of the paper's tables 1 and 3, in the order of :func:`models.metrics.summary`."""
Figures = tuple[float, ...]

TABLE_1: dict[str, dict[str, Figures]] = {
    "ml-latest-small": {
        "lrurec": (0.0390, 0.0468, 0.0705, 0.0491, 0.0705, 0.1426),
        "sasrec": (0.0333, 0.0409, 0.0641, 0.0378, 0.0522, 0.0993),
        "bert4rec": (0.0188, 0.0232, 0.0368, 0.0244, 0.0366, 0.0785),
        "narm": (0.0298, 0.0359, 0.0544, 0.0332, 0.0441, 0.0801),
        "llamarec": (0.0440, 0.0543, 0.0852, 0.0529, 0.0759, 0.1524),
    },
    "amazon-2014-beauty": {
        "lrurec": (0.0376, 0.0435, 0.0614, 0.0417, 0.0533, 0.0916),
        "sasrec": (0.0336, 0.0397, 0.0582, 0.0371, 0.0481, 0.0844),
        "bert4rec": (0.0246, 0.0298, 0.0457, 0.0276, 0.0372, 0.0686),
        "narm": (0.0289, 0.0342, 0.0503, 0.0321, 0.0420, 0.0746),
        "llamarec": (0.0385, 0.0450, 0.0648, 0.0428, 0.0554, 0.0971),
    },
}
"""Table 1: all test users, by data set and model; ``llamarec`` is LRURec with the 7B ranker."""

TABLE_3: dict[str, dict[str, Figures]] = {
    "ml-latest-small": {
        "lrurec": (0.1965, 0.2356, 0.3544, 0.2384, 0.3367, 0.6654),
        "sasrec": (0.1449, 0.1793, 0.2833, 0.1596, 0.2147, 0.3927),
        "bert4rec": (0.0887, 0.1032, 0.1477, 0.1054, 0.1435, 0.2720),
        "narm": (0.1369, 0.1607, 0.2329, 0.1485, 0.1886, 0.3188),
        "llamarec": (0.2184, 0.2693, 0.4227, 0.2623, 0.3766, 0.7560),
    },
    "amazon-2014-beauty": {
        "lrurec": (0.2944, 0.3403, 0.4801, 0.3259, 0.4168, 0.7170),
        "sasrec": (0.2296, 0.2679, 0.3843, 0.2491, 0.3152, 0.5312),
        "bert4rec": (0.1587, 0.1901, 0.2861, 0.1743, 0.2281, 0.4043),
        "narm": (0.1961, 0.2284, 0.3263, 0.2128, 0.2689, 0.4517),
        "llamarec": (0.3016, 0.3524, 0.5071, 0.3350, 0.4337, 0.7600),
    },
}
"""Table 3: the test users whose true item is among LRURec's top 20."""

TABLE_4_METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")
TABLE_4: dict[str, tuple[str, ...]] = {
    "P5": ("0.0367", "0.0493", "0.0416", "0.0645"),
    "PALR": ("n/a", "n/a", "0.0446", "0.0721"),
    "GPT4Rec": ("n/a", "0.0653", "n/a", "0.0810"),
    "RecMind": ("0.0289", "0.0415", "0.0375", "0.0574"),
    "POD": ("0.0395", "0.0537", "0.0443", "0.0688"),
    "LlamaRec, 7B": ("0.0450", "0.0648", "0.0554", "0.0971"),
}
"""Table 4: rankers that are language models, on Beauty, with the figures that their authors reported."""
