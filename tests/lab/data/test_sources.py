"""Where data comes from: the order of the search, what is refused, and downloads without a network."""

import dataclasses
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest
import requests
import torch

from batchlab.lab.data import catalog, download, load_dataset, locate_dataset
from batchlab.lab.data.catalog import FASHION, FILE_NAMES, MNIST, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS

DATA = os.environ.get("BATCHLAB_DATA", "")
Contents = dict[str, bytes]


def encode_idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_contents(seed: int, train: int = 20, test: int = 10) -> Contents:
    random = np.random.default_rng(seed)
    arrays = [
        random.integers(0, 256, (train, 28, 28)),
        np.arange(train) % 10,
        random.integers(0, 256, (test, 28, 28)),
        (np.arange(test) + seed) % 10,
    ]
    return {name: encode_idx(array) for name, array in zip(FILE_NAMES, arrays, strict=True)}


def write_files(folder: Path, contents: Contents, suffix: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content, mtime=0) if suffix == ".gz" else content)
    return folder


def hash_all(contents: Contents) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


class Places:
    """Two small data sets that the catalog believes in, and empty places to put them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mnist = make_contents(seed=1)
        self.fashion = make_contents(seed=2)
        self.data = root / "data"
        self.cache = root / "cache" / "mnist"
        self.system = root / "system-mnist"
        self.fashion_system = root / "system-fashion"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    made = Places(tmp_path)
    entries = {
        "mnist": dataclasses.replace(MNIST, checksums=hash_all(made.mnist), system_folder=str(made.system)),
        "fashion": dataclasses.replace(
            FASHION, checksums=hash_all(made.fashion), system_folder=str(made.fashion_system)
        ),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(catalog.CATALOG, name, entry)
    monkeypatch.setattr(download, "locate_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("BATCHLAB_DATA", raising=False)
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    return made


# The order of the search


def test_each_place_comes_before_the_next(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_dataset("mnist").source == locate_dataset("mnist")[0] == "embedded"
    write_files(places.system, places.mnist)
    assert load_dataset("mnist").source == "system"
    assert locate_dataset("mnist") == ("system", places.system)
    write_files(places.cache, places.mnist)
    assert load_dataset("mnist").source == "cache"
    assert locate_dataset("mnist") == ("cache", places.cache)
    monkeypatch.setenv("BATCHLAB_DATA", str(write_files(places.data / "mnist", places.mnist).parent))
    assert load_dataset("mnist").source == "folder"
    assert locate_dataset("mnist") == ("folder", places.data / "mnist")
    # The argument is the only place looked in: an empty folder is an error although the variable has the files.
    (places.root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load_dataset("mnist", places.root / "empty")
    assert load_dataset("mnist", places.data).source == "folder"


def test_to_locate_finds_the_same_faults_and_downloads_nothing(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="BATCHLAB_OFFLINE"):
        locate_dataset("fashion")
    monkeypatch.setenv("BATCHLAB_OFFLINE", "0")
    monkeypatch.setattr(download, "download_files", pytest.fail)
    assert locate_dataset("mnist") == ("download", places.cache)
    write_files(places.cache, places.mnist)
    (places.cache / f"{TEST_LABELS}.gz").unlink()  # an interrupted download goes on
    assert locate_dataset("mnist") == ("download", places.cache)
    monkeypatch.setenv("BATCHLAB_DATA", str(places.cache))
    for act in (locate_dataset, load_dataset):
        with pytest.raises(FileNotFoundError, match=f"missing: {TEST_LABELS}"):
            act("mnist")
    monkeypatch.setenv("BATCHLAB_DATA", str(places.root / "nowhere"))
    for act in (locate_dataset, load_dataset):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            act("mnist")


def test_what_is_loaded_is_what_the_files_say(places: Places) -> None:
    said: list[str] = []
    dataset = load_dataset("mnist", write_files(places.data, places.mnist), announce=said.append)
    for images, labels, count, kind in (
        (dataset.train_images, dataset.train_labels, 20, "train"),
        (dataset.test_images, dataset.test_labels, 10, "t10k"),
    ):
        assert images.shape == (count, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.numpy().tobytes() == places.mnist[f"{kind}-images-idx3-ubyte"][16:]
        assert bytes(labels.tolist()) == places.mnist[f"{kind}-labels-idx1-ubyte"][8:]
    assert dataset.checksums == hash_all(places.mnist)
    assert dataset.description == "full MNIST, 20 training and 10 test images (from the data folder)"
    assert str(places.root) not in repr(dataset)
    assert said == []


@pytest.mark.parametrize("below", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_found_below_a_data_folder(places: Places, below: str, suffix: str) -> None:
    write_files(places.data / below, places.mnist, suffix)
    assert load_dataset("mnist", str(places.data)).checksums == hash_all(places.mnist)


@pytest.mark.parametrize("below", ["", "fashion", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_is_found_below_a_data_folder(places: Places, below: str) -> None:
    write_files(places.data / below, places.fashion)
    dataset = load_dataset("fashion", places.data)
    assert (dataset.title, dataset.class_names[9]) == ("Fashion-MNIST", "Ankle boot")


def test_the_spelling_with_a_dot_is_known(places: Places) -> None:
    dotted = {name.replace("-idx", ".idx"): content for name, content in places.mnist.items()}
    dataset = load_dataset("mnist", write_files(places.data, dotted, suffix=""))
    assert set(dataset.checksums) == set(FILE_NAMES)


def test_a_complete_folder_is_preferred_to_a_part_of_one(places: Places) -> None:
    write_files(places.data / "mnist", {TEST_LABELS: places.mnist[TEST_LABELS]})
    write_files(places.data, places.mnist)
    assert load_dataset("mnist", places.data).source == "folder"


def test_the_checksum_tells_data_sets_apart_and_not_places(places: Places) -> None:
    plain = load_dataset("mnist", write_files(places.data, places.mnist, suffix=""))
    write_files(places.cache, places.mnist)
    cached = load_dataset("mnist")
    other = load_dataset("fashion", write_files(places.root / "other", places.fashion))
    shutil.rmtree(places.cache)
    embedded = load_dataset("mnist")
    assert plain.checksum == cached.checksum
    assert len({plain.checksum, other.checksum, embedded.checksum}) == 3
    assert all(len(dataset.checksum) == 64 for dataset in (plain, other, embedded))


def test_a_variable_that_lacks_this_data_set_is_announced_once(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(places.data / "mnist", places.mnist)
    write_files(places.fashion_system, places.fashion)
    monkeypatch.setenv("BATCHLAB_DATA", str(places.data))
    said: list[str] = []
    assert load_dataset("fashion", announce=said.append).source == "system"
    assert len(said) == 1
    assert "BATCHLAB_DATA" in said[0]
    assert "Fashion-MNIST" in said[0]


def test_an_empty_variable_is_no_variable(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_DATA", "")
    assert load_dataset("mnist").source == "embedded"


def test_the_digits_in_the_package_are_announced(places: Places) -> None:
    said: list[str] = []
    load_dataset("mnist", announce=said.append)
    assert said == [
        "the full MNIST was not found; using 5,000 MNIST digits that come with batchlab, "
        "4,000 for training and 1,000 for testing"
    ]


# What is refused


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'MNIST'; choose one of 'mnist', 'fashion'"):
        load_dataset("MNIST")


def test_a_folder_that_does_not_exist_is_named(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a folder.*t10k-labels"):
        load_dataset("mnist", places.root / "nowhere")
    (places.root / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is a file, not a folder"):
        load_dataset("mnist", places.root / "file")
    monkeypatch.setenv("BATCHLAB_DATA", str(places.root / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"BATCHLAB_DATA .*nowhere does not exist"):
        load_dataset("mnist")


@pytest.mark.parametrize("way", ["argument", "variable", "system"])
def test_missing_files_are_named(places: Places, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    folder = places.system if way == "system" else places.data
    below = "" if way == "system" else "mnist"
    write_files(folder / below, {name: places.mnist[name] for name in (TRAIN_IMAGES, TRAIN_LABELS)})
    if way == "variable":
        monkeypatch.setenv("BATCHLAB_DATA", str(folder))
    with pytest.raises(FileNotFoundError, match=r"found 2; missing: t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"):
        load_dataset("mnist", folder if way == "argument" else None)


def damage(content: bytes, how: str) -> bytes:
    packed = gzip.compress(content, mtime=0)
    return {
        "truncated": packed[:-20],
        "corrupt": packed[:30] + bytes([packed[30] ^ 255]) + packed[31:],
        "short": gzip.compress(content[:-1], mtime=0),
        "long": gzip.compress(content + b"\0", mtime=0),
        "changed": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
        "page": b"<html>sign in to this network</html>",
        "empty": b"",
    }[how]


@pytest.mark.parametrize("how", ["truncated", "corrupt", "short", "long", "changed", "page", "empty"])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_damaged_file_is_named_with_expected_and_found(places: Places, how: str, name: str) -> None:
    write_files(places.data, places.mnist)
    path = places.data / f"{name}.gz"
    path.write_bytes(damage(places.mnist[name], how))
    with pytest.raises(ValueError, match="replace it with the original file") as caught:
        load_dataset("mnist", places.data)
    message = str(caught.value)
    assert str(path) in message
    assert hash_all(places.mnist)[name] in message
    assert "found" in message
    if how in ("short", "long", "changed"):
        assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() in message


def test_another_data_set_is_recognized(places: Places) -> None:
    write_files(places.data, places.fashion)
    with pytest.raises(ValueError, match=r"this is Fashion-MNIST's train-images-idx3-ubyte: pass --dataset fashion"):
        load_dataset("mnist", places.data)
    write_files(places.data, places.mnist)
    with pytest.raises(ValueError, match=r"this is MNIST's train-images-idx3-ubyte: pass --dataset mnist"):
        load_dataset("fashion", places.data)


def test_another_files_name_is_recognized(places: Places) -> None:
    mixed = places.mnist | {TRAIN_LABELS: places.mnist[TEST_LABELS]}
    with pytest.raises(ValueError, match=r"this is MNIST's t10k-labels-idx1-ubyte under another name"):
        load_dataset("mnist", write_files(places.data, mixed))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (TRAIN_LABELS, np.zeros(19), r"expected 20 labels.*found shape \(19,\)"),
        (TRAIN_IMAGES, np.zeros((20, 28, 27)), r"shape \(count, 28, 28\), found \(20, 28, 27\)"),
        (TRAIN_LABELS, np.full(20, 10), "labels from 0 to 9, found a label 10"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    array: np.ndarray,
    message: str,
) -> None:
    contents = places.mnist | {name: encode_idx(array)}
    entry = dataclasses.replace(catalog.CATALOG["mnist"], checksums=hash_all(contents))
    monkeypatch.setitem(catalog.CATALOG, "mnist", entry)
    with pytest.raises(ValueError, match=message):
        load_dataset("mnist", write_files(places.data, contents))


def test_a_wrong_file_in_the_cache_is_reported_and_kept(places: Places) -> None:
    write_files(places.cache, places.mnist)
    wrong = places.cache / f"{TEST_LABELS}.gz"
    wrong.write_bytes(damage(places.mnist[TEST_LABELS], "changed"))
    with pytest.raises(ValueError, match="delete it, and it will be downloaded again") as caught:
        load_dataset("mnist")
    assert str(wrong) in str(caught.value)
    assert wrong.exists()


def test_fashion_found_nowhere_says_where_and_what_to_do(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.data.mkdir()
    monkeypatch.setenv("BATCHLAB_DATA", str(places.data))
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("fashion")
    message = str(caught.value)
    for part in (
        str(places.data),
        str(places.root / "cache" / "fashion"),
        str(places.fashion_system),
        "BATCHLAB_OFFLINE is set",
        "--data DIR",
        "dataset-fashion-mnist",
    ):
        assert part in message


# Downloads


class Internet:
    """Stands in for the network: what each mirror has, and what was asked of it."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.unreachable: set[str] = set()
        self.failing: set[str] = set()
        self.wrong: set[str] = set()
        self.asked: list[str] = []

    def select_reachable(self, mirrors: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(mirror for mirror in mirrors if mirror not in self.unreachable)

    def fetch(self, url: str, path: Path) -> None:
        self.asked.append(url)
        mirror, name = url.rsplit("/", 1)
        content = self.contents[name.removesuffix(".gz")]
        if f"{mirror}/" in self.failing:
            path.write_bytes(b"half of it")
            raise requests.ConnectionError("the line was cut")
        path.write_bytes(damage(content, "changed") if f"{mirror}/" in self.wrong else gzip.compress(content, mtime=0))


@pytest.fixture
def internet(places: Places, monkeypatch: pytest.MonkeyPatch) -> Internet:
    made = Internet(places.mnist)
    monkeypatch.setenv("BATCHLAB_OFFLINE", "0")
    monkeypatch.setattr(download, "fetch", made.fetch)
    monkeypatch.setattr(download, "select_reachable", made.select_reachable)
    return made


def list_all(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_a_download_fills_the_cache(places: Places, internet: Internet) -> None:
    said: list[str] = []
    dataset = load_dataset("mnist", announce=said.append)
    assert dataset.source == "download"
    assert dataset.checksums == hash_all(places.mnist)
    assert list_all(places.cache) == {f"{name}.gz" for name in FILE_NAMES}
    assert internet.asked == [f"{MNIST.mirrors[0]}{name}.gz" for name in FILE_NAMES]
    assert len(said) == 4
    assert load_dataset("mnist").source == "cache"
    assert len(internet.asked) == 4


@pytest.mark.parametrize("trouble", ["unreachable", "failing", "wrong"])
def test_the_second_mirror_steps_in(places: Places, internet: Internet, trouble: str) -> None:
    getattr(internet, trouble).add(MNIST.mirrors[0])
    assert load_dataset("mnist").checksums == hash_all(places.mnist)
    assert sum(url.startswith(MNIST.mirrors[1]) for url in internet.asked) == 4


def test_a_wrong_download_raises_and_leaves_no_file(places: Places, internet: Internet) -> None:
    internet.wrong.update(MNIST.mirrors)
    with pytest.raises(ValueError, match=r"download from .* is not the right file") as caught:
        load_dataset("mnist")
    assert hash_all(places.mnist)[TRAIN_IMAGES] in str(caught.value)
    assert list_all(places.cache) == set()


def test_a_wrong_mirror_is_reported_although_the_other_is_silent(places: Places, internet: Internet) -> None:
    internet.wrong.add(MNIST.mirrors[0])
    internet.failing.add(MNIST.mirrors[1])
    with pytest.raises(ValueError, match=r"ossci-datasets.*is not the right file"):
        load_dataset("mnist")
    assert list_all(places.cache) == set()


@pytest.mark.parametrize("trouble", ["unreachable", "failing"])
def test_without_a_mirror_the_search_goes_on_after_one_file(places: Places, internet: Internet, trouble: str) -> None:
    getattr(internet, trouble).update(MNIST.mirrors)
    said: list[str] = []
    assert load_dataset("mnist", announce=said.append).source == "embedded"
    assert internet.asked == ([] if trouble == "unreachable" else [f"{m}{TRAIN_IMAGES}.gz" for m in MNIST.mirrors])
    assert list_all(places.cache) == set()
    assert any("MNIST" in line and ("no mirror" in line or "cannot be downloaded" in line) for line in said)


def test_an_interrupted_download_is_completed(places: Places, internet: Internet) -> None:
    write_files(places.cache, {TRAIN_IMAGES: places.mnist[TRAIN_IMAGES]})
    assert load_dataset("mnist").source == "download"
    assert internet.asked == [f"{MNIST.mirrors[0]}{name}.gz" for name in FILE_NAMES[1:]]


def test_a_part_in_the_cache_is_no_error_offline(places: Places) -> None:
    write_files(places.cache, {TRAIN_IMAGES: places.mnist[TRAIN_IMAGES]})
    assert load_dataset("mnist").source == "embedded"


def test_downloading_can_be_forbidden(places: Places, internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_dataset("mnist", download=False).source == "embedded"
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    assert load_dataset("mnist").source == "embedded"
    assert internet.asked == []


def test_a_cache_that_cannot_be_written_is_no_error(places: Places, internet: Internet) -> None:
    places.cache.parent.write_text("a file where the cache should be")
    said: list[str] = []
    assert load_dataset("mnist", announce=said.append).source == "embedded"
    assert any("cannot be written" in line for line in said)


def test_mirrors_that_do_not_answer_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_prober(**settings: object) -> Callable[..., bool]:
        assert settings["timeout"] == download.TIMEOUT_SECONDS

        def probe(url: str, *_: object, check_only: bool) -> bool:
            assert check_only
            if "down" in url:
                raise requests.ConnectTimeout("no answer")
            return "gone" not in url

        return probe

    monkeypatch.setattr(pooch, "HTTPDownloader", make_prober)
    assert download.select_reachable(("http://down/", "http://b/", "http://gone/", "http://a/")) == (
        "http://b/",
        "http://a/",
    )


def test_a_mirror_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def probe(url: str, *_: object, check_only: bool) -> bool:
        return check_only and ("hangs" not in url or never.wait())

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **settings: probe)
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 1.0)
    assert download.select_reachable(("http://hangs/", "http://answers/")) == ("http://answers/",)
    never.set()


def test_looking_at_the_package_imports_no_downloader() -> None:
    code = "import sys, batchlab.lab.data; print([name for name in ('pooch', 'requests') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The real files, where there are any


def test_the_full_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    try:
        dataset = load_dataset("mnist", DATA or "BATCHLAB_DATA-is-not-set")
    except FileNotFoundError as error:
        pytest.skip(f"the full MNIST is not at hand: {error}")
    assert dataset.checksums == MNIST.checksums
    assert dataset.train_labels.bincount()[[0, 1, 9]].tolist() == [5923, 6742, 5949]
    assert dataset.description == "full MNIST, 60,000 training and 10,000 test images (from the data folder)"


@pytest.mark.skipif(not Path(FASHION.system_folder).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_fashion_mnist_of_debian() -> None:
    dataset = load_dataset("fashion", FASHION.system_folder)
    assert dataset.checksums == FASHION.checksums
    assert dataset.train_labels.bincount().tolist() == [6000] * 10
    assert dataset.test_labels.bincount().tolist() == [1000] * 10
    with pytest.raises(ValueError, match="this is Fashion-MNIST's train-images-idx3-ubyte: pass --dataset fashion"):
        load_dataset("mnist", FASHION.system_folder)
