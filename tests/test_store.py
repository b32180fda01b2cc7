"""A file that exists is complete, says what it was made for, and is refused with advice where it is damaged."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ROOT

from pipeline import locks, seals, store

AXES = {"activation": "seq pos d"}
SHAPES = {"activation": (20, 4, 3)}
TABLE = pa.table({"kl": pa.array([0.5, 1.0, 2.0], pa.float32()), "intervention": ["sae", "zero", "sae"]})


def h5(path, fingerprint="f00d", **attributes):
    with store.new_arrays(path, fingerprint, AXES, SHAPES, **attributes) as file:
        file["activation"][:] = np.arange(240).reshape(20, 4, 3)
    return path


def parquet(path, fingerprint="f00d", groups=(TABLE,), **attributes):
    store.write_table(path, groups, fingerprint, {"kl": "nats"}, **attributes)
    return path


def safetensors(path, fingerprint="f00d"):
    header = json.dumps({"__metadata__": {"fingerprint": fingerprint, "checksum": seals.UNSEALED}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    seals.seal(path)
    return path


WRITERS = {"a.h5": h5, "a.parquet": parquet, "a.safetensors": safetensors}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_arrays_read_back_as_they_were_written(tmp_path):
    axes, shapes = AXES | {"special": "seq pos"}, SHAPES | {"special": ((20, 4), "bool")}
    with store.new_arrays(tmp_path / "a.h5", "f00d", axes, shapes, model="tiny", contexts=None) as file:
        file["activation"][:], file["special"][:] = 0.5, True
    with store.arrays(tmp_path / "a.h5", axes) as file:
        x, special = file["activation"], file["special"]
        assert (x.shape, x.dtype, x.chunks, special.dtype) == ((20, 4, 3), "float32", (store.CHUNK, 4, 3), "bool")
        assert (x[:] == 0.5).all()
        assert special[:].all()
        assert (file.attrs["model"], file.attrs["contexts"]) == ("tiny", "null")


def begin(path, fingerprint="f00d"):
    return store.resumed_arrays(path, fingerprint, AXES, SHAPES, model="tiny")


def stop_halfway(path, monkeypatch, error=KeyboardInterrupt):
    """Eight sequences are marked, and four more written."""
    monkeypatch.setattr(store, "MARK", 8)
    with suppress(error), begin(path) as made:
        made.file["activation"][:8] = 1
        made.mark(8)
        made.file["activation"][8:12] = 2
        made.mark(12)
        raise error


def test_an_unfinished_file_is_gone_on_with_where_it_was_marked(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    stop_halfway(path, monkeypatch)
    assert names(tmp_path) == [".a.h5.f00d.done", ".a.h5.f00d.unfinished"]
    with begin(path) as made:
        assert made.done == 8
        assert (made.file["activation"][:8] == 1).all()
        made.file["activation"][8:] = 3
    assert names(tmp_path) == ["a.h5"]
    with store.arrays(path, AXES) as file:
        assert file["activation"][:, 0, 0].tolist() == [1] * 8 + [3] * 12
        assert (file.attrs["fingerprint"], file.attrs["model"]) == ("f00d", "tiny")
        assert file["activation"].chunks == (store.CHUNK, 4, 3)


def test_an_unfinished_file_of_another_fingerprint_is_swept_away(tmp_path, monkeypatch):
    stop_halfway(tmp_path / "a.h5", monkeypatch)
    stop_halfway(tmp_path / "10-a.h5", monkeypatch)
    with begin(tmp_path / "a.h5", "beef") as made:
        assert made.done == 0
    assert names(tmp_path) == [".10-a.h5.f00d.done", ".10-a.h5.f00d.unfinished", "a.h5"]


def test_an_error_leaves_no_unfinished_file(tmp_path, monkeypatch):
    stop_halfway(tmp_path / "a.h5", monkeypatch, ValueError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("lost", [".a.h5.f00d.done", ".a.h5.f00d.unfinished"])
def test_without_its_mark_or_without_the_file_the_work_starts_anew(tmp_path, monkeypatch, lost):
    stop_halfway(tmp_path / "a.h5", monkeypatch)
    (tmp_path / lost).unlink()
    with begin(tmp_path / "a.h5") as made:
        assert made.done == 0


def break_off(path):
    with store.new_arrays(path, "beef", AXES, SHAPES) as file:
        file["activation"][:] = 1
        raise RuntimeError("out of luck")


def test_a_block_that_raises_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        break_off(tmp_path / "a.h5")
    assert names(tmp_path) == []


def test_a_block_that_raises_leaves_the_older_file_as_it_was(tmp_path):
    before = h5(tmp_path / "a.h5").read_bytes()
    with pytest.raises(RuntimeError, match="out of luck"):
        break_off(tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_bytes() == before


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    with store.new_arrays(tmp_path / "new" / "a.h5", "f00d", AXES, SHAPES):
        assert not (tmp_path / "new" / "a.h5").exists()
    assert names(tmp_path / "new") == ["a.h5"]


def test_tables_that_break_off_leave_no_file(tmp_path):
    def groups():
        yield TABLE
        raise RuntimeError

    with pytest.raises(RuntimeError):
        parquet(tmp_path / "a.parquet", groups=groups())
    assert names(tmp_path) == []


def test_what_a_killed_job_left_of_the_same_file_is_swept_away(tmp_path):
    for name in (".a.h5.dead.part", ".a.h5.beef.part", ".b.h5.dead.part"):
        (tmp_path / name).write_text("half a file")
    h5(tmp_path / "a.h5")
    assert names(tmp_path) == [".b.h5.dead.part", "a.h5"]


@pytest.mark.parametrize("name", WRITERS)
def test_the_fingerprint_reads_back(tmp_path, name):
    assert store.read_fingerprint(WRITERS[name](tmp_path / name, "0123456789abcdef")) == "0123456789abcdef"


def test_a_file_of_another_maker_has_no_fingerprint(tmp_path):
    h5py.File(tmp_path / "a.h5", "w").close()
    pq.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert [store.read_fingerprint(tmp_path / name) for name in WRITERS] == [None] * 3


def test_only_kinds_of_file_that_keep_a_fingerprint_are_asked_for_one(tmp_path):
    with pytest.raises(ValueError, match=r"notes\.txt.*'\.txt'"):
        store.read_fingerprint(tmp_path / "notes.txt")


def test_the_fingerprint_of_a_page_stands_in_its_first_comment(tmp_path):
    (tmp_path / "page.html").write_text("<!doctype html>\n<!-- fingerprint 0123abcd -->\n<html></html>")
    assert store.read_fingerprint(tmp_path / "page.html") == "0123abcd"
    (tmp_path / "page.html").write_text("<!doctype html>\n<html><!-- a page of somebody else --></html>")
    assert not store.is_current(tmp_path / "page.html", "0123abcd")


@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_named_with_the_advice_to_delete_it(tmp_path, name, kept):
    path = WRITERS[name](tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{name}.*Delete it"):
        store.read_fingerprint(path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_nonsense_is_named_with_the_advice_to_delete_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=rf"{name}.*Delete it"):
        store.read_fingerprint(tmp_path / name)


def test_truncated_arrays_are_refused(tmp_path):
    path = h5(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.h5 can't be read.*Delete it"), store.arrays(path, AXES):
        pass


def test_arrays_with_other_axes_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.h5: 'activation' has axes 'seq pos d', expected 'seq pos'\. Delete it"),
        store.arrays(h5(tmp_path / "a.h5"), {"activation": "seq pos"}),
    ):
        pass


def test_a_dataset_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.h5 has no dataset 'x_hat', only activation\. Delete it"),
        store.arrays(h5(tmp_path / "a.h5"), AXES | {"x_hat": "seq pos d"}),
    ):
        pass


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    free = store.HEADROOM + 20 * 4 * 3 * 4  # The headroom, and 20 * 4 * 3 values of 4 bytes.
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    (tmp_path / ".a.h5.dead.part").write_text("what could make room")
    with pytest.raises(OSError, match=r"a\.h5 needs .* MiB, but its disk has 64 MiB left"):
        h5(tmp_path / "a.h5")
    assert names(tmp_path) == []
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert h5(tmp_path / "a.h5").exists()


def test_a_full_disk_is_noticed_before_a_table_or_a_text_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=store.HEADROOM))
    with pytest.raises(OSError, match="Free some space"):
        parquet(tmp_path / "a.parquet")
    with pytest.raises(OSError, match="Free some space"):
        store.write_text(tmp_path / "a.html", "<p>")
    assert names(tmp_path) == []


def test_a_table_keeps_its_groups_units_and_attributes(tmp_path):
    groups = [TABLE, TABLE.slice(1), TABLE.slice(2)]
    path = parquet(tmp_path / "a.parquet", groups=groups, sae="late", draws=3, patch_special=False)
    metadata, table = pq.read_metadata(path), pq.read_table(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 2, 1]
    assert table.to_pydict() == pa.concat_tables(groups).to_pydict()
    assert table.schema.field("kl").metadata[b"unit"] == b"nats"
    assert b"unit" not in (table.schema.field("intervention").metadata or {})
    assert store.table_attributes(path) == {
        "sae": "late",
        "draws": 3,
        "patch_special": False,
        "packages": store.packages(),
    }


def test_a_table_without_rows_is_a_table(tmp_path):
    path = parquet(tmp_path / "a.parquet", groups=[TABLE.slice(3)])
    assert (pq.read_table(path).num_rows, store.read_fingerprint(path)) == (0, "f00d")


def test_text_is_written_as_utf8(tmp_path):
    store.write_text(tmp_path / "a.html", "KL(p ‖ q)")
    assert (tmp_path / "a.html").read_bytes() == "KL(p ‖ q)".encode()


# The spool of an unfinished item.

SPOOLED = (3, 2, 20, 4)  # value patch seq pos


def spool(folder, fingerprint="f00d", shape=SPOOLED):
    return store.Spool(folder / "0-of-1.parquet", fingerprint, shape)


def some(count, seed=0):
    """Values of that many sequences; the second value of the last position is NaN, as cross-entropy is."""
    values = np.random.default_rng(seed).random((3, 2, count, 4), np.float32)
    values[1, ..., -1] = np.nan
    return values


def test_a_new_spool_holds_nothing(tmp_path):
    assert spool(tmp_path / "new").done == 0
    assert names(tmp_path / "new") == [".0-of-1.parquet.f00d.spool"]


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path):
    first = spool(tmp_path)
    first.put(0, some(8))
    first.put(8, some(8, 1))
    again = spool(tmp_path)
    assert again.done == 16
    np.testing.assert_array_equal(again.get(1, slice(8, 16)), some(8, 1)[:, 1])
    again.put(16, some(4, 2))
    assert (first.done, spool(tmp_path).done) == (20, 20)
    whole = np.concatenate([some(8), some(8, 1), some(4, 2)], axis=2)
    np.testing.assert_array_equal(whole, np.stack([first.get(patch, slice(0, 20)) for patch in (0, 1)], axis=1))


def test_only_sequences_from_the_first_on_are_done(tmp_path):
    made = spool(tmp_path)
    made.put(8, some(8))
    assert made.done == 0
    made.put(0, some(8))
    assert made.done == 16


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (1, 0)], ids=str)
def test_a_torn_row_does_not_count(tmp_path, place):
    """`put` writes the first value last; here the process died before all of it was written."""
    made = spool(tmp_path)
    made.put(0, some(16))
    made.values[0, place[0], 8:, place[1]] = np.nan
    assert spool(tmp_path).done == 8


def test_a_spool_is_on_disk_when_its_process_is_killed(tmp_path):
    code = (
        "import os, sys, numpy as np; from pathlib import Path; from pipeline import store\n"
        "spool = store.Spool(Path(sys.argv[1]), 'f00d', (3, 2, 20, 4))\n"
        "spool.put(0, np.ones((3, 2, 8, 4), np.float32))\n"
        "os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "0-of-1.parquet"], cwd=ROOT)
    assert ran.returncode == -9
    assert spool(tmp_path).done == 8


def test_a_spool_of_another_fingerprint_is_swept_away_and_those_of_other_items_are_not(tmp_path):
    other = store.Spool(tmp_path / "1-of-2.parquet", "f00d", SPOOLED)
    other.put(0, some(8))
    spool(tmp_path, "dead").put(0, some(8))
    assert spool(tmp_path, "beef").done == 0
    assert names(tmp_path) == [".0-of-1.parquet.beef.spool", ".1-of-2.parquet.f00d.spool"]
    assert other.done == 8


def test_a_spool_of_another_size_is_begun_again(tmp_path):
    spool(tmp_path).put(0, some(20))
    assert spool(tmp_path, shape=(3, 1, 20, 4)).done == 0


def test_a_removed_spool_leaves_nothing(tmp_path):
    made = spool(tmp_path)
    made.remove()
    made.remove()
    assert names(tmp_path) == []


def test_a_full_disk_is_noticed_before_a_spool_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=store.HEADROOM))
    with pytest.raises(OSError, match="Free some space"):
        spool(tmp_path)
    assert names(tmp_path) == []


# Damage.


def flipped(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def content(path):
    with store.arrays(path, AXES) as file:
        return dict(file.attrs), file["activation"][:].tobytes()


def test_a_flipped_bit_of_arrays_is_noticed_wherever_it_matters(tmp_path):
    path = h5(tmp_path / "a.h5", model="tiny", first=0)
    whole, expected, noticed = path.read_bytes(), content(path), 0
    for place in range(0, len(whole), 29):
        flipped(path, place, place % 8)
        try:
            found = content(path)
        except ValueError as error:
            found, noticed = str(error), noticed + 1
        assert found == expected or ("a.h5" in found and "Delete it and run again" in found), (place, found)
        path.write_bytes(whole)
    assert noticed > len(whole) / 29 / 4


def test_a_flipped_bit_of_a_chunk_names_its_file_where_several_are_open(tmp_path):
    whole, broken = h5(tmp_path / "whole.h5"), h5(tmp_path / "broken.h5")
    with h5py.File(broken) as file:
        place = file["activation"].id.get_chunk_info(1).byte_offset
    flipped(broken, place)

    def read():
        with store.arrays(broken, AXES) as one, store.arrays(whole, AXES) as other:
            assert (other["activation"][:8] == one["activation"][:8]).all()
            return one["activation"][:]

    with pytest.raises(ValueError, match=r"broken\.h5 is damaged .*Delete it and run again"):
        read()


def test_errors_that_have_nothing_to_do_with_the_file_pass(tmp_path):
    with pytest.raises(OSError, match="of its own"), store.arrays(h5(tmp_path / "a.h5"), AXES):
        raise OSError("of its own")


@pytest.mark.parametrize("name", ["a.parquet", "a.safetensors"])
def test_every_flipped_byte_of_a_table_or_of_weights_is_noticed(tmp_path, name):
    path = WRITERS[name](tmp_path / name)
    whole = path.read_bytes()
    assert seals.verified(path) == path
    for place in range(len(whole)):
        flipped(path, place, place % 8)
        with pytest.raises(ValueError, match=rf"{name}.*Delete it and run again"):
            seals.verified(path)
        path.write_bytes(whole)


def test_a_small_table_is_current_only_where_all_of_it_is_as_it_was_written(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet")
    assert store.is_current(path, "f00d")
    flipped(path, 8)
    assert not store.is_current(path, "f00d")
    monkeypatch.setattr(store, "SMALL", 10)
    assert store.is_current(path, "f00d")  # the stage that reads it says so


def test_datasets_of_another_kind_are_refused(tmp_path):
    axes, shapes = (
        {"token": "seq pos", "activation": "seq pos d"},
        {"token": (4, 3), "activation": ((4, 3, 2), "int32")},
    )
    with store.new_arrays(tmp_path / "a.h5", "f00d", axes, shapes):
        pass
    for name, message in (("token", "'token' holds float32, expected int32"), ("activation", "int32, expected floats")):
        with (
            pytest.raises(ValueError, match=f"{message}. Delete it"),
            store.arrays(tmp_path / "a.h5", {name: axes[name]}),
        ):
            pass


def test_datasets_that_disagree_about_an_axis_are_refused(tmp_path):
    axes, shapes = AXES | {"ce": "seq pos"}, SHAPES | {"ce": (20, 5)}
    with store.new_arrays(tmp_path / "a.h5", "f00d", axes, shapes):
        pass
    with pytest.raises(ValueError, match=r"a\.h5: 'ce' has 5 along 'pos', .* 4"), store.arrays(tmp_path / "a.h5", AXES):
        pass


def unfinished(folder):
    (path,) = folder.glob("*.unfinished")
    return path


@pytest.mark.parametrize("damage", ["truncated", "flipped", "mark"])
def test_a_damaged_unfinished_file_is_begun_again(tmp_path, monkeypatch, damage):
    stop_halfway(tmp_path / "a.h5", monkeypatch)
    path = unfinished(tmp_path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "flipped":
        with h5py.File(path) as file:
            place = file["activation"].id.get_chunk_info(0).byte_offset
        flipped(path, place)
    else:
        (tmp_path / ".a.h5.f00d.done").write_text("")
    with begin(tmp_path / "a.h5") as made:
        assert made.done == 0
        made.file["activation"][:] = 4
    assert (np.frombuffer(content(tmp_path / "a.h5")[1], np.float32) == 4).all()


def test_chunks_that_were_torn_after_the_mark_are_written_again(tmp_path, monkeypatch):
    stop_halfway(tmp_path / "a.h5", monkeypatch)
    with h5py.File(unfinished(tmp_path)) as file:
        places = [file["activation"].id.get_chunk_info(i).byte_offset for i in (1, 2)]
    for place in places:
        flipped(unfinished(tmp_path), place)
    with begin(tmp_path / "a.h5") as made:
        assert made.done == 8
        made.file["activation"][8:12] = 3
        made.file["activation"][12:] = 4  # both are parts of chunks
    with store.arrays(tmp_path / "a.h5", AXES) as file:
        assert file["activation"][:, 0, 0].tolist() == [1] * 8 + [3] * 4 + [4] * 8


# Other processes.

HOLD = """
import sys, time
from pathlib import Path
from pipeline import locks
with locks.alone([Path(sys.argv[1])]):
    print("held", flush=True)
    sys.stdin.read()
    Path(sys.argv[1]).write_text("made")
