"""`dwindle report` rebuilds a report, shows an unfinished search, and serves one folder's report and nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import dwindle as dw
from dwindle.cli import main
from dwindle.compressing import Goals, Plan, store
from dwindle.errors import ConfigError, DataError
from dwindle.reporting import read_state, rebuild_report, render_html
from dwindle.reporting.serving import report_server


@pytest.fixture(scope="module")
def finished(trained, digits, tmp_path_factory):
    """The out folder of a small run whose size goal is missed."""
    (x, y), (x_test, y_test) = digits
    out = tmp_path_factory.mktemp("report") / "out"
    plan = Plan.from_dict({"name": "half", "steps": [{"export": {"scheme": "int4"}}]})
    dw.compress(
        trained, (x[:300], y[:300]), (x[300:500], y[300:500]), Goals(max_drop="50%", max_size="1KB"), out,
        test=(x_test, y_test), plan=plan,
    )  # fmt: skip
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    folder = tmp_path / "running"
    shutil.copytree(finished, folder)
    for name in ("report.json", "report.html", "model-card.md"):
        (folder / name).unlink()
    return folder


def again(folder, number=2, **changes):
    """Make one more trial like the last."""
    record = {**store.read_trials(folder)[1], "id": f"{number:03d}", **changes}
    with contextlib.closing(sqlite3.connect(folder / store.DATABASE)) as database, database:
        database.execute("insert or replace into trials values (?, ?)", (number, json.dumps(record)))


def test_a_run_has_all_the_evidence_and_stays_small(finished):
    report = json.loads((finished / "report.json").read_text())
    assert (finished / "report.json").stat().st_size < 300_000
    evidence = report["evidence"]
    assert sum(row["samples"] for row in evidence["classes"]["rows"]) == 600
    assert evidence["changed"]["worse"] == report["confidence"]["only_before"]
    assert evidence["changed"]["better"] == report["confidence"]["only_after"]
    assert {row["name"] for row in evidence["operators"]["rows"]} >= {"conv", "hidden", "digit"}
    assert len(report["model"]["sha256"]) == 64
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(evidence["changed"]["examples"])
    assert "The size goal of 1KB is beyond what 1 file reached" in page
    assert "conv" in page
    assert "The size goal of 1KB" in (finished / "model-card.md").read_text()


def test_report_rebuilds_the_same_bytes(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = {name: (folder / name).read_bytes() for name in ("report.html", "model-card.md", "report.json")}
    for name in ("report.html", "model-card.md"):
        (folder / name).write_text("gone")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "report.html"), str(folder / "model-card.md")]
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_an_unfinished_search_is_shown_as_it_is(unfinished):
    state = read_state(unfinished)
    assert state["status"] == "running"
    assert [trial["id"] for trial in state["trials"]] == ["000", "001"]
    assert state["baseline"]["id"] == "000"
    assert state["result"] is None
    page, _ = rebuild_report(unfinished)
    assert "Running: 2 files measured, none meets the goals yet." in page.read_text()
    again(unfinished, 1, meets=True)
    assert read_state(unfinished)["result"]["id"] == "001"
    assert "this is the best so far" in rebuild_report(unfinished)[0].read_text()


def test_trials_made_after_the_report_are_shown(finished, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(finished, folder)
    assert read_state(folder)["status"] == "not met"
    again(folder)
    state = read_state(folder)
    assert state["status"] == "running"
    assert [trial["id"] for trial in state["trials"]] == ["000", "001", "002"]
    assert state["model"]["name"] == "small_cnn"
    write = (folder / "report.json").read_text()
    (folder / "report.json").write_text(write)  # written after the trial: of a shorter search in the same folder
    assert read_state(folder)["status"] == "not met"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no report.json and no trials"),
        ("{", "can't be read"),
        ('{"version": 7}', "has version 7"),
        ("[]", "has version None"),
    ],
)
def test_a_folder_without_a_report_is_one_line_and_status_2(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_other_bad_arguments(finished, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["report", str(finished), "--port", "80"]) == 2
    assert "--serve" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="between 0 and 65535"):
        report_server(finished, 70000)
    with pytest.raises(DataError):
        report_server(tmp_path)
    (tmp_path / store.DATABASE).write_text("no database")
    with pytest.raises(DataError, match="can't be read"):
        read_state(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="can't be had"):
            report_server(finished, taken.getsockname()[1])


@pytest.fixture
def asked(unfinished):
    """Ask a server of the unfinished folder: status, content, headers."""
    server = report_server(unfinished, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        found = answer.status, answer.read().decode(), answer.headers
        connection.close()
        return found

    ask.server = server
    yield ask
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_server_shows_the_report_and_what_changes(asked, unfinished):
    assert asked.server.server_address[0] == "127.0.0.1"
    status, page, headers = asked("/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    mark = asked("/state")[1]
    assert page == render_html(read_state(unfinished), live=mark)
    assert "Running: 2 files" in page
    assert json.loads(asked("/report.json")[1]) == read_state(unfinished)
    again(unfinished)
    assert asked("/state")[1] != mark
    assert "Running: 3 files" in asked("/?again")[1]
    assert asked("/", "HEAD")[:2] == (200, "")


@pytest.mark.parametrize(
    "path",
    [
        "/model.keras",
        "/trials/000/model.tflite",
        "/../out/report.json",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/report.html/..",
        "/%00",
        "*",
    ],
)
def test_the_server_has_nothing_else(asked, path):
    status, text, _ = asked(path)
    assert (status, text) == (404, "there is only the report, at /\n")


def test_other_sites_and_methods_are_refused(asked):
    assert asked("/", Host="evil.example")[0] == 403
    assert asked("/", Host="localhost:80")[0] == 200
    assert asked("/", "POST")[0] == 501


def test_a_report_that_is_broken_for_now_is_no_crash(asked, unfinished):
    (unfinished / "report.json").write_text("{")
    assert asked("/")[0] == 503
    (unfinished / "report.json").unlink()
    assert asked("/")[0] == 200


def test_the_command_serves_until_it_is_interrupted_without_importing_keras(finished):
    code = (
        # What runs in the background of a shell ignores interrupts, and so does what it starts.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from dwindle.cli import main; status = main(sys.argv[1:]); "
        "assert not {'keras', 'tensorflow'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "report", "--serve", str(finished), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            port = int(line.split("127.0.0.1:")[1].split("/")[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/")
            assert "Every file that was measured" in connection.getresponse().read().decode()
            connection.close()
            time.sleep(0.2)
            process.send_signal(2)
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0, error
    assert error == ""
