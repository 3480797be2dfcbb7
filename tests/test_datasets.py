"""Labelled images in every layout, made of real files; what is wrong with them, and what the messages say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import SYNSETS, damaged, digit_folders, medmnist_file

from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import prepare
from quartermap_deploy.errors import InputError, UnknownNameError
from quartermap_deploy.evaluation.batches import Batch, batches, prepare_all
from quartermap_deploy.evaluation.datasets import Dataset
from quartermap_deploy.evaluation.formats import open_dataset

DIGITS = load_card("vmamba_digits").preprocessing


def names(dataset: Dataset) -> list[str]:
    return [dataset.item_name(index) for index in range(len(dataset))]


# The digits -----------------------------------------------------------------------------------------------------


def test_the_digits_have_two_parts_and_the_held_out_one_is_the_default() -> None:
    held_out = open_dataset(None, "digits")
    assert len(held_out) == 450 and held_out.classes == tuple("0123456789")
    np.testing.assert_array_equal(held_out.labels, load_digits().held_out.labels)
    np.testing.assert_array_equal(held_out.image(7), load_digits().held_out.images[7])  # type: ignore[arg-type]
    training = open_dataset(None, "digits", split="training")
    assert len(training) == 1347 and training.fingerprint != held_out.fingerprint
    with pytest.raises(UnknownNameError, match="Did you mean held_out"):
        open_dataset(None, "digits", split="heldout")
    with pytest.raises(InputError, match="leave the path out"):
        open_dataset(Path("somewhere"), "digits")


def test_an_unknown_format_names_the_right_ones() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean imagefolder"):
        open_dataset(Path(), "imagefolders")
    with pytest.raises(InputError, match="needs a path"):
        open_dataset(None, "medmnist")


# Folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "JPEG", "bmp"])
def test_class_folders_named_by_synset(tmp_path: Path, suffix: str) -> None:
    # Written in another order than that of the names, by which the classes are numbered.
    digit_folders(tmp_path / "val", dict(reversed(list(enumerate(SYNSETS)))), suffix=suffix)
    assert open_dataset(tmp_path, "imagefolder").warnings == ()
    (tmp_path / "val" / SYNSETS[0] / "notes.txt").write_text("no image")
    (tmp_path / "val" / "__MACOSX" / SYNSETS[0]).mkdir(parents=True)
    (tmp_path / "val" / "__MACOSX" / SYNSETS[0] / "0_0.png").write_text("no image")
    (tmp_path / "val" / SYNSETS[0] / ".hidden.png").write_text("no image")
    (tmp_path / "val" / ".cache").mkdir()
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == SYNSETS and found.closed
    assert found.labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    assert names(found)[:2] == [f"{SYNSETS[0]}/0_0.{suffix}", f"{SYNSETS[0]}/0_1.{suffix}"]
    # The part itself is a data set too, and the same one.
    assert open_dataset(tmp_path / "val", "imagefolder").fingerprint == found.fingerprint
    if suffix != "JPEG":
        digits = load_digits().held_out
        first = digits.images[np.flatnonzero(digits.labels == 3)[0]]
        np.testing.assert_array_equal(prepare([found.image(6)], DIGITS), prepare([first], DIGITS))


def test_parts_of_a_folder(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        digit_folders(tmp_path / part, SYNSETS, per_class=len(part))
    assert len(open_dataset(tmp_path, "imagefolder")) == 100  # validation
    assert len(open_dataset(tmp_path, "imagefolder", split="test")) == 40
    with pytest.raises(InputError, match="no part 'val'; it has test, train, validation"):
        open_dataset(tmp_path, "imagefolder", split="val")


def test_a_part_to_train_on_is_not_taken_unasked(tmp_path: Path) -> None:
    digit_folders(tmp_path / "train", SYNSETS)
    with pytest.raises(InputError, match="a part to train on and no other"):
        open_dataset(tmp_path, "imagefolder")
    assert len(open_dataset(tmp_path, "imagefolder", split="train")) == 20


def test_folders_named_by_index_mean_that_logit(tmp_path: Path) -> None:
    digit_folders(tmp_path, {0: "00", 2: "2", 9: "10"})
    found = open_dataset(tmp_path, "imagefolder")
    assert found.labels.tolist() == [0, 0, 2, 2, 10, 10] and not found.closed
    # Sorted as numbers, although "10" comes before "2" as a word; a model may have more classes, but not fewer.
    found.check_classes(11)
    found.check_classes(1000)
    with pytest.raises(InputError, match="images of class 10, but the model has classes 0 to 9"):
        found.check_classes(10)
    (tmp_path / "002").mkdir()
    with pytest.raises(InputError, match="two folders for one index"):
        open_dataset(tmp_path, "imagefolder")


def test_folders_of_any_name_and_folders_in_them(tmp_path: Path) -> None:
    digit_folders(tmp_path, {0: "zero", 1: "one"})
    digit_folders(tmp_path / "two", {2: "images"})
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == ("one", "two", "zero")
    assert names(found)[1:4] == ["one/1_1.png", "two/images/2_0.png", "two/images/2_1.png"]
    with pytest.raises(InputError, match="has 3 classes, but the model has 10; found one, two, zero; take"):
        found.check_classes(10)
    guess = (
        f"the classes of {tmp_path} are numbered by name: one = 0, two = 1, zero = 2; put a classes.txt beside them if "
        "the model counts otherwise"
    )
    assert found.warnings == (guess,) and found.notes == ()
    assert found.subset([0]).guess == guess
    (tmp_path / "classes.txt").write_text("one\ntwo\nzero\n")
    assert open_dataset(tmp_path, "imagefolder").warnings == ()


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_folders_called_as_the_models_classes_are_those(tmp_path: Path) -> None:
    digit_folders(tmp_path, {8: "Eight", 5: "five", 0: "zero"})
    data = open_dataset(tmp_path, "imagefolder")
    # By their names alone, eight would be the first class.
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.guess is not None
    found = data.for_model(10, WORDS)
    assert found.classes == WORDS and found.labels.tolist() == [8, 8, 5, 5, 0, 0]
    assert found.warnings == () and found.fingerprint != data.fingerprint
    assert [found.item_name(index) for index in range(6)] == [data.item_name(index) for index in range(6)]
    # Without names it stays a guess, which does not fit.
    with pytest.raises(InputError, match="has 3 classes, but the model has 10"):
        data.for_model(10)
    assert data.for_model(3).guess == data.guess and data.for_model(3, ("a", "b", "c")).guess == data.guess


def test_names_are_the_same_in_other_case_and_with_underscores(tmp_path: Path) -> None:
    digit_folders(tmp_path, {1: "Great_White shark", 2: "tench"})
    found = open_dataset(tmp_path, "imagefolder").for_model(2, ("tench", "great white shark"))
    assert found.labels.tolist() == [1, 1, 0, 0]


def test_only_some_names_of_the_models_classes_are_refused(tmp_path: Path) -> None:
    digit_folders(tmp_path, {1: "one", 2: "twoo"})
    with pytest.raises(
        InputError, match=r"names of the model's classes, but 'twoo' is none of them.*--labels"
    ):
        open_dataset(tmp_path, "imagefolder").for_model(10, WORDS)


def test_a_list_beside_the_images_says_more_than_names(tmp_path: Path) -> None:
    digit_folders(tmp_path, {1: "one", 0: "zero"})
    (tmp_path / "classes.txt").write_text("one\nzero\n")
    found = open_dataset(tmp_path, "imagefolder").for_model(2, ("zero", "one"))
    assert found.classes == ("one", "zero") and found.labels.tolist() == [0, 0, 1, 1]


def test_classes_known_by_their_index_get_the_models_names(tmp_path: Path) -> None:
    digit_folders(tmp_path, {3: "3", 5: "5"})
    data = open_dataset(tmp_path, "imagefolder")
    found = data.for_model(10, WORDS)
    assert found.classes == WORDS[:6] and found.labels.tolist() == [3, 3, 5, 5]
    assert found.fingerprint == data.fingerprint and data.for_model(10).classes == data.classes
    with pytest.raises(InputError, match="images of class 5, but the model has classes 0 to 4"):
        data.for_model(5, WORDS[:5])
    digits = open_dataset(None, "digits")
    assert digits.for_model(10, tuple("0123456789")).classes == digits.classes


@pytest.mark.parametrize("beside", [".", "val"])
def test_a_list_of_classes_tells_the_logit_of_some_of_them(tmp_path: Path, beside: str) -> None:
    digit_folders(tmp_path / "val", {3: "three", 1: "one"})
    (tmp_path / beside / "classes.txt").write_text("zero\none\ntwo\nthree\n\n")
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == ("zero", "one", "two", "three") and found.labels.tolist() == [1, 1, 3, 3]
    (tmp_path / beside / "classes.txt").write_text("zero\none\ntwo\n")
    with pytest.raises(InputError, match=r"classes\.txt does not list the class 'three'"):
        open_dataset(tmp_path, "imagefolder")
    (tmp_path / beside / "classes.txt").write_text("one\none\n")
    with pytest.raises(InputError, match="names a class twice"):
        open_dataset(tmp_path, "imagefolder")


def test_the_list_of_synsets_that_comes_with_imagenet(tmp_path: Path) -> None:
    digit_folders(tmp_path / "val", {5: SYNSETS[5]})
    lines = [f"{synset} digit {index}, numeral\n" for index, synset in enumerate(SYNSETS)]
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(lines))
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == SYNSETS and found.labels.tolist() == [5, 5]


def test_a_flat_folder_with_synsets_in_the_names(tmp_path: Path) -> None:
    for index, synset in enumerate(SYNSETS[:3]):
        digit_folders(tmp_path, {index: "val"}, per_class=1)
        (tmp_path / "val" / f"{index}_0.png").rename(
            tmp_path / "val" / f"ILSVRC2012_val_0000000{9 - index}_{synset}.png"
        )
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == SYNSETS[:3] and found.labels.tolist() == [0, 1, 2]
    (tmp_path / "val" / "ILSVRC2012_val_00000001.png").touch()
    with pytest.raises(InputError, match=r"class of .*00000001\.png is not known"):
        open_dataset(tmp_path, "imagefolder")


def test_a_flat_folder_with_a_file_of_labels(tmp_path: Path) -> None:
    digit_folders(tmp_path, {4: "val"})
    labels = tmp_path / "val" / "labels.csv"
    labels.write_text(
        f"ImageId,PredictionString\n4_0,{SYNSETS[1]} 1 2 3 4 {SYNSETS[1]} 5 6 7 8\n4_1.png,{SYNSETS[0]}\n"
    )
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == SYNSETS[:2] and names(found) == ["4_1.png", "4_0.png"]
    labels.write_text(f"4_0.png,{SYNSETS[0]}\n")
    with pytest.raises(InputError, match=r"says nothing about 4_1\.png"):
        open_dataset(tmp_path, "imagefolder")
    labels.write_text("4_0.png\n")
    with pytest.raises(InputError, match=r"has the line '4_0\.png'; expected \"file,class\"$"):
        open_dataset(tmp_path, "imagefolder")
    labels.write_text("4_0.png;a\n4_1.png;b\n")
    with pytest.raises(InputError, match=r"with a comma between them and no ';'$"):
        open_dataset(tmp_path, "imagefolder")


def test_a_file_of_labels_may_come_from_a_spreadsheet(tmp_path: Path) -> None:
    """Which writes a mark of the encoding before the first letter."""
    digit_folders(tmp_path, {4: "val"})
    (tmp_path / "val" / "labels.csv").write_text("4_0.png,1\n4_1.png,0\n", encoding="utf-8-sig")
    assert open_dataset(tmp_path, "imagefolder").labels.tolist() == [0, 1]
    (tmp_path / "classes.txt").write_text("1\n0\n", encoding="utf-8-sig")
    assert open_dataset(tmp_path, "imagefolder").labels.tolist() == [0, 1]
    assert names(open_dataset(tmp_path, "imagefolder")) == ["4_0.png", "4_1.png"]


def test_files_that_are_listed_and_not_there_are_named(tmp_path: Path) -> None:
    digit_folders(tmp_path, {4: "val"})
    labels = tmp_path / "val" / "labels.csv"
    labels.write_text(f"file,class\n4_0.png,{SYNSETS[0]}\n4_1.png,{SYNSETS[2]}\ngone.png,{SYNSETS[1]}\n")
    found = open_dataset(tmp_path, "imagefolder")
    assert found.notes == (f"{labels} names 1 file that is not there: gone.png",)
    # The class of what is not there has its logit nevertheless.
    assert found.classes == SYNSETS[:3] and found.labels.tolist() == [0, 2]
    labels.write_text(labels.read_text() + "".join(f"{number}.png,{SYNSETS[0]}\n" for number in range(4)))
    (note,) = open_dataset(tmp_path, "imagefolder").notes
    assert note.endswith("names 5 files that are not there: gone.png, 0.png, 1.png and 2 more")


def test_one_class_that_is_no_number_among_numbers_is_named(tmp_path: Path) -> None:
    digit_folders(tmp_path / "folders", {0: "0", 1: "1", 2: "two"})
    digit_folders(tmp_path / "flat", {4: "val"}, per_class=3)
    (tmp_path / "flat" / "val" / "labels.csv").write_text("4_0.png,0\n4_1.png,1\n4_2.png,two\n")
    for name in ("folders", "flat"):
        with pytest.raises(
            InputError, match=r"are named by numbers, but for two; name all of them by the index"
        ):
            open_dataset(tmp_path / name, "imagefolder")
    # Names that are mostly words may have a number among them.
    digit_folders(tmp_path / "words", {0: "cat", 1: "dog", 2: "2"})
    assert open_dataset(tmp_path / "words", "imagefolder").classes == ("2", "cat", "dog")


@pytest.mark.parametrize("format", ["imagefolder", "images"])
def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path, format: str) -> None:
    digit_folders(tmp_path, {0: "0", 1: "1"})
    for number in range(4):
        (tmp_path / "1" / f"{number}.gif").touch()
    (tmp_path / "README").touch()
    notes = open_dataset(tmp_path, format).notes
    assert len(notes) == 1 and "each is not read, as images end in .bmp" in notes[0]
    # A file beside class folders is none of the images, whatever it is.
    named, count = (
        ("1/0.gif, 1/1.gif, 1/2.gif and 1 more", 4)
        if format == "imagefolder"
        else ("README, 1/0.gif, 1/1.gif and 2 more", 5)
    )
    assert f"left out of {tmp_path}: {named}; {count} in all" in notes[0]
    if format == "imagefolder":
        (tmp_path / "loose.png").touch()
        assert (
            "loose.png; 1 in all, each lies beside the class folders"
            in open_dataset(tmp_path, format).notes[0]
        )


def test_a_flat_folder_of_another_kind_of_files_says_so(tmp_path: Path) -> None:
    for name in ("a.gif", "labels.csv"):
        (tmp_path / name).touch()
    for format in ("imagefolder", "images"):
        with pytest.raises(InputError, match=r"holds no image; .*; found a\.gif"):
            open_dataset(tmp_path, format)


def test_folders_without_an_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        open_dataset(tmp_path, "imagefolder")
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no image"):
        open_dataset(tmp_path, "imagefolder")
    with pytest.raises(InputError, match="holds no image"):
        open_dataset(tmp_path, "images")


def test_an_empty_class_folder_is_a_class(tmp_path: Path) -> None:
    digit_folders(tmp_path, {0: "a", 2: "c"})
    (tmp_path / "b").mkdir()
    found = open_dataset(tmp_path, "imagefolder")
    assert found.classes == ("a", "b", "c") and found.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("format", ["imagefolder", "images", "medmnist"])
def test_what_is_not_there(tmp_path: Path, format: str) -> None:
    with pytest.raises(InputError, match="there is no such"):
        open_dataset(tmp_path / "absent", format)
    wrong = tmp_path / "folder" if format == "medmnist" else tmp_path / "file"
    wrong.mkdir() if format == "medmnist" else wrong.touch()
    with pytest.raises(InputError, match="it is a f"):
        open_dataset(wrong, format)


@pytest.fixture
def powerless() -> Iterator[Callable[[Path], None]]:
    """Forbids this process to read a folder, also where it runs as root; allowed again afterwards."""
    locked: list[Path] = []
    root = os.geteuid() == 0

    def lock(folder: Path) -> None:
        locked.append(folder)
        if root:
            # pytest's own folders are for their owner alone.
            for above in folder.parents[:-1]:
                if above.stat().st_uid == 0 and str(above).startswith(str(folder.parents[1].parents[1])):
                    above.chmod(0o755)
        folder.chmod(0)
        if root:
            os.seteuid(65534)

    yield lock
    if root:
        os.seteuid(0)
    for folder in locked:
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no permissions to take away")
@pytest.mark.parametrize(("format", "where"), [("imagefolder", "b"), ("imagefolder", "."), ("images", "b")])
def test_an_unreadable_folder(
    tmp_path: Path, powerless: Callable[[Path], None], format: str, where: str
) -> None:
    folder = digit_folders(tmp_path / "data", {0: "a", 1: "b"})
    powerless(folder / where)
    with pytest.raises(InputError, match=r"cannot read .*Permission denied"):
        open_dataset(folder, format)


def test_images_without_labels(tmp_path: Path) -> None:
    digit_folders(tmp_path, {0: "a", 1: "b/c"})
    found = open_dataset(tmp_path, "images")
    assert len(found) == 4 and not found.labelled and names(found)[-1] == "b/c/1_1.png"
    found.check_classes(1000)
    with pytest.raises(InputError, match="have no parts"):
        open_dataset(tmp_path, "images", split="val")


def test_the_fingerprint_knows_what_changes_an_evaluation(tmp_path: Path) -> None:
    folder = digit_folders(tmp_path, {0: "a", 1: "b"})
    before = open_dataset(folder, "imagefolder").fingerprint
    assert open_dataset(folder, "imagefolder").fingerprint == before
    (folder / "a" / "0_0.png").rename(folder / "b" / "0_0.png")
    moved = open_dataset(folder, "imagefolder").fingerprint
    assert moved != before
    (folder / "b" / "0_0.png").write_bytes((folder / "b" / "0_0.png").read_bytes() + b" ")
    assert open_dataset(folder, "imagefolder").fingerprint != moved


# MedMNIST -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
def test_a_file_of_medmnist(tmp_path: Path, colour: bool) -> None:
    path = medmnist_file(tmp_path / "digitmnist.npz", colour=colour)
    parts = {part: open_dataset(path, "medmnist", split=part) for part in ("train", "val", "test")}
    for number, (part, found) in enumerate(parts.items()):
        assert found.name == f"digitmnist, {part}" and len(found) == 20
        np.testing.assert_array_equal(
            found.labels, load_digits().held_out.labels[20 * number : 20 * number + 20]
        )
        assert found.classes == tuple("0123456789")
    assert open_dataset(path, "medmnist").fingerprint == parts["test"].fingerprint
    assert len({found.fingerprint for found in parts.values()}) == 3
    assert prepare([parts["test"].image(0)], DIGITS).shape == (1, 3, 64, 64)


def test_a_file_without_the_part(tmp_path: Path) -> None:
    path = medmnist_file(tmp_path / "a.npz", parts=("train", "test"))
    with pytest.raises(InputError, match="has no part 'val'; it has train, test"):
        open_dataset(path, "medmnist", split="val")


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.zeros((4, 28, 28), np.uint8), np.zeros((4, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "no file of MedMNIST: it holds x"),
        ({}, "it holds nothing"),
        ({"test_images": IMAGES}, "has test_images, but no test_labels"),
        ({"test_labels": LABELS, "val_images": IMAGES}, "has test_labels, but no test_images"),
        ({"test_images": IMAGES, "test_labels": np.zeros((4, 14), np.uint8)}, "14 labels for each image"),
        ({"test_images": np.zeros((4, 28, 28, 28), np.uint8), "test_labels": LABELS}, "3D sets"),
        ({"test_images": IMAGES.astype(np.float32), "test_labels": LABELS}, "of float32; expected"),
        ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "holds no image"),
        ({"test_images": IMAGES, "test_labels": LABELS[:3]}, "a whole number for each of 4 images"),
        ({"test_images": IMAGES, "test_labels": LABELS.astype(float)}, "a whole number for each"),
        ({"test_images": IMAGES, "test_labels": LABELS.astype(np.int8) - 1}, "has the label -1"),
        ({"test_images": np.array([None] * 4), "test_labels": LABELS}, "cannot be loaded|can be read"),
    ],
)
def test_files_that_are_none_of_medmnists(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(saved(tmp_path / "a.npz", **arrays), "medmnist")


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = medmnist_file(tmp_path / "a.npz")
    data = path.read_bytes()
    for damage in (b"", b"no archive", data[: len(data) // 2], data[:2000] + bytes(500) + data[2500:]):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="can be read"):
            open_dataset(path, "medmnist", split="train")
    np.save(tmp_path / "one.npy", IMAGES)
    with pytest.raises(InputError, match="no archive"):
        open_dataset(tmp_path / "one.npy", "medmnist")


# Parts of sets, and batches -------------------------------------------------------------------------------------


def test_a_subset_keeps_classes_and_knows_that_it_is_one() -> None:
    whole = open_dataset(None, "digits")
    part = whole.subset([5, 3])
    assert len(part) == 2 and part.classes == whole.classes and names(part) == ["image 5", "image 3"]
    assert part.labels.tolist() == whole.labels[[5, 3]].tolist()
    np.testing.assert_array_equal(part.image(0), whole.image(5))  # type: ignore[arg-type]
    assert part.fingerprint != whole.subset([3, 5]).fingerprint
    with pytest.raises(InputError, match="images 0 to 449, found 450"):
        whole.subset([450])


def test_a_sample_is_the_same_every_time() -> None:
    whole = open_dataset(None, "digits")
    sample = whole.sample(30)
    assert sample.fingerprint == whole.sample(30).fingerprint != whole.sample(30, seed=1).fingerprint
    assert len(set(names(sample))) == 30 and names(sample) == sorted(
        names(sample), key=lambda n: int(n.split()[1])
    )
    assert whole.sample(450) is whole


@pytest.mark.parametrize(("size", "workers", "start"), [(32, 1, 0), (7, 3, 14), (500, 1, 0), (1, 2, 448)])
def test_batches_come_in_order_and_whole(size: int, workers: int, start: int) -> None:
    dataset = open_dataset(None, "digits")
    parts = list(batches(dataset, DIGITS, size, workers=workers, start=start))
    np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), np.arange(start, 450))
    assert [len(part.labels) for part in parts[:-1]] == [size] * (len(parts) - 1)
    images = np.concatenate([part.images for part in parts])
    np.testing.assert_array_equal(images, prepare(list(load_digits().held_out.images[start:]), DIGITS))


def test_broken_images_are_named_and_left_out(tmp_path: Path) -> None:
    folder = digit_folders(tmp_path, {0: "a", 1: "b"})
    for name, data in damaged(tmp_path).items():
        (folder / "a" / name).write_bytes(data)
    (folder / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    dataset = open_dataset(folder, "imagefolder")
    whole = prepare_all(dataset, DIGITS)
    assert {name for name, _ in whole.broken} == {f"a/{name}" for name in damaged(tmp_path)} | {"b/gone.png"}
    assert all(re.search("cannot be read", reason) for _, reason in whole.broken)
    assert whole.labels.tolist() == [0, 0, 1, 1] == dataset.labels[whole.indices].tolist()
    # Each batch still covers as many positions of the data set, down to a batch of nothing.
    parts = list(batches(dataset, DIGITS, 1))
    assert len(parts) == len(dataset) == 9 and sorted(len(part.labels) for part in parts) == [0] * 5 + [1] * 4
    empty = next(part for part in parts if not len(part.labels))
    assert empty.images.shape == (0, 3, 64, 64) and empty.indices.dtype == np.int64


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        next(batches(open_dataset(None, "digits"), DIGITS, 0))


def test_only_so_many_batches_are_prepared_ahead(tmp_path: Path) -> None:
    """Whoever takes one batch of a large set does not wait for, or hold, all of it."""
    read: list[int] = []

    class Counting(Dataset):
        def image(self, index: int) -> Any:
            read.append(index)
            return super().image(index)

    digits = open_dataset(None, "digits")
    dataset = Counting(**{name: getattr(digits, name) for name in Dataset.__dataclass_fields__})
    iterator: Iterator[Batch] = batches(dataset, DIGITS, 10, workers=2)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert len(read) <= 30
