"""A page as a static Space: what is sent, and what stays."""

import os

import pytest
from hub_server import Fault
from huggingface_hub import HfApi

from llama_lite.errors import Refusal
from llama_lite.hub.space import push_page


@pytest.fixture
def page(tmp_path):
    """A page with data, as the report writes it."""
    path = tmp_path / "report.html"
    path.write_text(
        '<title>demo: "report"</title><script type="application/json" id="data">{"runs":[{"name":"x"}]}</script>'
    )
    return path


def test_a_page_becomes_a_static_space_and_is_replaced(hub, page):
    address = push_page("owner/first-report", page)
    assert address == f"{hub.url}/spaces/owner/first-report"
    files = hub.files("owner/first-report", kind="spaces")
    assert files["index.html"] == page.read_bytes()
    readme = files["README.md"].decode()
    assert "\nsdk: static\n" in readme and "\napp_file: index.html\n" in readme
    assert 'title: "demo: \\"report\\""' in readme
    page.write_text(page.read_text() + "<p>more</p>")
    push_page("owner/first-report", page)
    assert hub.files("owner/first-report", kind="spaces")["index.html"] == page.read_bytes()
    count = len(hub.repos["spaces", "owner/first-report"].commits)
    push_page("owner/first-report", page)
    assert len(hub.repos["spaces", "owner/first-report"].commits) == count


def test_what_others_wrote_stays(hub, page):
    push_page("owner/edited", page)
    mine = b"---\ntitle: Mine\nsdk: static\n---\nmy words\n"
    HfApi().upload_file(
        path_or_fileobj=mine,
        path_in_repo="README.md",
        repo_id="owner/edited",
        repo_type="space",
        commit_message="words",
    )
    page.write_text(page.read_text() + "<p>more</p>")
    push_page("owner/edited", page)
    files = hub.files("owner/edited", kind="spaces")
    assert files["README.md"] == mine and files["index.html"] == page.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", b"---\nsdk: gradio\n---\n", r"a Space of another kind \(gradio\)"),
        ("index.html", b"<p>a game</p>", "a page of somebody else"),
    ],
)
def test_a_space_of_somebody_else_is_refused(hub, page, name, content, message):
    repo = f"owner/other-{name.split('.')[0].lower()}"
    HfApi().create_repo(repo, repo_type="space", space_sdk="static")
    HfApi().upload_file(
        path_or_fileobj=content, path_in_repo=name, repo_id=repo, repo_type="space", commit_message="mine"
    )
    with pytest.raises(Refusal, match=message):
        push_page(repo, page)
    assert hub.files(repo, kind="spaces")[name] == content


def test_a_space_that_moves_meanwhile_is_tried_again(hub, page):
    hub.faults.append(Fault(r"POST .*spaces.*/commit/", 412, times=2))
    push_page("owner/busy", page)
    assert hub.files("owner/busy", kind="spaces")["index.html"] == page.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<p>{cwd}/x</p>", "a path of this machine"),
        ('<script type="application/json" id="data">{{"user":"{user}"}}</script>', "the name of this machine or its"),
        ("<p>a-secret-of-mine</p>", "a token of this machine"),
    ],
)
def test_a_page_with_something_private_is_not_sent(hub, page, monkeypatch, text, message):
    monkeypatch.setenv("USER", "zaphod")
    monkeypatch.setenv("A_TOKEN", "a-secret-of-mine")
    page.write_text(text.format(cwd=os.getcwd(), user="zaphod"))
    with pytest.raises(Refusal, match=message):
        push_page("owner/private", page)
    assert ("spaces", "owner/private") not in hub.repos


@pytest.mark.parametrize(
    ("repo", "message"),
    [("no name", "is not a name on the Hub"), ("nobody/x", "nobody/x: .*The page is kept; run the same command again")],
)
def test_a_name_that_cannot_be_is_refused(hub, page, repo, message):
    with pytest.raises(Refusal, match=message):
        push_page(repo, page)


def test_without_a_token_nothing_is_asked(hub, page, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    with pytest.raises(Refusal, match="needs a token"):
        push_page("owner/x", page)
    assert len(hub.requests) == asked
