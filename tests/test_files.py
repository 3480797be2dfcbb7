"""Files and folders are written whole or not at all, and what others made is read with bounds."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.errors import BundleError, InputError, WriteError
from quartermap_deploy.files import (
    FolderKind,
    check_outside,
    file_hash,
    folders_for,
    obstacle_to,
    pending_file,
    read_regular,
    write_whole,
)

KIND = FolderKind("thing", "marker.json", BundleError)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """New files and folders are readable by the group, and writable by their owner alone."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_thing(path: Path) -> Path:
    path.mkdir()
    (path / "marker.json").write_text("old")
    (path / "more.txt").write_text("old")
    return path


def write_new(path: Path, force: bool = False) -> None:
    with KIND.new(path, force) as draft:
        (draft / "marker.json").write_text("new")


# Where folders may be written to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_a_place_where_nothing_is_is_free(tmp_path: Path, force: bool) -> None:
    KIND.check_destination(tmp_path / "a" / "b" / "thing", force)
    assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_place_below_a_file_is_none(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BundleError, match=r"cannot write to .*thing: .*file is no folder that you may write to"
    ):
        KIND.check_destination(tmp_path / "file" / "thing", force)


def test_what_is_there_is_replaced_on_demand_alone(tmp_path: Path) -> None:
    thing = old_thing(tmp_path / "thing")
    with pytest.raises(
        BundleError, match=r"exists already; choose another folder, or replace it with --force"
    ):
        KIND.check_destination(thing, False)
    KIND.check_destination(thing, True)
    with pytest.raises(BundleError, match="exists already"):
        write_new(thing)
    assert (thing / "marker.json").read_text() == "old"


def test_force_replaces_nothing_else(tmp_path: Path) -> None:
    empty, other, file = tmp_path / "empty", tmp_path / "other", tmp_path / "file"
    empty.mkdir()
    other.mkdir()
    (other / "letter.txt").write_text("")
    file.write_text("")
    link, lost = tmp_path / "link", tmp_path / "lost"
    link.symlink_to(old_thing(tmp_path / "thing"))
    lost.symlink_to(tmp_path / "nowhere")
    KIND.check_destination(empty, True)
    for path in (other, file, link, lost):
        with pytest.raises(BundleError, match="is no thing, so --force does not replace it"):
            KIND.check_destination(path, True)
    for path in (empty, other, file, lost):
        with pytest.raises(BundleError, match=r"exists already; choose another folder$"):
            KIND.check_destination(path, False)


# Folders that are written whole -------------------------------------------------------------------------------------


def test_a_new_folder_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "thing"
    with KIND.new(place) as draft:
        assert draft.parent == place.parent and not place.exists()
        assert draft.name.startswith(".thing.") and draft.name.endswith(".draft")
        assert mode(draft) == 0o700
        (draft / "marker.json").write_text("new")
    assert names(place.parent) == ["thing"] and names(place) == ["marker.json"]
    assert mode(place) == 0o750


@pytest.mark.parametrize("made", [False, True])
def test_an_old_folder_is_replaced_whole(tmp_path: Path, made: bool) -> None:
    thing = old_thing(tmp_path / "thing")
    if made:
        (thing / "marker.json").unlink()
        (thing / "more.txt").unlink()
    write_new(thing, force=True)
    assert names(tmp_path) == ["thing"] and names(thing) == ["marker.json"]
    assert (thing / "marker.json").read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_leaves_nothing_but_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    thing = old_thing(tmp_path / "thing")
    for place in (thing, tmp_path / "a" / "b" / "other"):
        with pytest.raises(failure), KIND.new(place, force=True) as draft:
            (draft / "marker.json").write_text("half")
            assert not place.exists() or (place / "marker.json").read_text() == "old"
            raise failure
    assert names(tmp_path) == ["thing"] and names(thing) == ["marker.json", "more.txt"]
    assert (thing / "marker.json").read_text() == "old"


