"""A task of one's own, as mteb documents it: metadata, and a data set that `datasets` loads, here from a folder."""

from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata


class Colours(AbsTaskClassification):
    metadata = TaskMetadata(
        name="Colours",
        description="Which colour does a text name?",
        dataset={"path": "colours", "revision": "1"},
        type="Classification",
        category="t2c",
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )
    n_experiments = 2
