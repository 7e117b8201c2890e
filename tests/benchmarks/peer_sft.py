# ruff: noqa: I001 (the imports that a user needs stand apart from those that measure)
"""sft_course, as it is used: the one call, with its default recipe.

Nothing of the recipe is changed. To see accuracies on the way, every FineTuner is given a `watch`, which the library calls after
the head and after every epoch. The head's accuracy on the reported images is known there already and costs nothing more; that
of an epoch is measured for the curve only, off the clock. The last point is what the call returns, when it returns it.
"""
# user code begins
from sft_course import fine_tune
# user code ends

from sft_course.loop import score
from sft_course.tools.engine import FineTuner

NAME = "sft_course"
TRAINER = False


def run(folder, size, classes, seed, epochs, bench):  # `epochs` is for the peers: the default recipe knows its own
    init = FineTuner.__init__
    def watched(tuner, *args, **kwargs):
        init(tuner, *args, **kwargs)
        def watch(row):
            if row["train"] == "head":
                bench.point(score(tuner.head.test, tuner.labels[tuner.test]).accuracy, "head")
            else:
                with bench.evaluation():
                    bench.point(tuner.measure().accuracy)
        tuner.watch = watch
    FineTuner.__init__ = watched

    # user code begins
    result = fine_tune(folder, size=size, seed=seed)
    print(result.accuracy)
    # user code ends

    bench.point(result.accuracy, "final")
    return {"chosen": result.card["chosen"], "held_back": result.card["metrics"]["n_val"]}
