"CSVs as they come: the column of the split, cells that would be dropped without a word, and paths that lead nowhere."
import numpy as np
import pytest
from conftest import REPO, draw

from sft_course.tools.intake import scan
from sft_course.tools.pixels import decode_once
from sft_course.tools.settings import SFTError

CSV = REPO.parent / "shared" / "cases" / "csv"


@pytest.fixture
def images(tmp_path):
    "Two classes of ten images in a/ and b/."
    return draw(tmp_path / "set", ("a", "b"), n=10, size=32)


def table(root, header, cell=lambda path, k: "", change=lambda lines: lines):
    "A CSV of all images; `cell(path, k)` is what stands behind path and label in row k."
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.jpg"))
    lines = [header, *(f"{p},{p[0]}{cell(p, k)}" for k, p in enumerate(paths))]
    (root / "set.csv").write_text("\n".join(change(lines)) + "\n")
    return root / "set.csv"


def parts(c):
    return tuple(len(c.rows(p)) for p in ("train", "val", "test"))


def refused(file, *words):
    with pytest.raises(SFTError) as e:
        scan(file)
    text = str(e.value)
    assert text.isprintable() and text.endswith(".") and len(text) < 1000 and "set.csv" in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("column", ["split", "part", "Set", "data set", "dataset", "Phase", "usage", "subset", "partition", "my column"])
