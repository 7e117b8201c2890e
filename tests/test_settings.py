import pytest

from sft_course.tools.datasets import open_dataset
from sft_course.tools.records import code_key
from sft_course.tools.settings import SFTError, load_settings, settings_file


@pytest.fixture
def course(tmp_path, monkeypatch):
    "A settings.ini with one line of its own, in a folder above the working directory."
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")

    def write(*lines):
        (tmp_path / "settings.ini").write_text("\n".join(["[course]", *lines]))
        return tmp_path / "settings.ini"
    return write


def test_nearest_file_upward_counts_and_the_rest_is_default(course):
    path = course("image_size = 64")
    assert settings_file() == path
    assert load_settings().image_size == 64
    assert load_settings().backbone == "lite0"


def test_environment_wins_over_file_and_argument_over_both(course, monkeypatch):
    course("image_size = 64")
    monkeypatch.setenv("SFT_COURSE_IMAGE_SIZE", "80")
    assert load_settings().image_size == 80
    assert load_settings(image_size=112).image_size == 112


def test_somebody_elses_settings_file_is_passed_by(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    monkeypatch.chdir(tmp_path)
    assert settings_file() != tmp_path / "settings.ini"
    assert load_settings().image_size > 0


@pytest.mark.parametrize("line, said", [
    ("image_size = huge", "image_size = huge: not allowed; use a whole number from 32 to 1024."),
    ("image_size = 7", "image_size = 7: not allowed; use a whole number from 32 to 1024."),
    ("profile = fast", "profile = fast: not allowed; use one of quick, full."),
    ("blooms_domain = desert", "blooms_domain = desert: not allowed; use one of garden"),
    ("image_sise = 64", "there is no setting 'image_sise'; did you mean image_size?"),
    ("no equals sign", "cannot be read"),
])
def test_a_wrong_line_is_one_sentence_that_names_file_section_key_and_value(course, line, said):
    course(line)
    with pytest.raises(SFTError) as e:
        load_settings()
    assert said in str(e.value) and "settings.ini" in str(e.value) and "\n" not in str(e.value)
    assert line == "no equals sign" or "[course]" in str(e.value)


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("SFT_COURSE_PROFILE", "fast")
    with pytest.raises(SFTError, match="environment: SFT_COURSE_PROFILE = fast"):
        load_settings()
    monkeypatch.delenv("SFT_COURSE_PROFILE")
    monkeypatch.setenv("SFT_COURSE_PROFIL", "full")
    with pytest.raises(SFTError, match="did you mean profile"):
        load_settings()


def test_a_dataset_folder_is_relative_to_the_file_that_names_it(course):
    path = course("dataset = images")
    with pytest.raises(SFTError, match=r"settings.ini: \[course\] dataset = .*images: there is no such folder"):
        open_dataset(load_settings())
    (path.parent / "images").mkdir()
    assert open_dataset(load_settings()) == path.parent / "images"


def test_the_committed_file_documents_every_setting():
    from dataclasses import fields
    from pathlib import Path

    from sft_course.tools.settings import Settings
    text = (Path(__file__).parent.parent / "settings.ini").read_text()
    lines = [line.split("=")[0].strip() for line in text.splitlines() if "=" in line and not line.startswith("#")]
    assert lines == [f.name for f in fields(Settings) if f.metadata]


def test_code_key_changes_with_code_and_not_with_comments(tmp_path):
    import importlib.util

    def load(text):
        path = tmp_path / f"m{abs(hash(text))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return code_key(module.f)
    assert load("def f():\n    return 1\n") == load('def f():\n    "Doc."\n    # why\n    return 1\n')
    assert load("def f():\n    return 1\n") != load("def f():\n    return 2\n")