@pytest.mark.parametrize("failure", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_an_old_folder_is_put_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.suffix == ".draft":
            raise failure
        return rename(path, target)

    thing = old_thing(tmp_path / "thing")
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(failure)):
        write_new(thing, force=True)
    assert names(tmp_path) == ["thing"] and names(thing) == ["marker.json", "more.txt"]
    assert (thing / "marker.json").read_text() == "old"


def test_an_old_folder_stays_until_the_new_one_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    remove = shutil.rmtree

    def watched(path: Path, **settings: Any) -> None:
        if path.exists():
            removed.append((thing / "marker.json").read_text())
            remove(path, **settings)

    thing = old_thing(tmp_path / "thing")
    monkeypatch.setattr(shutil, "rmtree", watched)
    write_new(thing, force=True)
    assert removed == ["new"], "what was there is removed once, when the new one is in place"


def test_folders_that_hold_something_by_now_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), KIND.new(tmp_path / "a" / "b" / "thing"):
        (tmp_path / "a" / "note").write_text("")
        raise ValueError("half")
    assert names(tmp_path / "a") == ["note"]


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    thing = tmp_path / "thing"
    with pytest.raises(BundleError, match="exists already"), KIND.new(thing) as draft:
        (draft / "marker.json").write_text("new")
        old_thing(thing)
    assert (thing / "marker.json").read_text() == "old" and names(tmp_path) == ["thing"]


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quartermap_deploy.files.obstacle_to", lambda path: None)
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with (
        pytest.raises(BundleError, match=r"cannot write to .*: .*No space left"),
        KIND.new(tmp_path / "thing"),
    ):
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc")
def test_nothing_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        write_new(tmp_path / "thing", force=True)
        with pytest.raises(OSError, match="no plain file"):
            read_regular(tmp_path / "thing", 9)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_in_the_place_of_the_draft_is_noticed(tmp_path: Path) -> None:
    other = old_thing(tmp_path / "other")
    other.chmod(0o700)
    with pytest.raises(BundleError, match="somebody else replaced"), KIND.new(tmp_path / "thing") as draft:
        draft.rename(tmp_path / "moved")
        draft.symlink_to(other)
    assert mode(other) == 0o700 and not (tmp_path / "thing").exists()


def test_a_draft_that_is_gone_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="somebody else replaced"), KIND.new(tmp_path / "thing") as draft:
        draft.rename(tmp_path / "moved")
    assert names(tmp_path) == ["moved"]


def test_systems_that_open_no_folders_write_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows, which has other permissions, too."""
    for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod"):
        monkeypatch.delattr(os, name)
    write_new(tmp_path / "thing")
    write_whole(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file", "thing"]
    assert read_regular(tmp_path / "file", 9, follow=False) == read_regular(tmp_path / "file", 9) == b"new"


# Places -----------------------------------------------------------------------------------------------------------


def test_nothing_is_written_into_a_bundle(tmp_path: Path) -> None:
    first, second = old_thing(tmp_path / "first"), old_thing(tmp_path / "second")
    (tmp_path / "link").symlink_to(second)
    for path in (second, second / "a" / "b", tmp_path / "link" / "a", first / "x", second / ".." / "first"):
        with pytest.raises(BundleError, match=r"is in the bundle .* choose a place outside of it"):
            check_outside(path, [first, second], BundleError)
    with pytest.raises(InputError, match=f"is in the bundle {second}"):
        check_outside(second / "x", iter([first, second]), InputError)
    for path in (tmp_path / "third", tmp_path / "first_too", first / ".." / "x"):
        check_outside(path, [first, second], BundleError)


def test_what_stands_in_the_way_is_said_and_nothing_left(tmp_path: Path) -> None:
    assert obstacle_to(tmp_path / "a" / "b" / "file") is None
    assert obstacle_to(tmp_path / "file") is None
    (tmp_path / "file").write_text("")
    for permissions in (0o600, 0o700):  # what may be run looks like a folder that one may enter
        (tmp_path / "file").chmod(permissions)
        found = obstacle_to(tmp_path / "file" / "b" / "c")
        assert found == f"{tmp_path / 'file'} is no folder that you may write to"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_file_system_that_takes_no_files_is_an_obstacle() -> None:
    found = obstacle_to(Path("/proc/none/file"))
    assert found is not None and ("nothing can be written to /proc" in found or "/proc is no folder" in found)


def test_a_folder_of_others_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever permissions it has, as the superuser may write everywhere."""
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    assert obstacle_to(tmp_path / "a" / "file") == f"{tmp_path} is no folder that you may write to"
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] and names(tmp_path) == []


