"""A stage refuses what was planned for other code or made with other settings, and says so without a traceback."""

import io
import json
import logging
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from fakes import ROOT
from snakemake.shell import shell

from pipeline import fingerprint, locks, stage, store


def array(path, mark, name="mean", axes="d", values=(1.0,), **attributes):
    values = np.asarray(values)
    with store.new_arrays(path, mark, {name: axes}, {name: (values.shape, str(values.dtype))}, **attributes) as file:
        file[name][:] = values
    return path


def job(path, inputs=(), stage="moments", names=(), mark="ffff", **key):
    """An item as planned; `inputs` are (role, path, fingerprint)."""
    code = fingerprint.code_digest(stage, frozenset(names))
    told = {"stage": stage, "key": key or {"model": "tiny"}, "settings": {"seed": 3}, "names": list(names)}
    given = [[role, str(name), expected] for role, name, expected in inputs]
    told |= {"needed_by": [], "drop": []}
    return told | {"inputs": given, "path": str(path), "code": code, "fingerprint": mark}


@pytest.fixture
def asked(tmp_path):
    """An item of a stage with an input and two shards of another, and the files of these inputs."""
    files = [array(tmp_path / f"{mark}.h5", mark) for mark in ("aaaa", "bbbb", "cccc")]
    roles = ("tokens", "activations", "activations")
    return job(tmp_path / "made.h5", zip(roles, files, ("aaaa", "bbbb", "cccc"), strict=True)), files


def start(monkeypatch, items, work, name="moments", options=(), out="new.h5", run=stage.run):
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *options])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(items)))
    run(name, work)


def refused(monkeypatch, caplog, items, work=None, name="moments", **options):
    """The last message of a run that ends with status 1; the work is not begun unless it is given."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, items, work or (lambda call: pytest.fail("The work was begun.")), name, **options)
    *_, record = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (ended.value.code, record.exc_info) == (1, None)
    assert ended.value.__suppress_context__
    return record.getMessage()


def test_the_work_is_told_what_was_planned_and_given_its_files_by_role(monkeypatch, asked):
    item, files = asked
    calls = []
    options = ["--threads", "2", "--device", "cuda:0", "--budget", "7"]
    start(monkeypatch, [item | {"key": {"sae": "early", "shard": "0-of-1"}}], calls.append, options=options)
    (call,) = calls
    assert (call.settings, call.fingerprint, call.name) == ({"seed": 3}, "ffff", "early 0-of-1")
    assert call.inputs == {"tokens": files[:1], "activations": files[1:]}
    assert (call.input("tokens"), call.threads, call.device, call.budget) == (files[0], 2, "cuda:0", 7)


def test_a_stage_of_one_item_writes_where_the_command_line_says(monkeypatch, asked):
    calls = []
    start(monkeypatch, [asked[0]], calls.append, out="a.h5", options=["b.h5"])  # the report has two files, for one
    assert [str(path) for path in calls[0].outputs] == ["a.h5", "b.h5"]


def test_code_that_changed_after_planning_is_refused(monkeypatch, caplog, asked):
    message = refused(monkeypatch, caplog, [asked[0] | {"code": "0" * 16}])
    assert "The source of 'moments' changed after this job was planned. Run snakemake again." in message


def test_the_functions_that_a_job_names_are_part_of_its_code(monkeypatch, caplog, tmp_path):
    item = job(tmp_path / "made.h5", stage="ablations", names=["zero"])
    calls = []
    start(monkeypatch, [item], calls.append, name="ablations")
    assert len(calls) == 1
    message = refused(monkeypatch, caplog, [item | {"names": ["mean"]}], name="ablations")
    assert "changed after this job was planned" in message


def test_a_job_of_another_stage_is_refused(monkeypatch, caplog, asked):
    message = refused(monkeypatch, caplog, [asked[0]], name="summary")
    assert "A job of the stage 'moments' was given to 'summary'" in message


def test_an_input_that_was_made_with_other_settings_is_named_and_refused(monkeypatch, caplog, asked):
    item, files = asked
    array(files[2], "dddd")
    message = refused(monkeypatch, caplog, [item])
    assert f"{files[2]} has the fingerprint dddd, expected cccc" in message
    assert "Delete it and run again" in message


def test_a_missing_input_is_named(monkeypatch, caplog, asked):
    item, files = asked
    files[1].unlink()
    message = refused(monkeypatch, caplog, [item])
    assert f"The input '{files[1]}' of 'moments' is missing. Run snakemake again" in message


def test_a_damaged_input_is_named(monkeypatch, caplog, asked):
    item, files = asked
    files[1].write_bytes(files[1].read_bytes()[:100])
    message = refused(monkeypatch, caplog, [item])
    assert f"{files[1]} can't be read" in message
    assert "Delete it" in message


def test_a_table_with_a_flipped_bit_is_named(monkeypatch, caplog, tmp_path):
    path = tmp_path / "effects.parquet"
    store.write_table(path, [pa.table({"kl": [0.5, 1.0]})], "aaaa", {})
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    message = refused(monkeypatch, caplog, [job(tmp_path / "made.h5", [("effects", path, "aaaa")])])
    assert f"{path} is damaged: its checksum is not that of its content. Delete it and run again." in message


def test_what_another_process_made_in_the_meantime_is_left_alone(monkeypatch, tmp_path):
    item, calls = job(tmp_path / "made.h5"), []

    @contextmanager
    def waited(paths):
        array(*paths, "ffff")
        yield True

    monkeypatch.setattr(locks, "alone", waited)
    start(monkeypatch, [item], calls.append, out=tmp_path / "made.h5")
    assert calls == []
    start(monkeypatch, [item], calls.append, out=tmp_path / "made.h5", options=[str(tmp_path / "lost.svg")])
    start(monkeypatch, [item | {"fingerprint": "eeee"}], calls.append, out=tmp_path / "made.h5")
    assert len(calls) == 2


@pytest.mark.parametrize("kind", [ValueError, OSError])
@pytest.mark.parametrize("run", [stage.run, stage.run_batch])
def test_what_the_user_can_mend_is_a_message_and_status_1(monkeypatch, caplog, asked, kind, run):
    def work(call):
        raise kind("The corpus is too short. Use a longer one.")

    message = refused(monkeypatch, caplog, [asked[0]], work, run=run)
    assert message == "error: The corpus is too short. Use a longer one."


@pytest.mark.parametrize("run", [stage.run, stage.run_batch])
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, asked, run):
    with pytest.raises(KeyError, match="colour"):
        start(monkeypatch, [asked[0]], lambda given: {}["colour"], run=run)


def test_a_started_stage_says_in_its_log_what_is_wrong_and_writes_nothing(tmp_path):
    tokens = array(tmp_path / "tokens.h5", "aaaa", "special", "seq pos", np.ones((2, 3), bool))
    item = job(tmp_path / "moments.h5", [("tokens", tokens, "aaaa")], hook="h")
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline.moments", "--out", tmp_path / "moments.h5"],
        input=json.dumps([item]),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "tokens.h5: all 6 tokens are special" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.h5"]


def test_a_job_may_be_longer_than_an_argument_of_a_command(tmp_path, monkeypatch):
    """Written to the stage as the rules do it, by Snakemake's own shell."""
    monkeypatch.chdir(tmp_path)
    shell.executable("bash")
    inputs = [("activations", f"results/it's {number}.h5", "aaaa") for number in range(10_000)]
    item = json.dumps([job(tmp_path / "moments.h5", inputs)])
    with pytest.raises(subprocess.CalledProcessError):
        shell(
            f"PYTHONPATH={ROOT} {sys.executable} -m pipeline.moments --out moments.h5 <<< {{item:q}} > log 2>&1",
            item=item,
        )
    assert len(item) > 2**18
    assert "results/it's 0.h5' of 'moments' is missing" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("run", [stage.run, stage.run_batch])
