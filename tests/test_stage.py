"""A stage refuses what was planned for other code or made with other settings, and says so without a traceback."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from fakes import ROOT

from pipeline import fingerprint, stage, store


def array(path, mark, name="mean", axes="d", values=(1.0,), **attributes):
    values = np.asarray(values)
    with store.new_arrays(path, mark, {name: axes}, {name: (values.shape, str(values.dtype))}, **attributes) as file:
        file[name][:] = values
    return path


@pytest.fixture
def asked(tmp_path):
    """The job of a stage with an input and two shards of another, as planned, and its files."""
    files = [array(tmp_path / f"{mark}.h5", mark) for mark in ("aaaa", "bbbb", "cccc")]
    job = {"stage": "moments", "key": {"model": "tiny"}, "settings": {"seed": 3}, "names": [], "fingerprint": "ffff"}
    job["inputs"] = [["tokens", "aaaa"], ["activations", "bbbb"], ["activations", "cccc"]]
    job["code"] = fingerprint.code_digest("moments")
    return job, files


def start(monkeypatch, job, files, work, name="moments", options=()):
    arguments = ["--job", json.dumps(job), "--in", *map(str, files), "--out", "new.h5", *options]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    stage.run(name, work)


def refused(monkeypatch, caplog, job, files, work=None, name="moments"):
    """The message of a run that ends with status 1; the work is not begun unless it is given."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, job, files, work or (lambda call: pytest.fail("The work was begun.")), name)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (ended.value.code, record.exc_info) == (1, None)
    assert ended.value.__suppress_context__
    return record.getMessage()


def test_the_work_is_told_what_was_planned_and_given_its_files_by_role(monkeypatch, asked):
    job, files = asked
    calls = []
    start(monkeypatch, job, files, calls.append, options=["--threads", "2", "--device", "cuda:0"])
    (call,) = calls
    assert (call.key, call.settings, call.fingerprint) == ({"model": "tiny"}, {"seed": 3}, "ffff")
    assert call.inputs == {"tokens": files[:1], "activations": files[1:]}
    assert (call.input("tokens"), str(call.output), call.threads, call.device) == (files[0], "new.h5", 2, "cuda:0")


def test_code_that_changed_after_planning_is_refused(monkeypatch, caplog, asked):
    job, files = asked
    message = refused(monkeypatch, caplog, job | {"code": "0" * 16}, files)
    assert "The source of 'moments' changed after this job was planned. Run snakemake again." in message


def test_the_functions_that_a_job_names_are_part_of_its_code(monkeypatch, caplog):
    job = {"stage": "ablations", "key": {}, "settings": {}, "inputs": [], "fingerprint": "ffff"}
    job["code"] = fingerprint.code_digest("ablations", frozenset({"zero"}))
    calls = []
    start(monkeypatch, job | {"names": ["zero"]}, [], calls.append, name="ablations")
    assert len(calls) == 1
    message = refused(monkeypatch, caplog, job | {"names": ["mean"]}, [], name="ablations")
    assert "changed after this job was planned" in message


def test_a_job_of_another_stage_is_refused(monkeypatch, caplog, asked):
    job, files = asked
    message = refused(monkeypatch, caplog, job, files, name="summary")
    assert "A job of the stage 'moments' was given to 'summary'" in message


def test_an_input_that_was_made_with_other_settings_is_named_and_refused(monkeypatch, caplog, asked):
    job, files = asked
    array(files[2], "dddd")
    message = refused(monkeypatch, caplog, job, files)
    assert f"{files[2]} has the fingerprint dddd, expected cccc" in message
    assert "Delete it and run again" in message


def test_inputs_in_another_order_are_refused(monkeypatch, caplog, asked):
    job, files = asked
    message = refused(monkeypatch, caplog, job, [files[0], files[2], files[1]])
    assert f"{files[2]} has the fingerprint cccc, expected bbbb" in message


def test_a_missing_input_is_named(monkeypatch, caplog, asked):
    job, files = asked
    files[1].unlink()
    message = refused(monkeypatch, caplog, job, files)
    assert f"The input '{files[1]}' of 'moments' is missing. Run snakemake again" in message


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_inputs_is_refused(monkeypatch, caplog, asked, count):
    job, files = asked
    message = refused(monkeypatch, caplog, job, (files + files)[:count])
    assert f"given {count} input files, but the job has 3" in message


def test_a_damaged_input_is_named(monkeypatch, caplog, asked):
    job, files = asked
    files[1].write_bytes(files[1].read_bytes()[:100])
    message = refused(monkeypatch, caplog, job, files)
    assert f"{files[1]} can't be read" in message
    assert "Delete it" in message


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_the_user_can_mend_is_a_message_and_status_1(monkeypatch, caplog, asked, kind):
    def work(call):
        raise kind("The corpus is too short. Use a longer one.")

    assert refused(monkeypatch, caplog, *asked, work) == "error: The corpus is too short. Use a longer one."


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, asked):
    with pytest.raises(KeyError, match="colour"):
        start(monkeypatch, *asked, lambda call: call.settings["colour"])


def test_a_started_stage_says_in_its_log_what_is_wrong_and_writes_nothing(tmp_path):
    tokens = array(tmp_path / "tokens.h5", "aaaa", "special", "seq pos", np.ones((2, 3), bool))
    job = {"stage": "moments", "key": {"hook": "h"}, "settings": {}, "names": [], "fingerprint": "ffff"}
    job |= {"inputs": [["tokens", "aaaa"]], "code": fingerprint.code_digest("moments")}
    files = ["--in", tokens, "--out", tmp_path / "moments.h5"]
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline.moments", "--job", json.dumps(job), *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "tokens.h5: all 6 tokens are special" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.h5"]