def test_folders_for_a_file_stay_with_it_and_go_without(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(KeyboardInterrupt), folders_for(path):
        assert path.parent.is_dir()
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with folders_for(path):
        path.write_text("")
    assert path.is_file()
    with pytest.raises(ValueError, match="half"), folders_for(tmp_path / "a" / "c" / "file"):
        raise ValueError("half")
    assert names(tmp_path / "a") == ["b"]


# Files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pending_file(path, b"new"):
        assert path.read_bytes() == b"old"
        (draft,) = (name for name in names(tmp_path) if name != "file")
        assert draft.startswith(".file.")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"] and mode(path) == 0o640
    with pytest.raises(KeyboardInterrupt), pending_file(path, b"third"):
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


def test_a_draft_that_somebody_took_away_hides_no_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), pending_file(tmp_path / "file", b"new"):
        (draft,) = tmp_path.iterdir()
        draft.unlink()
        raise KeyboardInterrupt
    with pytest.raises(WriteError, match="No such file"), pending_file(tmp_path / "file", b"new"):
        (draft,) = tmp_path.iterdir()
        draft.unlink()
    assert names(tmp_path) == []


def test_permissions_are_those_of_new_files_or_those_that_were_asked_for(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"1")
    write_whole(tmp_path / "b", b"2", 0o600)
    write_whole(tmp_path / "c", b"3", mode=0o666)
    assert [mode(tmp_path / name) for name in "abc"] == [0o640, 0o600, 0o666]


def test_what_the_system_has_against_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "within").mkdir(parents=True)
    for path, number in ((tmp_path / "none" / "file", errno.ENOENT), (tmp_path / "folder", errno.EISDIR)):
        with pytest.raises(WriteError) as found:
            write_whole(path, b"")
        assert (found.value.errno, found.value.filename) == (number, str(path))
        assert os.strerror(number) in str(found.value)
    assert names(tmp_path) == ["folder"]


def test_a_file_of_strangers_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == read_regular(path, 500) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes") as found:
        read_regular(path, 4)
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(path))
    path.write_bytes(b"")
    assert read_regular(path, 0) == b""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="there is no /proc")
def test_files_that_do_not_tell_their_size_have_the_bound_too() -> None:
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0 and b"Pid:" in read_regular(path, 1 << 20)
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_regular(path, 10)


def test_a_file_that_grows_while_it_is_read_has_the_bound_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"123456")
    before = SimpleNamespace(st_mode=(tmp_path / "file").stat().st_mode, st_size=5)
    monkeypatch.setattr(os, "fstat", lambda descriptor: before)
    with pytest.raises(OSError, match="more than 5 bytes"):
        read_regular(tmp_path / "file", 5)


def test_links_are_followed_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert read_regular(link, 9) == read_regular(tmp_path / "file", 9, follow=False) == b"1"
    with pytest.raises(OSError, match="it is a link") as found:
        read_regular(link, 9, follow=False)
    assert (found.value.errno, found.value.filename) == (errno.ELOOP, str(link))