@pytest.mark.parametrize(("mark", "stays"), [("aaaa", False), ("bbbb", True)])
def test_the_last_that_needed_an_input_drops_it(tmp_path, monkeypatch, run, mark, stays):
    """That is where all that is made from it is there with the fingerprint that was planned."""
    large, last = array(tmp_path / "large.h5", "1a46e"), array(tmp_path / "last.h5", "ffff")
    other = array(tmp_path / "other.h5", "aaaa")
    item = job(last, [("activations", large, "1a46e")])
    item["drop"] = [[str(large), [[str(last), "ffff"], [str(other), mark]]]]
    start(monkeypatch, [item], lambda call: None, run=run, out=tmp_path / "new.h5")
    assert large.exists() == stays


def test_what_fails_drops_nothing(tmp_path, monkeypatch, caplog):
    large, last = array(tmp_path / "large.h5", "1a46e"), array(tmp_path / "last.h5", "ffff")
    item = job(last, [("activations", large, "1a46e")]) | {"drop": [[str(large), [[str(last), "ffff"]]]]}

    def work(call):
        raise ValueError("no")

    assert refused(monkeypatch, caplog, [item], work) == "error: no"
    assert large.exists()


@pytest.mark.parametrize(("mark", "asked_for"), [("aaaa", []), ("bbbb", ["0.h5"])])
def test_a_dropped_item_is_made_only_while_something_needs_it(tmp_path, monkeypatch, mark, asked_for):
    made = array(tmp_path / "made.h5", "aaaa")
    item = job(tmp_path / "0.h5") | {"needed_by": [[str(made), mark]]}
    found = []

    def work(calls):
        found.extend(call.output.name for call in calls)

    start(monkeypatch, [item], work, run=stage.run_batch, out=tmp_path / "stamp.json")
    assert found == asked_for


