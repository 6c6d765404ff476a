"""`llamarec export`."""

from typing import TYPE_CHECKING

from llamarec.export_options import takes_export_options
from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Json, Repository
from llamarec.tables import print_row

if TYPE_CHECKING:  # the export imports torch and onnx: not for `--help`
    from export.repository import Export


@takes_export_options
def export(
    options: "Export",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Fill the Triton model repository from the trained retriever and ranker."""
    from export.repository import export as run

    release = run(options, artifacts, repository)
    print_row("exported", {"release": release, "repository": str(repository)}, as_json)
