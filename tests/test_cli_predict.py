"""`quartermap predict`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import toy_bundles
from command_line import call
from deploy_bundles import change_manifest, contents, dynamic_bundle
from PIL import Image
from task_bundles import pooled_bundle, restorer_bundle, segmenter_bundle

import quartermap_deploy as qm
from quartermap_deploy import prediction_files
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.data.images import sample_photographs
from quartermap_deploy.predicting import Mask


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images in it; tables are as wide as in a pipe."""
    folder = tmp_path / "place"
    (folder / "digits" / "more").mkdir(parents=True)
    (folder / "photographs").mkdir()
    for number in range(3):
        Image.fromarray(load_digits().held_out.images[number]).save(folder / "digits" / f"{number}.png")
    shutil.copy(folder / "digits" / "0.png", folder / "digits" / "more" / "0.png")
    for name, image in sample_photographs().items():
        Image.fromarray(image).save(folder / "photographs" / Path(name).with_suffix(".png").name)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    return folder


def refused(*arguments: object) -> str:
    """Run a command that must be refused: exit code 2, one message, and nothing written."""
    before = contents(Path.cwd())
    done = call("predict", *arguments, "--quiet")
    assert done.code == 2 and done.out == "", done
    (line,) = done.err.splitlines()
    assert line.startswith("quartermap: error: ") and contents(Path.cwd()) == before
    return line


def test_classes_are_printed_for_each_file_and_folder() -> None:
    done = call("predict", dynamic_bundle(), "digits/1.png", "digits", "--top", 2)
    assert done.code == 0 and not done.messages and "predicting" in done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["image", "class", "probability"]
    shown = [row[0] for row in rows[2:] if len(row) == 3]
    assert shown == ["digits/1.png", "digits/0.png", "digits/1.png", "digits/2.png", "digits/more/0.png"]
    (image,) = qm.load_bundle(dynamic_bundle()).predict("digits/0.png")
    assert rows[4][1:] == [image.best.label, f"{image.best.probability:.2%}"] and len(rows) == 12


def test_json_has_everything_that_was_predicted_and_from_what() -> None:
    done = call(
        "predict", dynamic_bundle(), "digits", "--json", "--quiet", "--preprocessing", "scale=1/127.5"
    )
    found = done.json
    assert done.code == 0 and done.err == ""
    assert (found["task"], found["target"], found["broken"], found["out"]) == (
        "classification",
        "onnxruntime",
        [],
        None,
    )
    assert found["preprocessing"]["scale"] == 1 / 127.5 and found["labels"] == [str(n) for n in range(10)]
    assert found["bundle"]["model"] == "vmamba_digits"
    bundle = qm.load_bundle(dynamic_bundle())
    for entry, one in zip(
        found["images"], bundle.predict("digits", preprocessing={"scale": 1 / 127.5}), strict=True
    ):
        assert entry["source"] == one.source
        assert [score["class"] for score in entry["classes"]] == [score.index for score in one.scores]
        assert entry["classes"][0]["probability"] == one.best.probability


def test_classes_are_written_as_csv_and_as_lines_of_json(place: Path) -> None:
    done = call("predict", dynamic_bundle(), "digits", "-o", "new/out", "--top", 3, "--labels", "digits")
    assert done.code == 0
    out = place / "new" / "out"
    assert {path.name for path in out.iterdir()} == {"classes.csv", "classes.jsonl", "predictions.json"}
    rows = list(csv.DictReader((out / "classes.csv").open(encoding="utf-8", newline="")))
    lines = [json.loads(line) for line in (out / "classes.jsonl").read_text(encoding="utf-8").splitlines()]
    index = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert len(rows) == 12 and lines == index["images"] and len(lines) == 4
    scores = [score for line in lines for score in line["classes"]]
    assert [float(row["probability"]) for row in rows] == [score["probability"] for score in scores]
    assert [(row["class"], row["rank"]) for row in rows[:3]] == [
        (str(score["class"]), str(rank)) for rank, score in enumerate(scores[:3], 1)
    ]
    assert index["bundle"]["name"] == dynamic_bundle().name and len(index["bundle"]["manifest_sha256"]) == 64


