"""Names of classes: the sets that come with the package, the cards that name them, and files of users."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quartermap_deploy.architectures.cards import list_models, load_card, read_card
from quartermap_deploy.data.labels import check_labels, label_sets, read_labels, shipped_labels
from quartermap_deploy.data.shipped import models_directory
from quartermap_deploy.errors import InputError, QuartermapError

COUNTS = {
    "bloodmnist": 8,
    "breastmnist": 2,
    "chestmnist": 14,
    "dermamnist": 7,
    "digits": 10,
    "imagenet": 1000,
    "octmnist": 4,
    "organamnist": 11,
    "organcmnist": 11,
    "organsmnist": 11,
    "pathmnist": 9,
    "pneumoniamnist": 2,
    "retinamnist": 5,
    "tissuemnist": 8,
}


def test_every_set_has_its_classes() -> None:
    assert {name: len(shipped_labels(name)) for name in label_sets()} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_every_name_of_a_set_is_different_and_short(name: str) -> None:
    labels = shipped_labels(name)
    assert len({label.casefold() for label in labels}) == len(labels)
    assert all(label == label.strip() and 0 < len(label) <= 80 and label[-1] != "," for label in labels)
    assert check_labels(labels, len(labels), "they") == labels


def test_imagenet_is_in_the_order_of_its_synsets() -> None:
    """Numbers that everybody knows, over the whole range; those of equal words are told apart."""
    labels = shipped_labels("imagenet")
    known = {
        0: "tench",
        1: "goldfish",
        134: "crane (bird)",
        207: "golden retriever",
        263: "Pembroke",
        264: "Cardigan Welsh corgi",
        281: "tabby",
        285: "Egyptian cat",
        340: "zebra",
        388: "giant panda",
        474: "cardigan",
        517: "crane (machine)",
        638: "maillot (tights)",
        639: "tank suit",
        817: "sports car",
        954: "banana",
        963: "pizza",
        980: "volcano",
        985: "daisy",
        999: "toilet tissue",
    }
    assert {number: labels[number] for number in known} == known


@pytest.mark.parametrize("name", list_models())
def test_cards_name_their_classes(name: str) -> None:
    card = load_card(name)
    assert card.task == "classification"
    expected = {"vmamba_digits": "digits"}.get(name, "imagenet" if card.family == "vmamba" else None)
    assert card.label_set == expected
    # The classes of a MedMamba are those of the data set that its checkpoint was trained on.
    assert card.labels == (() if expected is None else shipped_labels(expected))


def test_a_card_with_labels_of_another_count_is_damaged(tmp_path: Path) -> None:
    text = (models_directory() / "vmamba_digits.toml").read_text(encoding="utf-8")
    for wrong, message in (
        ("bloodmnist", "8 names, 8 of them not empty; expected one for each of 10"),
        ("digit", "unknown set of class names 'digit'. Did you mean digits"),
    ):
        (tmp_path / "vmamba_digits.toml").write_text(text.replace('labels = "digits"', f'labels = "{wrong}"'))
        with pytest.raises(QuartermapError, match=message):
            read_card(tmp_path / "vmamba_digits.toml")


class TestReading:
    def test_a_file_has_one_name_on_each_line(self, tmp_path: Path) -> None:
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "names").write_text("null\n eins \r\nzwölf\n", encoding=encoding)
            assert read_labels(tmp_path / "names", 3) == ("null", "eins", "zwölf")
            assert read_labels(str(tmp_path / "names"), 3, ["a", "b", "c"]) == ("null", "eins", "zwölf")

    def test_a_set_is_named(self) -> None:
        assert read_labels("bloodmnist", 8)[0] == "basophil"
        assert read_labels(Path("imagenet"), 1000) == load_card("vmamba_tiny_s1l8").labels

    def test_a_file_with_the_name_of_a_set_is_told_by_its_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "digits").write_text("a\nb\n")
        assert len(read_labels("digits", 10)) == 10
        assert read_labels("./digits", 2) == ("a", "b")

    def test_without_any_the_card_s_or_numbers_are_taken(self) -> None:
        default = load_card("vmamba_digits").labels
        assert read_labels(None, 10, default) is default
        # A checkpoint with another last layer has other classes.
        assert read_labels(None, 3, default) == ("0", "1", "2")
        assert read_labels(None, 2) == ("0", "1")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\nb\n", "have 2 lines, 2 of them not empty; expected one for each of 3 classes"),
            ("a\n\nb\n", "have 3 lines, 2 of them not empty"),
            ("", "have 0 lines"),
            ("a\nb\na\n", "have 'a' twice, in lines 1 and 3; give each class its own name"),
            ("a\nb\nc\td\n", "cannot be printed in line 3"),
            ("a\nb\n\x1b[31mred\n", "cannot be printed in line 3: '.x1b"),
        ],
    )
    def test_what_does_not_fit_is_told(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "names").write_text(text)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / "names", 3)

    def test_what_cannot_be_read_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot be read: there is no such file, nor a set.*bloodmnist"):
            read_labels("bloodmnis", 8)
        with pytest.raises(InputError, match="cannot be read"):
            read_labels(tmp_path, 8)
        (tmp_path / "latin").write_bytes("zwölf\n".encode("latin-1"))
        with pytest.raises(InputError, match="cannot be read"):
            read_labels(tmp_path / "latin", 1)
        with pytest.raises(InputError, match="cannot be read"):
            read_labels("a\0b", 1)

    def test_sets_that_would_fit_are_named(self) -> None:
        with pytest.raises(InputError, match=r"expected one for each of 8 classes \(bloodmnist, tissuemnist"):
            read_labels("digits", 8)


@pytest.mark.parametrize("names", ["abc", {"a": 1}, [1, 2, 3], ["a", None, "c"], None])
def test_names_in_a_recipe_are_a_list_of_texts(names: object) -> None:
    with pytest.raises(InputError, match=r"the labels are .*; expected a list of texts"):
        check_labels(names, 3, "the labels")


def test_names_in_a_recipe_are_checked_too() -> None:
    assert check_labels(["a", "b"], 2, "the labels") == ("a", "b")
    with pytest.raises(InputError, match="'a' twice, in names 1 and 2"):
        check_labels(["a", "a"], 2, "the labels")


def test_labels_are_read_without_numpy_and_torch() -> None:
    program = (
        "import sys; from quartermap_deploy.data.labels import read_labels; read_labels('imagenet', 1000); "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
