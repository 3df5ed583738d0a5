import multiprocessing
import time
from pathlib import Path

import pytest

from batchlab.lab.files import FolderInUseError, locked, read_json, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(path, "text")  # type: ignore[arg-type]
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        read_json(tmp_path / "run.json")


def hold(folder: str) -> None:
    with locked(Path(folder), "study"):
        (Path(folder) / "held").touch()
        time.sleep(60)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(str(tmp_path),))
    process.start()
    try:
        while not (tmp_path / "held").exists():
            assert process.is_alive()
            time.sleep(0.05)
        with pytest.raises(FolderInUseError, match="another process is working"), locked(tmp_path, "study"):
            pass
        process.kill()  # the system gives the lock back, whatever happens to its holder
        process.join(30)
        with locked(tmp_path, "study", patience=10):
            entered = True
    finally:
        process.kill()
    assert entered
