"""`python -m llama_lite report`: what it writes, says and refuses."""

import json

import pytest

from benchmarks.report import synthetic_run
from llama_lite.__main__ import main
from llama_lite.errors import Refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The records of a run of 60 steps with three evaluated revisions."""
    return synthetic_run(tmp_path_factory.mktemp("report") / "run", 60, 3, 8)


def test_the_page_is_written_into_its_folder_or_beside_several_or_where_asked(run, tmp_path, capsys, monkeypatch):
    main(["report", str(run)])
    assert capsys.readouterr().out.startswith(f"report    {run}/report.html (")
    main(["report", str(run), "--output", str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == (run / "report.html").read_bytes()
    main(["report", str(run), str(run.parent / "run-eval"), "--output", str(tmp_path / "deep" / "both.html")])
    assert "run, run-eval: report</title>" in (tmp_path / "deep" / "both.html").read_text()
    own = (run / "report.html").read_bytes()
    capsys.readouterr()
    main(["report", str(run), str(run.parent / "run-eval")])
    assert capsys.readouterr().out.startswith(f"report    {run.parent}/report.html (")
    assert (run / "report.html").read_bytes() == own  # the page of one run is not written over by that of several
    monkeypatch.chdir(run)
    main(["report", ".", "../run-eval"])
    assert (run / "report.html").read_bytes() == own


def test_what_cannot_have_a_page_is_refused_in_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([str(tmp_path / "none")], "none: no such folder. Give the folder of a run"),
        ([str(tmp_path)], "holds no records"),
        ([str(run), "--output", str(tmp_path / "file" / "x.html")], "Give another --output"),
        ([str(run), "--push_report"], "was not published, so its report has no name yet"),
        ([str(run), str(run), "--push_report"], "a page of 2 folders needs a name of its own"),
    ):
        with pytest.raises(Refusal, match=message):
            main(["report", *argv])


def test_a_published_run_has_a_space_beside_its_repository(run, hub, capsys):
    (run / "published.jsonl").write_text(
        json.dumps({"repo": "owner/run", "revision": "step-000060", "step": 60, "commit": "0", "state": False}) + "\n"
    )
    main(["report", str(run), "--push_report"])
    assert capsys.readouterr().out.endswith(f"hub       {hub.url}/spaces/owner/run-report\n")
    assert hub.files("owner/run-report", kind="spaces")["index.html"] == (run / "report.html").read_bytes()
    assert not hub.repos["spaces", "owner/run-report"].private
    main(["report", str(run), "--push_report", "org/secret", "--private"])
    assert hub.repos["spaces", "org/secret"].private
