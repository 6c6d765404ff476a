"""The queue of the rankers' trainings."""

from experiments.ranker_runs import RETRIEVERS, RUNS, Run, runs_of
from models.retriever.options import RetrieverTraining


def test_every_run_has_valid_options_and_files_of_its_own():
    """Options and retrievers that do not exist would fail only hours into the queue."""
    assert len({path for run in RUNS for path in run.files().values()}) == sum(len(run.ways) for run in RUNS)
    for run in RUNS:
        assert run.options().seed == run.seed
        model = RetrieverTraining(**RETRIEVERS[run.dataset][run.retriever]).model
        assert model == ("lrurec" if run.retriever == "stage" else run.retriever)


def test_a_ranker_of_random_negatives_serves_every_retriever():
    """It does not depend on the retriever; one that is trained on the retriever's lists does."""
    assert Run("amazon-2014-beauty", retriever="sasrec").trained() == Run("amazon-2014-beauty")
    for own in (
        Run("amazon-2014-beauty", retriever="sasrec", variant="lists-only"),
        Run("amazon-2014-beauty", retriever="stage", variant="pool"),
    ):
        assert own.trained() == own
    assert Run("amazon-2014-beauty", retriever="stage").trained() == Run("amazon-2014-beauty")
    fifty = Run("ml-latest-small", variant="fifty-candidates")
    assert fifty.trained() == Run("ml-latest-small")
    assert fifty.options().candidates == 50


def test_runs_of_a_configuration_are_its_seeds():
    assert [run.seed for run in runs_of("ml-latest-small", "lrurec", "main")] == [42, 43, 44]