"""


def other_process(code, *arguments):
    """It has said its first word."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, **pipes)
    assert process.stdout.readline()
    return process


def test_a_file_that_another_process_makes_is_waited_for(tmp_path):
    other = other_process(HOLD, tmp_path / "a")
    threading.Timer(0.5, other.stdin.close).start()
    with locks.alone([tmp_path / "a"]) as waited:
        assert waited
        assert (tmp_path / "a").read_text() == "made"
    assert other.wait() == 0
    assert names(tmp_path) == ["a"]


def test_a_killed_process_holds_nothing(tmp_path):
    other = other_process(HOLD, tmp_path / "a")
    other.kill()
    other.wait()
    with locks.alone([tmp_path / "a"]) as waited:
        assert not waited
    assert names(tmp_path) == []


def test_locks_of_killed_runs_are_removed_and_those_of_live_ones_are_not(tmp_path):
    code = "import sys; from pathlib import Path; from pipeline import locks\n"
    code += "alive = locks.unlocked(Path(sys.argv[1])); print('alive', flush=True); sys.stdin.read()"
    other = other_process(code, tmp_path)
    for name in ("locks/0.output.lock", "incomplete/ab/cd"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("results/a.h5")
    locks.unlocked(tmp_path).close()
    assert (tmp_path / "locks/0.output.lock").exists()
    other.kill()
    other.wait()
    with locks.unlocked(tmp_path):
        assert not (tmp_path / "locks/0.output.lock").exists()
        assert not (tmp_path / "incomplete/ab/cd").exists()
