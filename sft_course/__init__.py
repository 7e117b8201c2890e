__version__ = "0.1.0"

_HERE = {
    "fine_tune": "recipe",
    "fine_tune_average": "tools.averages",
    "fine_tune_chats": "tools.chat_run",
    "fine_tune_task": "tools.task_run",
    "FineTuner": "tools.engine",
    "Phase": "tools.phases",
    "compare_backbones": "tools.compare",
    "tune": "tools.tuning",
    "Result": "tools.predict",
    "load_artifact": "tools.artifact",
    "open_task": "tools.task_run",
    "load_settings": "tools.settings",
}
__all__ = list(_HERE)


def __getattr__(name):
    "`from sft_course import fine_tune` works, and `import sft_course` alone does not load torch."
    from importlib import import_module
    if name not in _HERE: raise AttributeError(f"module 'sft_course' has no attribute {name!r}")
    return getattr(import_module(f"sft_course.{_HERE[name]}"), name)
