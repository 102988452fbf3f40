"""The tasks by name: what makes their documents, and what scores their answers (0 to 1)."""

from collections.abc import Callable

from aquifer.workloads.needles import make_needles
from aquifer.workloads.scoring import score_needles, score_table, score_text2json
from aquifer.workloads.tables import make_table
from aquifer.workloads.tasks import CountTokens, Sample, Split, TaskName
from aquifer.workloads.text2json import make_text2json

MAKERS: dict[TaskName, Callable[[int, int, CountTokens, Split], Sample]] = {
    "text2json": make_text2json,
    "needles": make_needles,
    "table": make_table,
}
SCORERS: dict[TaskName, Callable[[str, str], float]] = {
    "text2json": score_text2json,
    "needles": score_needles,
    "table": score_table,
}
