import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.lab.settings import (
    SCHEDULES,
    DataSettings,
    NetworkSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
    from_dict,
    read_settings,
    to_dict,
    write_settings,
)
from batchlab.lab.studies import STUDIES

RUNS = st.builds(
    RunSettings,
    data=st.builds(DataSettings, st.sampled_from(["mnist", "fashion"]), st.booleans(), st.integers(0, 10**6)),
    network=st.builds(
        NetworkSettings,
        st.lists(st.integers(10, 10**4), min_size=1, max_size=4).map(tuple),
        st.just("relu"),
        st.just("none"),
        st.floats(1e-9, 1e9),
    ),
    optimizer=st.builds(
        OptimizerSettings, st.floats(1e-9, 1e9), st.floats(0, 0.999), schedule=st.sampled_from(SCHEDULES)
    ),
    seed=st.integers(0, 2**31 - 1),
)


@settings(deadline=None, max_examples=50)
@given(run=RUNS, suffix=st.sampled_from(["toml", "json"]))
def test_files_give_back_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, run: RunSettings, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("settings") / f"run.{suffix}"
    write_settings(run, path)
    assert read_settings(path, RunSettings) == run


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_every_size_of_every_study_can_be_written_down(study: Any, tmp_path: Path) -> None:
    for name, size in study.sizes.items():
        for suffix in ("toml", "json"):
            path = tmp_path / f"{name}.{suffix}"
            write_settings(size, path)
            assert read_settings(path, study.settings) == size


WRONG = [
    ({"stepz": 3}, "stepz"),
    ({"network": {"width": [3]}}, r"width.*settings\.network"),
    ({"network": {"widths": [10, "a"]}}, r"'a' is not of type int.*settings\.network\.widths"),
    ({"optimizer": {"learning_rate": "fast"}}, r"'fast' is not of type float.*learning_rate"),
    ({"steps": 3.5}, r"3\.5 is not of type int.*steps"),
    ({"steps": True}, "True is not of type int"),
    ({"steps": "3"}, "'3' is not of type int"),
    ({"data": {"binarize": 1}}, "1 is not of type bool"),
    ({"steps": 0}, "steps is 0; allowed"),
    ({"optimizer": {"momentum": 1.0}}, r"momentum is 1\.0.*settings\.optimizer"),
    ({"optimizer": {"schedule": "steps"}}, "constant, linear"),
    ({"optimizer": {"learning_rate": math.inf}}, "learning_rate is inf"),
    ({"data": {"dataset": "cifar"}}, "'mnist', 'fashion'"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(v) for v, _ in WRONG])
def test_errors_name_the_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_dict(values, RunSettings)


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "steps = "), ("a.json", "[1]"), ("a.json", "{"), ("missing.toml", None)]
)
def test_unreadable_files_are_named(name: str, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=name.replace(".", r"\.")):
        read_settings(path, RunSettings)


def test_to_dict_is_plain() -> None:
    assert to_dict(NetworkSettings(widths=(3, 4)))["widths"] == [3, 4]
