"The benchmark's own arithmetic: times to an accuracy, lines of user code, tables. The peers are not needed here."
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(HERE))

import bench  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import tasks as other_tasks  # noqa: E402
import text as text_speed  # noqa: E402
from marks import between_marks  # noqa: E402


def row(what, seed, points, data="blooms", **more):
    found = [{"seconds": t, "accuracy": a, "kind": "epoch"} for t, a in points]
    return {"kind": "peer", "what": what, "data": data, "seed": seed, "points": found, "peak": 500e6, "before": 300e6, "code": "0",
            "train": 90, "val": 60, "classes": 6, "size": 96, "threads": 2, "epochs": 10, "left_out": [], "foreign_cores": .1,
            "versions": {"torch": "2"}} | more


def test_the_mean_curve_begins_when_every_run_knows_an_accuracy_and_takes_the_last_known():
    curve = report.mean_curve([[(1, .5), (4, .9)], [(2, .7), (3, .8)]])
    assert curve == [(2, pytest.approx(.6)), (3, pytest.approx(.65)), (4, pytest.approx(.85))]
    assert report.mean_curve([[(5, .8)]]) == [(5, .8)]


def test_time_to_an_accuracy_is_the_first_evaluation_that_reaches_it():
    curve = [(1, .5), (2, .8), (3, .7), (4, .9)]
    assert [report.time_to(curve, a) for a in (.4, .8, .81, .95)] == [1, 2, 4, None]


def test_a_point_on_the_way_that_lies_after_the_end_is_not_of_the_run():
    assert report.points(row("sft", 0, [(1, .5), (9, .4), (8, .6)])) == [(1, .5), (8, .6)]


def test_only_lines_that_a_user_writes_are_counted():
    source = '''"""Docstring."""
# user code begins
import torch

# user code ends
from harness import lite0

def run(bench):
    # user code begins
    def f():
        "One more docstring."
        return torch.tensor([
            1,  # a comment beside code counts with it

        ])
    # a comment
    bench.watch(f)  # bench
    text = """two
lines"""
    # user code ends
    bench.point(1)
'''
    assert report.user_lines(source) == 1 + 1 + 3 + 2


def test_every_peer_marks_its_user_code():
    counts = {p: report.user_lines((HERE / f"peer_{p}.py").read_text()) for p in report.ORDER}
    assert all(2 <= n <= 80 for n in counts.values()) and min(counts, key=counts.get) == "sft", counts


def test_evaluations_are_off_the_clock_but_count_in_their_own_point():
    now = [0.]
    watch = harness.Bench(lambda: now[0])
    class Peer:
        def evaluate(self):
            now[0] += 5
            return .7
    peer = Peer()
    watch.watch(peer, "evaluate", lambda found: found)
    for _ in range(2):
        now[0] += 10
        peer.evaluate()
    assert [(p["seconds"], p["accuracy"]) for p in watch.points] == [(15, .7), (25, .7)] and watch.seconds() == 20


def test_the_tables_say_who_reaches_what_and_which_targets_are_met():
    rows = [row("sft", s, [(2, .80), (6, .90 + s / 100)]) for s in (0, 1)]
    rows += [row("features", s, [(4, .78)]) for s in (0, 1)] + [row("fastai", s, [(60, .7), (120, .85)]) for s in (0, 1)]
    rows += [{"kind": "target", "what": "import", "data": "blooms", "seed": None, "measured": {"ours": .3}, "code": "1"}]
    text = report.render(rows, dict.fromkeys(report.ORDER, 7), {"sft": "0", "import": "2"})
    assert "| sft_course | 0.905 ± 0.007 | 6.0 ± 0.0 | 6.0 | 500 (200) | 7 |" in text
    assert "| features + logistic regression | 0.780 ± 0.000 | 4.0 ± 0.0 | never |" in text
    assert "| 1/20.0 (6.0 of 120.0 s) | yes |" in text and "| 0.50 × (2.0 of 4.0 s) | yes |" in text and "| +0.125 | yes |" in text
    assert "| 0.300 s | **no** |" in text and "Made by other code than is here now: import on blooms." in text


def test_a_peer_that_we_never_reach_is_a_target_missed():
    rows = [row("sft", 0, [(2, .80)]), row("plain", 0, [(60, .85)])]
    assert [r[3:] for r in report.peer_targets("x", report.by_data(rows)["blooms"])][0] == ["never (theirs 60.0 s)", "**no**"]


def test_the_whole_run_is_set_beside_the_trainer_that_ends_first():
    rows = [row("sft", 0, [(2, .80), (20, .9)]), row("plain", 0, [(60, .85)]), row("fastai", 0, [(50, .95)])]
    found = report.whole_run("x", report.by_data(rows)["blooms"])
    assert found[3:] == ["1/2.5 (20.0 of 50.0 s; accuracy 0.900 and 0.950)", "**no**"] and "fastai" in found[0]