@pytest.mark.parametrize("train, val, test", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev", "TEST")])
def test_the_column_that_names_the_split_is_taken(images, column, train, val, test):
    c = scan(table(images, f"path,label,{column}", lambda p, k: f",{(train, train, val, test, train)[k % 5]}"))
    assert parts(c) == (12, 4, 4) and not c.problems


def test_a_public_and_a_private_test_are_both_a_test(images):
    c = scan(table(images, "path,label,Usage", lambda p, k: f",{('Training', 'PublicTest', 'PrivateTest', 'Training', 'Training')[k % 5]}"))
    assert len(c.rows("test")) == 8


@pytest.mark.parametrize("yes, no", [("True", "False"), ("1", "0"), ("yes", "no")])
def test_flags_name_the_split(images, yes, no):
    c = scan(table(images, "path,label,is_valid", lambda p, k: f",{yes if k % 5 == 0 else no}"))
    assert [int(f[2:4]) % 5 for f in np.array(c.files)[c.rows("test")]] == [0] * 4
    c = scan(table(images, "path,label,is_valid,is_test", lambda p, k: f",{yes if k % 5 == 0 else no},{yes if k % 5 == 1 else no}"))
    assert parts(c) == (12, 4, 4)


def test_columns_that_disagree_are_asked_about(images):
    both = table(images, "path,label,split,is_test", lambda p, k: f",{'val' if k % 5 == 0 else 'train'},{k % 5 == 0}")
    refused(both, "line 2", "the columns split and is_test disagree")


@pytest.mark.parametrize("column, cells, words", [
    ("split", ("train", "late"), "line 3: split 'late' is unknown"), ("split", ("train", ""), "line 3: split is empty"),
    ("part", ("1", "2"), "line 2: part '1' is unknown"), ("fold", ("train", "7"), "line 3: fold '7' is unknown"),
    ("set", ("train", ""), "line 3: set is empty")])
def test_a_split_that_is_not_understood_is_asked_about(images, column, cells, words):
    refused(table(images, f"path,label,{column}", lambda p, k: f",{cells[k % 2]}"), words)


def test_other_columns_are_ignored_and_named(images):
    c = scan(table(images, "path,label,width,fold,source", lambda p, k: f",32,{k % 5},test"))
    assert [p.kind for p in c.problems] == ["ignored column"] and "width, fold, source were ignored" in c.problems[0].message
    assert scan(images / "set.csv", strict=True).files == c.files
    assert not scan(table(images, "path,label,,", lambda p, k: ",,")).problems


def test_header_names_may_have_spaces_and_capitals(images):
    assert len(scan(table(images, " Path ,  LABEL", lambda p, k: " "))) == 20


def test_a_separator_named_in_the_first_line_is_used(images):
    file = table(images, "path,label", change=lambda lines: ["sep=;", *(x.replace(",", ";") for x in lines)])
    assert len(scan(file)) == 20
    table(images, "path,label", change=lambda lines: ["sep=,", *lines, "a/00.jpg,a,b"])
    refused(file, "set.csv, line 23: has 3 cells where the first line has 2")


@pytest.mark.parametrize("header, cell, words", [
    ("path,label", lambda p, k: ",small" if k == 4 else "", "line 6: has 3 cells where the first line has 2; put a cell that holds a comma in quotes"),
    ("path,label,label", lambda p, k: f",{k}", "the column 'label' is there twice"),
    ("path,Label,LABEL", lambda p, k: f",{k}", "the column 'label' is there twice"),
    ("path,label,note,note", lambda p, k: ",1,2", "the column 'note' is there twice"),
    ("path,label", lambda p, k: "|cat", "line 2: 'a|cat' looks like several labels"),
    ("path,label", lambda p, k: ";cat" if k else "", "line 3: 'a;cat' looks like several labels"),
    ("filename,label", lambda p, k: "", "rename filename to path"),
    ("a/00.jpg,a", lambda p, k: "", "is a row, so put a line with the names of the columns above it")])
def test_a_table_that_would_be_read_wrong_is_refused(images, header, cell, words):
    refused(table(images, header, cell), words)


def test_empty_cells_at_the_end_of_a_row_do_no_harm(images):
    assert len(scan(table(images, "path,label", lambda p, k: ",,"))) == 20


@pytest.mark.parametrize("change, words", [
    (lambda p: f"/data/{p}", "/data/a/00.jpg is an absolute path and leads out of the folder of the CSV"),
    (lambda p: f"C:\\data\\{p}", "is an absolute path"),
    (lambda p: f"https://example.com/{p}", "is an address, and nothing is downloaded"),
    (lambda p: p.removesuffix(".jpg"), "a/00 is in the CSV and not on the disk, where 00.jpg lies"),
    (lambda p: p.upper().replace("A/", "a/").replace("B/", "b/"), "a/00.JPG is in the CSV and not on the disk, where 00.jpg lies"),
    (lambda p: f"{p[0]}{p[2:]}", "a00.jpg is in the CSV and not on the disk; ")])
def test_paths_that_lead_nowhere_get_the_true_reason(images, change, words):
    refused(table(images, "path,label", change=lambda lines: [lines[0], *(change(x.split(",")[0]) + "," + x[0] for x in lines[1:])]), words)


def test_absolute_paths_inside_the_folder_are_taken(images):
    c = scan(table(images, "path,label", change=lambda lines: [lines[0], *(f"{images.resolve()}/{x}" for x in lines[1:])]))
    assert c.files[0] == "a/00.jpg" and len(c) == 20


def test_files_without_extension_are_read(images, tmp_path):
    for f in images.glob("*/*.jpg"):
        f.rename(f.with_suffix(""))
    (images / "a" / "note").write_text("x")
    (images / "set.csv").write_text("path,label\n" + "".join(f"{c}/{k:02},{c}\n" for c in "ab" for k in range(10)) + "a/note,a\n")
    c = scan(images / "set.csv")
    assert len(c) == 20 and [p.kind for p in c.problems] == ["not an image"]
    assert len(decode_once(c, 32, tmp_path / "cache").pixels) == 20


def test_a_csv_inside_a_folder_is_seen(images):
    flat = images.parent / "flat"
    (flat / "images").mkdir(parents=True)
    for f in images.glob("*/*.jpg"):
        f.rename(flat / "images" / f"{f.parent.name}{f.name}")
    (flat / "set.csv").write_text("path,label\n" + "".join(f"images/{f.name},{f.name[0]}\n" for f in sorted(flat.glob("images/*"))))
    refused(flat, "if set.csv, which lies there, holds the labels, give that file")
    assert len(scan(flat / "set.csv")) == 20
    (flat / "images").rename(flat / "train")
    refused(flat, "look like splits", "set.csv")


def test_an_error_names_every_fault_of_a_missing_folder(tmp_path):
    (tmp_path / "set.csv").write_text("path,label\na/1.jpg,a\nb/2.txt,b\n")
    refused(tmp_path / "set.csv", "none of its 2 paths is an image", "a/1.jpg is in the CSV and not on the disk", "b/2.txt is not an image")


GOOD = {"plain": (18, 6, 6), "bom": (18, 6, 6), "backslash": (18, 6, 6), "crlf_trailing": (18, 6, 6), "dup_rows": (18, 6, 6), "dup_spelling": (18, 6, 6),
        "index_col": (18, 6, 6), "numeric_float": (18, 6, 6), "oldmac_cr": (18, 6, 6), "quoted_newline": (18, 6, 6), "trailing_semis": (18, 6, 6),
        "split_col": (18, 6, 6), "dataset_col": (18, 6, 6), "is_valid": (15, 3, 12), "part_training": (18, 6, 6),
        "space_header": (18, 6, 6), "upper": (18, 6, 6), "sep_line": (18, 6, 6)}
BAD = {"absolute": "is an absolute path", "absolute_win": "is an absolute path", "automl": "is a row, so put", "noheader": "is a row, so put",
       "basename": "000.jpg is in the CSV and not on the disk", "case_ext": "where 000.jpg lies", "noext": "where 000.jpg lies",
       "dotdot": "leads out of the folder", "dup_spelling2": "keep one line of the two", "duplicate_header": "the column 'label' is there twice",
       "file_name": "rename file_name to path", "filename_label": "rename filename to path", "latin1": "no CSV in UTF-8",
       "multi_pipe": "line 2: 'bird|a' looks like several labels", "multi_rows": "keep one line of the two", "multi_space": "must name the columns",
       "nan_label": "line 7: path or label is empty", "onehot": "must name the columns", "part_empty": "part is empty", "semicolon": "put commas",
       "short_rows": "line 2: part is empty", "tab": "put commas", "unquoted_comma": "line 12: has 3 cells", "url": "is an address",
       "utf16": "no CSV in UTF-8"}


@pytest.mark.parametrize("name", GOOD)
def test_small_tables_are_read(name):
    if not CSV.is_dir():
        pytest.skip("the small inputs are not here")
    c = scan(CSV / f"{name}.csv")
    assert len(c) == 30 and not c.problems and parts(c) == GOOD[name]


@pytest.mark.parametrize("name, reported", [("split_col", ("test",)), ("dataset_col", ("test",)), ("is_valid", ("True",)), ("part_training", ())])
def test_what_a_small_table_holds_out_is_never_trained_on(name, reported):
    if not CSV.is_dir():
        pytest.skip("the small inputs are not here")
    told = dict(line.split(",")[::2] for line in (CSV / f"{name}.csv").read_text().splitlines()[1:])
    c = scan(CSV / f"{name}.csv")
    held = {f for f, cell in told.items() if cell in reported}
    assert bool(held) == bool(reported) and held <= {c.files[i] for i in c.rows("test")}


@pytest.mark.parametrize("name", BAD)
def test_small_tables_are_refused_with_the_true_reason(name):
    if not CSV.is_dir():
        pytest.skip("the small inputs are not here")
    with pytest.raises(SFTError) as e:
        scan(CSV / f"{name}.csv")
    assert BAD[name] in str(e.value) and f"{name}.csv" in str(e.value)
