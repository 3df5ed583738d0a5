"""The command line as a person meets it: one clear line and exit code 2 for a mistake."""

from pathlib import Path

import pytest
import torch

from batchlab.cli import main

MISTAKES = [
    ([], "Expected one of"),
    (["studdy"], "studdy"),
    (["study"], "NAME"),
    (["study", "nonsense"], "there is no study 'nonsense'; there are: bn-mnist"),
    (["study", "bn-mnist", "--quik"], "--quik"),
    (["study", "bn-mnist", "--seeds", "three"], "'three' is not a whole number above 0"),
    (["study", "bn-mnist", "--seeds", "0"], "'0' is not a whole number above 0"),
    (["study", "bn-mnist", "--jobs", "-1"], "--jobs"),
    (["study", "bn-mnist", "--size", "huge"], "'huge' is none of them; allowed: full, demo, quick"),
    (["study", "bn-mnist", "--size", "None"], "'None' is none of them"),
    (["study", "bn-mnist", "--dataset", "cifar"], "'cifar'"),
    (["study", "bn-mnist", "--quick", "--size", "demo"], "--quick and --size demo"),
    (["study", "bn-mnist", "--settings", "missing.toml"], "missing.toml"),
    (["study", "bn-mnist", "--quick", "--settings", "missing.toml"], "exclude each other"),
    (["study", "bn-mnist", "--quick", "--data", "no-such-folder"], "no-such-folder"),
    (["report", "no-such-folder"], "holds no study"),
    (["report"], "no folder is given"),
    (["report", "--out", "all.html"], "no folder is given"),
    (["study", "all", "--settings", "some.toml"], "--settings is for one study"),
    (["study", "all", "--quick", "--size", "demo"], "--quick and --size demo"),
    (["study", "dropout-speed", "--quick", "--seeds", "3"], "leave out --seeds"),
    (["study", "bn-mnist", "--first-seed", "-1"], "'-1' is not a whole number, 0 or above"),
    (["study", "dropout-speed", "--quick", "--first-seed", "3"], "leave out --first-seed"),
    (["bench"], "Missing from batchlab bench: NAME"),
    (["bench", "batch-norm"], "there is no benchmark 'batch-norm'; there is: dropout"),
    (["bench", "dropout", "--widths", "wide"], "--widths"),
    (["bench", "dropout", "--widths", "1"], "--widths is 1; allowed: one or more from 2 to 16384"),
    (["bench", "dropout", "--widths"], "--widths is empty"),
    (["bench", "dropout", "--rates", "0.5", "1"], "--rates is 0.5 1.0; allowed: one or more above 0 and below 1"),
    (["bench", "dropout", "--batch", "0"], "--batch is 0"),
    (["bench", "dropout", "--threads", "-1"], "--threads is -1"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("batchlab: ")
    assert message in lines[0]
    assert not any(tmp_path.iterdir())


def test_wrong_settings_name_file_and_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('stepz = 3\nrates = [0.1, "fast"]\n')
    assert main(["study", "bn-mnist", "--settings", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mine.toml" in error
    assert "stepz" in error
    assert "settings.rates" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["steps = 0", "widths = []", "weight_std = -1.0", "rates = [0.0]", "momentum = 1.5"])
def test_settings_that_no_run_can_have_leave_no_folder(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    monkeypatch.delenv("BATCHLAB_DATA", raising=False)
    path = tmp_path / "mine.toml"
    path.write_text(line)
    assert main(["study", "bn-mnist", "--settings", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_not_touched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    monkeypatch.delenv("BATCHLAB_DATA", raising=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["study", "bn-mnist", "--quick", "--out", str(tmp_path)]) == 2
    assert "holds no study: choose a new folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_studies_are_listed_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studies"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("bn-mnist") and "?" in line for line in lines)


@pytest.mark.parametrize("words", [["--help"], ["study", "--help"], ["report", "--help"], ["bench", "--help"]])
def test_help_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert "usage: batchlab" in capsys.readouterr().out


def test_bench_prints_the_table_and_its_reading(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = ["bench", "dropout", "--widths", "24", "16", "--rates", "0.5", "0.25", "--batch", "8", "--threads", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for need in (
        "nn.Dropout",
        "submatrices",
        "masks",
        "auto",
        "1 thread.",
        "batch 8",
        "width    16: ",
        "width    24: ",
    ):
        assert need in out
    assert out.strip().splitlines()[-1].startswith("On this machine submatrices are ")
    assert torch.get_num_threads() == threads


def test_an_interrupted_bench_promises_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchlab.cli.bench.measure", interrupt)
    assert main(["bench", "dropout"]) == 130
    assert capsys.readouterr().err.strip().endswith("Stopped.")