def test_masks_are_written_as_png_files_with_a_palette(place: Path) -> None:
    (place / "again").mkdir()
    name = sorted(path.name for path in (place / "photographs").iterdir())[0]
    shutil.copy(place / "photographs" / name, place / "again" / name.upper().replace(".PNG", ".png"))
    done = call("predict", segmenter_bundle(), "photographs", "again", "-o", "out", "--json")
    assert done.code == 0
    entries = done.json["images"]
    stem = Path(name).stem
    assert [entry["file"] for entry in entries][::2] == [f"{stem}.png", f"{stem.upper()}_2.png"]
    found = qm.load_bundle(segmenter_bundle()).predict(["photographs", "again"])
    for entry, one in zip(entries, found, strict=True):
        assert isinstance(one, Mask) and entry["size"] == [32, 32]
        assert {part["label"]: part["share"] for part in entry["classes"]} == {
            one.labels[index]: share for index, share in one.shares.items()
        }
        with Image.open(place / "out" / entry["file"]) as picture:
            assert picture.mode == "P" and np.array_equal(np.asarray(picture), one.mask)
    done = call("predict", segmenter_bundle(), "photographs", "--top", 1)
    assert done.code == 0 and "share of the pixels" in done.out and len(done.out.splitlines()) == 4


def test_images_are_written_where_their_scale_is_known_and_arrays_otherwise(place: Path) -> None:
    bundle = qm.load_bundle(restorer_bundle())
    done = call("predict", restorer_bundle(), "photographs", "-o", "out")
    assert done.code == 0 and "1 x 32 x 32" in done.out
    for one in bundle.predict("photographs"):
        with Image.open(place / "out" / f"{Path(one.source).stem}.png") as picture:
            assert picture.mode == "L" and np.array_equal(np.asarray(picture), one.pixels)
    normalised = ("--preprocessing", "mean=0.5", "std=0.5")
    assert call("predict", restorer_bundle(), "photographs", "-o", "out", "--force", *normalised).code == 0
    assert sorted({path.suffix for path in (place / "out").iterdir()}) == [".json", ".npz"]
    for one in bundle.predict("photographs", preprocessing={"mean": [0.5], "std": [0.5]}):
        with np.load(place / "out" / f"{Path(one.source).stem}.npz") as arrays:
            assert np.array_equal(arrays["image"], one.values)


def test_arrays_of_every_output_are_written_by_name(place: Path) -> None:
    settings = ("--preprocessing", "mean=0.5,0.5,0.5", "--preprocessing", "std=0.25,0.25,0.25")
    done = call("predict", pooled_bundle(), "photographs", "-o", "out", *settings)
    assert done.code == 0 and "6 x 8 x 8" in done.out and "total" in done.out
    found = qm.load_bundle(pooled_bundle()).predict(
        "photographs", preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3}
    )
    for one in found:
        with np.load(place / "out" / f"{Path(one.source).stem}.npz") as arrays:
            assert sorted(arrays) == ["features", "total"]
            assert all(np.array_equal(arrays[name], one.arrays[name]) for name in arrays)
            assert arrays["total"].shape == ()


def test_any_name_of_an_output_is_one_in_an_archive() -> None:
    import io

    given = {"file": np.arange(3), "a/b": np.float32(2) * np.ones(()), "größe": np.array([True])}
    with np.load(io.BytesIO(prediction_files.npz(given))) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {
            name: values.tolist() for name, values in given.items()
        }