def test_a_peer_that_ends_ahead_is_ahead_by_a_margin_with_its_error():
    ours, theirs = ([row(p, s, [(1, a)]) for s, a in enumerate(values)] for p, values in (("sft", (.8, .9)), ("plain", (.84, .92))))
    assert report.ahead(ours, theirs) == ", ahead by 0.030 ± 0.010 (standard error over seeds)"
    assert report.ahead(theirs, ours) == report.ahead(ours[:1], theirs) == ""


def test_the_last_row_of_a_measurement_counts():
    rows = report.latest([row("sft", 0, [(1, .1)]), row("sft", 1, [(1, .2)]), row("sft", 0, [(1, .3)])])
    assert sorted(report.final([r]) for r in rows) == [.2, .3]


def test_targets_show_numbers_and_are_judged():
    measured = {"ours": 1., "whole": 2., "reference": 4., "apart": .01, "apart_float": .1, "all_many": 3, "all_few": 2, "many": 100, "few": 10}
    rows = [{"kind": "target", "what": t, "data": "blooms", "measured": measured} for t in report.TARGETS]
    met = {r[0]: r[4] for r in report.own_targets(rows)}
    assert len(met) == len(report.TARGETS) and met["top stages on cached boundary activations, an epoch"] == "yes"
    assert met["further epochs of the head phase"] == met["throughput, all layers training, data included"] == "**no**"


def test_peers_take_turns_within_a_seed_and_what_is_there_is_not_run_again():
    plan = bench.plan(["a", "b"], [0, 1], ["sft", "plain"], ["head", "import"])
    assert [r[1:] for r in plan[:4]] == [("sft", "a", 0), ("plain", "a", 0), ("sft", "b", 0), ("plain", "b", 0)]
    assert [r[1:3] for r in plan if r[0] == "target"] == [("head", "a"), ("head", "b"), ("import", "a")]
    one = row("sft", 0, [(1, .5)])
    assert bench.is_there(one, [one]) and not bench.is_there(one, [one | {"code": "1"}, one | {"seed": 1}])


def test_the_data_option_takes_a_size(tmp_path):
    (tmp_path / "leaves").mkdir()
    assert bench.sources(["blooms", f"{tmp_path}/leaves@128"]) == [("blooms", "blooms", 96), ("leaves", f"{tmp_path}/leaves", 128)]
    with pytest.raises(SystemExit, match="no such folder"):
        bench.sources([str(tmp_path / "gone")])


def test_tables_go_between_the_marks_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- tables begin -->\nold\n<!-- tables end -->\nafter\n")
    for _ in range(2):
        report.write_tables(readme, "| new \\1 |\n")
    assert readme.read_text() == "before\n<!-- tables begin -->\n\n| new \\1 |\n\n<!-- tables end -->\nafter\n"
    assert all(mark in (HERE / "README.md").read_text() for mark in report.MARKS)


def test_code_that_only_looks_different_has_the_same_key(tmp_path):
    for name, text in (("a.py", "x = 1  # one\n"), ("b.py", "\n\nx  =  1\n"), ("c.py", "x = 2\n")):
        (tmp_path / name).write_text(text)
    a, b, c = (bench.code_key(tmp_path / n) for n in ("a.py", "b.py", "c.py"))
    assert a == b != c


def test_the_figure_is_drawn(tmp_path):
    rows = [row("sft", s, [(2, .80), (6, .90)]) for s in (0, 1)] + [row("features", 0, [(4, .78)], data="ants")]
    report.draw(rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 5000


def test_the_table_of_other_tasks_is_what_the_records_hold():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert other_tasks.written(text) == text, "python tests/benchmarks/tasks.py --write draws it anew"
    assert all(len(other_tasks.values(f, column, where)) >= 3 for _, _, ways in other_tasks.TABLE for _, f, column, _, where in ways)


def test_the_table_of_the_language_model_is_what_was_measured():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert text_speed.written(text) == text, "python tests/benchmarks/text.py --write draws it anew"


def test_only_what_stands_between_the_marks_is_replaced():
    assert between_marks("a [ old ] b", "[", "]", "\\1") == "a [\n\\1\n] b"
    for text in ("a ] b", "a [ [ ] b"):
        with pytest.raises(SystemExit, match="not there, or not once"):
            between_marks(text, "[", "]", "new")


def test_the_language_models_table_compares_with_the_bare_step(tmp_path):
    rows = [(way, turn, seconds + turn) for way, seconds in zip(text_speed.WAYS, (1, 5, 7, 3, 6, 8, 9, 4)) for turn in (1, 2)]
    head = "way,turn,device,threads,precision,examples,seconds,tokens_per_second,loss,torch,transformers,peft"
    lines = [f'"{way}",{turn},a card,1,bfloat16,64,{s},{1200 / s},.5,2,5,0' for way, turn, s in rows]
    (tmp_path / "text.csv").write_text("\n".join([head, *lines]))
    table = text_speed.table(tmp_path / "text.csv").splitlines()
    assert [row.split(" | ")[2] for row in table[2:10]] == ["0.56", "1.44", "1.89", "1.00", "1.36", "1.73", "1.91", "1.00"]
    assert table[2].startswith("| upper 4 layers, ours | 500 (400 to 600) |") and "a card in bfloat16" in table[-1]
