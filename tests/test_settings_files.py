"Settings files as they lie about: other programs' files, old nbdev files, files that may not be read, and values out of range."
import os
import warnings
import zipfile
from pathlib import Path

import pytest

from sft_course.tools.records import code_key
from sft_course.tools.settings import SFTError, load_settings, settings_file
from sft_course.tools.torch_state import pick_device

REPO = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory two folders below where a settings.ini is written."
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    return tmp_path


@pytest.mark.parametrize("text", [
    "[other]\n# as in [course]\nx = 1\n",
    "[other]\ntitle = the [course] of events\n",
    "no section at all, but [course] in the text\n",
    "[other]\n[other]\n",
    "",
])
def test_a_file_that_only_speaks_of_the_section_is_passed_by(here, text):
    (here / "settings.ini").write_text(text)
    assert settings_file() != here / "settings.ini"
    assert load_settings().backbone == "lite0"


def test_an_old_nbdev_section_does_no_harm(here):
    (here / "settings.ini").write_text("[DEFAULT]\nlib_name = mine\nseed = 5\n\n[course]\nimage_size = 64\n")
    assert settings_file() == here / "settings.ini"
    assert (load_settings().image_size, load_settings().seed) == (64, 0)


def test_a_mark_at_the_beginning_as_windows_writes_it(here):
    (here / "settings.ini").write_bytes(b"\xef\xbb\xbf[course]\r\nimage_size = 64\r\n")
    assert load_settings().image_size == 64


def test_our_file_broken_is_named_and_not_passed_by(here):
    (here / "settings.ini").write_text("[course]\nimage_size 64\n")
    with pytest.raises(SFTError, match="settings.ini: cannot be read"):
        load_settings()


def test_a_file_that_may_not_be_read_is_passed_over_with_a_sentence(here, monkeypatch):
    (here / "settings.ini").write_text("[course]\nimage_size = 64\n")
    read = Path.read_text

    def refuse(path, *a, **k):
        if path == here / "settings.ini":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *a, **k)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match=f"{here}/settings.ini: cannot be read .Permission denied., so it is passed over"):
        assert load_settings().image_size != 64


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_the_same_with_a_real_file(here):
    (here / "settings.ini").write_text("[course]\nimage_size = 64\n")
    (here / "settings.ini").chmod(0)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert load_settings().image_size != 64


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert settings_file() is None
    assert load_settings(seed=3).seed == 3
    with pytest.raises(SFTError, match="argument seed = -1"):
        load_settings(seed=-1)


@pytest.fixture
def homeless(monkeypatch):
    "No HOME, no entry in the table of users, and nothing that says where the cache is."
    pwd = pytest.importorskip("pwd")

    def nobody(uid):
        raise KeyError(uid)
    for name in ("HOME", "XDG_CACHE_HOME", "SFT_COURSE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_without_a_home_folder_one_sentence_says_what_to_set(homeless, tmp_path):
    with pytest.raises(SFTError, match="^cache: there is no home folder .*SFT_COURSE_CACHE"):
        _ = load_settings().cache_dir
    with pytest.raises(SFTError, match="^~/data: there is no home folder"):
        _ = load_settings(cache="~/data").cache_dir
    assert load_settings(cache=str(tmp_path)).cache_dir == tmp_path


def test_the_package_works_inside_a_zip_file(tmp_path):
    import subprocess
    import sys
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as z:
        for f in (REPO / "sft_course").rglob("*.py"):
            z.write(f, f.relative_to(REPO))
        z.write(REPO / "settings.ini", "sft_course/settings.ini")
    code = """
from sft_course.tools.settings import SFTError, load_settings
from sft_course.tools.records import recorded
import sft_course
assert "p.zip" in sft_course.__file__ and load_settings().backbone == "lite0"
try: recorded("x", load_settings, [])
except SFTError as e: print(e)
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path / "p.zip")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "not as a zip file" in done.stdout, done.stderr


@pytest.mark.parametrize("given, said", [
    ({"size": 0}, "argument size = 0: not allowed; use a whole number from 32 to 1024."),
    ({"size": 7}, "argument size = 7: not allowed"),
    ({"size": -64}, "argument size = -64: not allowed"),
    ({"size": 64.5}, "argument size = 64.5: not allowed"),
    ({"size": True}, "argument size = True: not allowed"),
    ({"size": [64]}, "argument size = .64.: not allowed"),
    ({"seed": -1}, "argument seed = -1: not allowed; use a whole number from 0 to 2147483647."),
    ({"seed": 2**31}, "argument seed = 2147483648: not allowed"),
    ({"seed": float("inf")}, "argument seed = inf: not allowed"),
    ({"cache_gigabytes": float("nan")}, "argument cache_gigabytes = nan: not allowed"),
    ({"sise": 64}, "argument: there is no setting 'sise'"),
])
def test_arguments_out_of_range_are_one_sentence(given, said):
    for check in (load_settings, load_settings().change):
        with pytest.raises(SFTError, match=said):
            check(**given)


def test_change_keeps_the_rest_and_where_it_came_from(here):
    (here / "settings.ini").write_text("[course]\nimage_size = 64\n")
    settings = load_settings().change(size=80, seed=None)
    assert (settings.image_size, settings.fit_image_size, settings.seed) == (64, 80, 0)
    assert settings.origin["fit_image_size"] == "argument size" and "settings.ini" in settings.origin["image_size"]


def test_devices_by_name_and_number(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(load_settings(device="cpu")) == pick_device(load_settings(device="auto")) == torch.device("cpu")
    with pytest.raises(SFTError, match="argument device = cuda:1: torch finds no CUDA GPU"):
        pick_device(load_settings(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(load_settings(device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(SFTError, match="argument device = cuda:2: torch finds 2 of them"):
        pick_device(load_settings(device="cuda:2"))
    for name in ("mps", "cuda:", "cuda:x", "gpu", "tpu"):  # mps lacks float64
        with pytest.raises(SFTError, match=f"argument device = {name}: not allowed"):
            load_settings(device=name)


def test_the_key_of_code_does_not_depend_on_fields_that_only_some_pythons_have(monkeypatch):
    "Python 3.12 gave functions `type_params`, and 3.13 no longer shows what is empty: neither may change a key."
    import ast

    from sft_course.tools.settings import load_settings as some
    parse, before = ast.parse, code_key(some, load_settings)

    def with_more(text):
        tree = parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node._fields = (*node._fields, "type_params")
                node.type_params = []
        return tree

    def with_less(text):
        tree = parse(text)
        for node in ast.walk(tree):
            for name, value in list(ast.iter_fields(node)):
                if value is None or value == []:
                    delattr(node, name)
        return tree
    for other in (with_more, with_less):
        monkeypatch.setattr(ast, "parse", other)
        assert code_key(some, load_settings) == before
    monkeypatch.setattr(ast, "parse", parse)
    assert code_key(some) != before


def test_reading_settings_says_nothing(here):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_settings()