def test_broken_files_are_warned_of_and_left_out(place: Path) -> None:
    (place / "digits" / "x.png").write_text("no image")
    (place / "digits" / "y\x1b[31m.png").write_text("no image")
    done = call("predict", dynamic_bundle(), "digits", "missing.png", "-o", "out", "--json", "--quiet")
    assert done.code == 0 and len(done.json["images"]) == 4
    assert [entry["source"] for entry in done.json["broken"]][1:] == ["digits/y\x1b[31m.png", "missing.png"]
    (line,) = done.err.splitlines()
    assert line.startswith("quartermap: warning: 3 of 7 images cannot be used") and "\x1b" not in line
    index = json.loads((place / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert index["broken"] == done.json["broken"]
    assert "none of 2 images can be used" in refused(
        dynamic_bundle(), "digits/x.png", "missing.png", "-o", "other"
    )


def test_names_that_are_no_text_are_predicted_from_all_the_same(place: Path) -> None:
    name = os.fsdecode(b"digits/\xff.png")
    try:
        shutil.copy("digits/0.png", name)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    done = call("predict", dynamic_bundle(), "digits", "-o", "out", "--json", "--quiet")
    assert done.code == 0 and any("\\udcff" in entry["source"] for entry in done.json["images"])
    assert "\\udcff" in (place / "out" / "classes.csv").read_text(encoding="utf-8")


def test_a_long_table_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from quartermap_deploy.cli import predict

    monkeypatch.setattr(predict, "SHOWN", 3)
    done = call("predict", dynamic_bundle(), "digits", "--top", 1)
    assert done.code == 0 and done.out.splitlines()[-1] == "and 1 more images; --json and -o have all"
    assert len(call("predict", dynamic_bundle(), "digits", "--top", 1, "--json").json["images"]) == 4
    assert call("predict", dynamic_bundle(), "digits", "--quiet").out == ""


def test_what_does_not_fit_is_refused(place: Path) -> None:
    digits = dynamic_bundle()
    assert "there is no bundle" in refused("nothing", "digits")
    assert "the following arguments are required: FILES" in refused(digits)
    (place / "empty").mkdir()
    assert "holds no image" in refused(digits, "empty")
    assert "give arrays to bundle.run" in refused(toy_bundles.change(), "photographs")
    assert "--preprocessing mean=0.5,0.5,0.5" in refused(pooled_bundle(), "photographs", "-o", "out")
    assert "is no setting of the preprocessing" in refused(digits, "digits", "--preprocessing", "mean")
    assert "unknown key of the preprocessing" in refused(digits, "digits", "--preprocessing", "meen=1")
    assert "cannot be read" in refused(digits, "digits", "--labels", "no_labels")
    assert "no engine for tensorrt" in refused(digits, "digits", "--target", "tensorrt")
    assert "at least 1" in refused(digits, "digits", "--top", "0")
    assert "x[2] % 4" in refused(
        restorer_bundle(), "photographs", "-o", "out", "--preprocessing", "crop=30x30"
    )


def test_only_folders_of_predictions_are_replaced(place: Path) -> None:
    bundle = Path(shutil.copytree(dynamic_bundle(), place / "bundle"))
    assert call("predict", bundle, "digits", "-o", "out", "--quiet").code == 0
    before = contents(place / "out")
    assert "replace it with --force" in refused(bundle, "digits", "-o", "out")
    assert call("predict", bundle, "digits", "-o", "out", "--quiet", "--force").code == 0
    assert contents(place / "out") == before
    assert "--force does not replace it" in refused(bundle, "digits", "-o", "photographs", "--force")
    assert "in the bundle" in refused(bundle, "digits", "-o", "bundle/out")
    change_manifest(bundle, labels=[])
    found = call("predict", bundle, "digits/0.png", "--json").json
    assert found["images"][0]["classes"][0]["label"].isdecimal() and found["labels"] == []


def test_a_full_disk_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("predict", segmenter_bundle(), "photographs", "-o", "out", "--quiet").code == 0
    before = contents(place / "out")
    real = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        if self.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    assert "No space left" in refused(segmenter_bundle(), "photographs", "-o", "out", "--force")
    assert "No space left" in refused(segmenter_bundle(), "photographs", "-o", "new/out")
    assert contents(place / "out") == before and not (place / "new").exists()