# Stages that make several items a job.


class Maker:
    """Work that writes the file of each item, and notes which were asked for together; `bad` ones raise."""

    def __init__(self, *bad, error=ValueError):
        self.bad, self.error, self.asked = bad, error, []

    def __call__(self, calls):
        self.asked.append([call.key["sae"] for call in calls])
        for call in calls:
            if call.key["sae"] in self.bad:
                raise self.error(f"{call.key['sae']} is bad.")
            array(call.output, call.fingerprint)


@pytest.fixture
def three(tmp_path):
    """Three items of a batch."""
    return [job(tmp_path / f"{sae}.h5", mark=sae * 4, sae=sae) for sae in "abc"]


def start_batch(monkeypatch, tmp_path, items, work):
    start(monkeypatch, items, work, out=tmp_path / "stamps/0.json", run=stage.run_batch)


def test_a_batch_makes_all_its_items_at_once_and_then_its_stamp(monkeypatch, tmp_path, three):
    work = Maker()
    start_batch(monkeypatch, tmp_path, three, work)
    assert work.asked == [["a", "b", "c"]]
    stamp = json.loads((tmp_path / "stamps/0.json").read_text())
    assert stamp == {str(tmp_path / f"{sae}.h5"): sae * 4 for sae in "abc"}


@pytest.mark.parametrize(
    ("left", "again"),
    [
        ({"a": "aaaa", "c": "cccc"}, [["b"]]),  # missing
        ({"a": "aaaa", "b": "beef", "c": "cccc"}, [["b"]]),  # made for something else
        ({"c": "cccc"}, [["a", "b"]]),
        ({sae: sae * 4 for sae in "abc"}, []),
    ],
)
def test_items_whose_file_is_current_are_left_alone(monkeypatch, tmp_path, three, left, again):
    before = {name: array(tmp_path / f"{name}.h5", mark).stat().st_mtime_ns for name, mark in left.items()}
    work = Maker()
    start_batch(monkeypatch, tmp_path, three, work)
    assert work.asked == again
    assert all(store.is_current(tmp_path / f"{sae}.h5", sae * 4) for sae in "abc")
    kept = before.keys() - {name for names in again for name in names}
    assert all((tmp_path / f"{name}.h5").stat().st_mtime_ns == before[name] for name in kept)
    assert (tmp_path / "stamps/0.json").exists()


def test_a_damaged_item_is_made_again(monkeypatch, tmp_path, three):
    start_batch(monkeypatch, tmp_path, three, Maker())
    (tmp_path / "b.h5").write_bytes(b"half a file")
    work = Maker()
    start_batch(monkeypatch, tmp_path, three, work)
    assert work.asked == [["b"]]


def test_one_bad_item_does_not_stop_the_others_and_is_named(monkeypatch, caplog, tmp_path, three):
    work = Maker("b")
    message = refused(monkeypatch, caplog, three, work, out=tmp_path / "stamps/0.json", run=stage.run_batch)
    assert message == "error: b: b is bad."
    assert work.asked == [["a", "b", "c"], ["b"], ["c"]]  # `a` was made before `b` failed
    assert [store.is_current(tmp_path / f"{sae}.h5", sae * 4) for sae in "abc"] == [True, False, True]
    assert not (tmp_path / "stamps").exists()


def test_all_bad_items_are_named_at_once(monkeypatch, caplog, tmp_path, three):
    work = Maker("a", "c")
    message = refused(monkeypatch, caplog, three, work, out=tmp_path / "stamps/0.json", run=stage.run_batch)
    assert message == "error: a: a is bad.\nc: c is bad."


def test_items_are_not_tried_alone_where_the_disk_is_full(monkeypatch, caplog, tmp_path, three):
    work = Maker("a", error=OSError)
    message = refused(monkeypatch, caplog, three, work, out=tmp_path / "stamps/0.json", run=stage.run_batch)
    assert (message, work.asked) == ("error: a is bad.", [["a", "b", "c"]])


def test_an_old_stamp_is_replaced(monkeypatch, tmp_path, three):
    start_batch(monkeypatch, tmp_path, three[:1], Maker())
    start_batch(monkeypatch, tmp_path, three, Maker())
    assert len(json.loads((tmp_path / "stamps/0.json").read_text())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"code": "0" * 16}, "changed after this job was planned"), ({"stage": "effects"}, "was given to 'moments'")],
)
def test_an_item_of_a_batch_is_checked_as_one_alone_is(monkeypatch, caplog, tmp_path, three, change, message):
    three[1] |= change
    assert message in refused(monkeypatch, caplog, three, out=tmp_path / "stamps/0.json", run=stage.run_batch)