def test_files_are_opened_without_waiting_and_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, told = os.open, []

    def watched(path: Path, flags: int) -> int:
        told.append(flags)
        return opened(path, os.O_RDONLY)

    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    monkeypatch.setattr(os, "open", watched)
    read_regular(tmp_path / "file", 9)
    read_regular(tmp_path / "file", 9, follow=False)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_BINARY
    assert told == [flags, flags | os.O_NOFOLLOW], (
        "a link that comes between the look and the opening is seen"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("follow", [False, True])
def test_pipes_and_folders_are_no_files(tmp_path: Path, follow: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="it is no plain file") as found:
            read_regular(tmp_path / name, 9, follow=follow)
        assert (found.value.errno, found.value.filename) == (errno.EINVAL, str(tmp_path / name))


def test_hashes_are_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 7) + b"end"
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# Drafts -----------------------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
KILLED = """
import os, signal, sys
from pathlib import Path
from quartermap_deploy.errors import BundleError
from quartermap_deploy.files import FolderKind, pending_file

place = Path(sys.argv[1])
thing = FolderKind("thing", "marker.json", BundleError).new(place / "thing")
with pending_file(place / "file", b"half"), thing as draft:
    (draft / "half").write_text("")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def begun(place: Path) -> subprocess.Popen[str]:
    """A process that writes a folder and a file, and stays in the middle of that."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def age(folder: Path) -> None:
    """Make drafts as old as those that are nobody's."""
    for path in folder.iterdir():
        os.utime(path, (1, 1))


@posix
def test_of_two_that_write_one_folder_the_second_is_told_at_the_start(tmp_path: Path) -> None:
    process = begun(tmp_path)
    try:
        age(tmp_path)
        before = names(tmp_path)
        with pytest.raises(BundleError, match=r"another process is writing .*thing now"):
            write_new(tmp_path / "thing")
        assert names(tmp_path) == before, "what somebody still writes is left alone"
        write_whole(tmp_path / "file", b"new")
        write_new(tmp_path / "thing2")
    finally:
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == ["file", "thing", "thing2"]


@posix
def test_what_a_killed_process_left_goes_with_the_next_that_writes_there(tmp_path: Path) -> None:
    process = begun(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    left = names(tmp_path)
    assert len(left) == 2
    write_whole(tmp_path / "file", b"new")
    assert {*left, "file"} == set(names(tmp_path)), "it may have been begun just now"
    age(tmp_path)
    other = tmp_path / ".thingy.abc.draft"
    other.mkdir()
    os.utime(other, (1, 1))
    write_new(tmp_path / "thing")
    write_whole(tmp_path / "file", b"new")
    assert names(tmp_path) == [other.name, "file", "thing"]


@posix
def test_what_a_killed_process_had_taken_away_comes_back(tmp_path: Path) -> None:
    """It was killed between taking the old folder away and putting the new one there."""
    old_thing(tmp_path / ".thing.abcdefgh.replaced")
    with pytest.raises(BundleError, match="exists already"):
        write_new(tmp_path / "thing")
    assert names(tmp_path) == ["thing"] and names(tmp_path / "thing") == ["marker.json", "more.txt"]
    old_thing(tmp_path / ".thing.abcdefgh.replaced")
    write_new(tmp_path / "thing", force=True)
    assert names(tmp_path) == ["thing"] and names(tmp_path / "thing") == ["marker.json"]


@posix
def test_links_are_no_drafts(tmp_path: Path) -> None:
    other = old_thing(tmp_path / "other")
    (tmp_path / ".thing.abcdefgh.draft").symlink_to(other)
    write_new(tmp_path / "thing")
    assert names(other) == ["marker.json", "more.txt"] and (tmp_path / ".thing.abcdefgh.draft").is_symlink()


@posix
def test_a_full_disk_names_the_destination(tmp_path: Path) -> None:
    """A real write that the system refuses: the file may not grow any more."""
    import resource

    (tmp_path / "source").write_bytes(bytes(1 << 16))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
        with (
            pytest.raises(BundleError, match=r"cannot write .*thing: File too large; make room"),
            KIND.new(tmp_path / "thing") as draft,
        ):
            shutil.copyfile(tmp_path / "source", draft / "copy")
        with pytest.raises(WriteError, match=r"cannot write .*file: File too large"):
            write_whole(tmp_path / "file", bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["source"]
