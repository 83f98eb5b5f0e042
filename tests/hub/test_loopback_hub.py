"""The loopback Hub behaves as the Hub does, for the client as it is and over real HTTP."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ["HF_HUB_DISABLE_XET"] = "1"

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub
from tests.hub.distilgpt2 import DECOYS, seed_distilgpt2
from tests.hub.repository import File

# The client itself passes file objects to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HTTP: Any = importlib.import_module("httpx" if huggingface_hub.__version__.startswith("1.") else "httpx2")
REPO = "tester/model"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def plain_client() -> Iterator[None]:
    """The Hub's client as it is, whatever quantize has made of it in this process."""
    http = importlib.import_module("huggingface_hub.utils._http")
    own = http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(http.default_client_factory)
    yield
    huggingface_hub.set_client_factory(own)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub() as running:
        running.create_repo(REPO)
        yield running


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


def as_anybody(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=False)


def upload(api: HfApi, path: str, data: bytes, **options: Any) -> str:
    done = api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=REPO, **options)
    return str(done.oid)


Answer = tuple[int, dict[str, str], bytes]


def raw(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def refused(status: int, call: Callable[[], object]) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as problem:
        call()
    assert problem.value.response.status_code == status
    return problem.value


def asked(hub: LoopbackHub, method: str, part: str) -> list[int]:
    return [r.status for r in hub.requests if r.method == method and part in r.path]


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_token_says_who_and_with_what_right(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_user("member", "hf_member", orgs=["laboratory"])
    hub.add_user("late", "hf_late", role="expired")
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert api.whoami(READ_TOKEN)["name"] == "reader"
    assert [org["name"] for org in api.whoami("hf_member")["orgs"]] == ["laboratory"]
    for token in ("hf_late", "hf_unknown"):
        refused(401, lambda token=token: api.whoami(token))  # type: ignore[misc]
    assert all(record.authorized for record in hub.requests)
    assert "hf_" not in repr(hub.requests)


def test_who_may_create_a_repository(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_user("member", "hf_member", orgs=["laboratory"])
    url = api.create_repo("tester/new", private=True)
    assert (str(url), url.repo_id) == (f"{hub.endpoint}/tester/new", "tester/new")
    assert api.create_repo("short-name").repo_id == "tester/short-name"
    assert api.create_repo("laboratory/new", token="hf_member").repo_id == "laboratory/new"
    refused(409, lambda: api.create_repo("tester/new"))
    assert api.create_repo("tester/new", exist_ok=True).repo_id == "tester/new"
    refused(403, lambda: api.create_repo("somebody/new"))
    refused(403, lambda: api.create_repo("reader/new", token=READ_TOKEN))
    refused(401, lambda: as_anybody(hub).create_repo("tester/newer"))
    assert [commit.title for commit in hub.log("tester/new")] == ["initial commit"]


def test_a_deleted_repository_is_gone(hub: LoopbackHub, api: HfApi) -> None:
    refused(403, lambda: api.delete_repo(REPO, token=READ_TOKEN))
    api.delete_repo(REPO)
    with pytest.raises(LookupError):
        hub.head(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_read_token_cannot_write(hub: LoopbackHub) -> None:
    hub.add_user("tester", "hf_own_but_read", role="read")
    before = hub.head(REPO)
    for token in (READ_TOKEN, "hf_own_but_read"):
        api = HfApi(endpoint=hub.endpoint, token=token)
        refused(403, lambda api=api: upload(api, "a.txt", b"a"))  # type: ignore[misc]
        refused(403, lambda api=api: upload(api, "a.txt", b"a", create_pr=True))  # type: ignore[misc]
        refused(403, lambda api=api: api.create_tag(REPO, tag="v1"))  # type: ignore[misc]
        refused(403, lambda api=api: api.auth_check(REPO, write=True))  # type: ignore[misc]
        api.auth_check(REPO)
    with pytest.raises(RepositoryNotFoundError):
        upload(as_anybody(hub), "a.txt", b"a")
    assert hub.head(REPO) == before
    assert hub.log(REPO, "main")[0].title == "initial commit"


def test_a_private_repository_does_not_exist_for_others(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.create_repo("tester/secret", private=True)
    hub.commit("tester/secret", {"a.txt": b"a"})
    assert api.model_info("tester/secret").private
    for other, status in ((as_anybody(hub), 401), (HfApi(endpoint=hub.endpoint, token=READ_TOKEN), 404)):
        with pytest.raises(RepositoryNotFoundError) as problem:
            other.model_info("tester/secret")
        assert problem.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            other.snapshot_download("tester/secret", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/absent")


def test_a_gated_repository_shows_its_list_and_keeps_its_files(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create_repo("somebody/gated", gated=True)
    hub.commit("somebody/gated", {"a.txt": b"a"})
    for api in (as_anybody(hub), HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)):
        assert api.model_info("somebody/gated").gated == "auto"
        assert "a.txt" in api.list_repo_files("somebody/gated")
        with pytest.raises(GatedRepoError):
            api.auth_check("somebody/gated")
        with pytest.raises((GatedRepoError, LocalEntryNotFoundError)) as problem:
            api.hf_hub_download("somebody/gated", "a.txt", cache_dir=tmp_path)
        assert GatedRepoError in (type(problem.value), type(problem.value.__cause__))
    assert hub.downloaded("somebody/gated") == set()


def test_small_files_are_committed_and_large_ones_go_to_the_storage(hub: LoopbackHub, api: HfApi) -> None:
    before = hub.head(REPO)
    sha = api.create_commit(
        REPO,
        [
            CommitOperationAdd("notes/a.txt", b"text"),
            CommitOperationAdd("empty.bin", b""),
            CommitOperationAdd("model.safetensors", WEIGHTS),
            CommitOperationAdd("long.txt", b"x" * 1_000_001),
        ],
        commit_message="Add files",
        commit_description="four of them",
    ).oid
    newest, oldest = hub.log(REPO)
    assert (newest.sha, newest.parent, newest.message) == (sha, before, "Add files\n\nfour of them")
    assert (oldest.sha, oldest.parent) == (before, None)
    files = hub.files(REPO)
    assert (files["notes/a.txt"], files["empty.bin"], files["model.safetensors"]) == (b"text", b"", WEIGHTS)
    puts = [record for record in hub.requests if record.method == "PUT"]
    assert len(puts) == 2
    assert not any(record.authorized for record in puts)
    assert asked(hub, "POST", "/objects/verify") == [200, 200]


def test_what_is_there_already_is_not_committed_again(hub: LoopbackHub, api: HfApi) -> None:
    first = [upload(api, "a.txt", b"a"), upload(api, "model.safetensors", WEIGHTS)][-1]
    assert upload(api, "a.txt", b"a") == first
    assert upload(api, "model.safetensors", WEIGHTS) == first
    assert len(asked(hub, "POST", "/commit/")) == 2
    assert len(asked(hub, "PUT", "/lfs/")) == 1
    upload(api, "copy.safetensors", WEIGHTS)
    assert len(asked(hub, "PUT", "/lfs/")) == 1


def test_a_commit_with_an_outdated_parent_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    base = hub.head(REPO)
    first = upload(api, "a.txt", b"a", parent_commit=base)
    refused(412, lambda: upload(api, "b.txt", b"b", parent_commit=base))
    assert hub.head(REPO) == first
    assert upload(api, "b.txt", b"b", parent_commit=first[:9]) == hub.head(REPO)


def test_of_two_commits_at_once_on_one_parent_one_wins(hub: LoopbackHub) -> None:
    base = hub.head(REPO)
    together = threading.Barrier(8)

    def commit(number: int) -> int:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        together.wait(5)
        try:
            upload(api, f"{number}.txt", b"x", parent_commit=base)
        except HfHubHTTPError as problem:
            return problem.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(commit, range(8))) == [200] + [412] * 7
    assert [commit.parent for commit in hub.log(REPO)] == [base, None]


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub, api: HfApi) -> None:
    base = hub.head(REPO)
    hub.add_user("guest", "hf_guest")
    guest = HfApi(endpoint=hub.endpoint, token="hf_guest")
    operations = [CommitOperationAdd("model.safetensors", WEIGHTS)]
    opened = guest.create_commit(REPO, operations, commit_message="Better weights", create_pr=True)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    assert (hub.head(REPO), hub.head(REPO, "refs/pr/1")) == (base, opened.oid)
    refused(403, lambda: upload(guest, "a.txt", b"a"))
    more = upload(guest, "a.txt", b"a", revision="refs/pr/1")
    assert [commit.sha for commit in hub.log(REPO, "refs/pr/1")] == [more, opened.oid, base]
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] == WEIGHTS
    pulls = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert pulls is not None
    assert [(ref.ref, ref.target_commit) for ref in pulls] == [("refs/pr/1", more)]


def test_discussions_are_listed_by_kind_and_status(hub: LoopbackHub, api: HfApi) -> None:
    draft = api.create_pull_request(REPO, title="A draft", description="soon")
    talk = api.create_discussion(REPO, title="A question")
    assert (draft.status, draft.is_pull_request, talk.is_pull_request) == ("draft", True, False)
    assert (draft.git_reference, hub.head(REPO, "refs/pr/1")) == ("refs/pr/1", hub.head(REPO))
    upload(api, "a.txt", b"a", revision="refs/pr/1")
    assert [event.type for event in api.get_discussion_details(REPO, 1).events] == ["comment", "commit"]
    api.comment_discussion(REPO, 2, comment="An answer")
    api.change_discussion_status(REPO, 2, "closed")

    def numbers(**which: Any) -> list[int]:
        return [one.num for one in api.get_repo_discussions(REPO, **which)]

    assert numbers() == [2, 1]
    assert numbers(discussion_type="pull_request") == numbers(discussion_status="open") == [1]
    assert numbers(discussion_status="closed", author="tester") == [2]
    assert numbers(author="nobody") == []


def test_files_and_folders_are_deleted(hub: LoopbackHub, api: HfApi) -> None:
    hub.commit(REPO, {"a.txt": b"a", "old/a.txt": b"a", "old/deep/b.txt": b"b", "older.txt": b"c"})
    api.create_commit(
        REPO,
        [CommitOperationDelete("old/"), CommitOperationDelete("a.txt"), CommitOperationAdd("new.txt", b"n")],
        commit_message="Tidy",
    )
    assert set(hub.files(REPO)) == {".gitattributes", "older.txt", "new.txt"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("a.txt", REPO)
    hub.commit(REPO, {"older.txt": None})
    assert "older.txt" not in hub.files(REPO)


def test_a_commit_cannot_name_an_object_that_is_absent(hub: LoopbackHub) -> None:
    before = hub.head(REPO)
    pointer = {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}
    plain = {"path": "b.txt", "content": "Yg==", "encoding": "base64"}
    lines = [("header", {"summary": "s"}), ("file", plain), ("lfsFile", pointer)]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)
    path = f"/api/models/{REPO}/commit/main"
    status, _, answer = raw(hub.endpoint, "POST", path, body, Authorization=f"Bearer {WRITE_TOKEN}")
    assert (status, b"does not exist" in answer) == (400, True)
    assert hub.head(REPO) == before


def test_the_storage_takes_no_token_and_no_wrong_bytes(hub: LoopbackHub) -> None:
    place = f"/lfs/model/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"
    assert raw(hub.storage, "PUT", place, WEIGHTS, Authorization="Bearer anything")[0] == 400
    assert raw(hub.storage, "PUT", place, WEIGHTS[::-1])[0] == 400
    assert raw(hub.storage, "GET", place)[0] == 404
    assert raw(hub.storage, "PUT", place, WEIGHTS)[0] == 200
    assert raw(hub.storage, "GET", place)[2] == WEIGHTS
    assert [record.status for record in hub.requests] == [400, 400, 404, 200, 200]


def test_large_objects_are_uploaded_in_parts(hub: LoopbackHub, api: HfApi) -> None:
    hub.multipart_over = 4000
    upload(api, "model.safetensors", WEIGHTS)
    upload(api, "small.safetensors", WEIGHTS[:4000])
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert asked(hub, "PUT", "/parts/") == [200, 200, 200]
    assert asked(hub, "PUT", "/lfs/") == [200]
    assert asked(hub, "POST", "/api/complete-multipart/") == [200]


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: [mit]", "license"),
        ("base_model: {a: b}", "base_model"),
        ("license: [", "Invalid YAML"),
    ],
)
def test_a_bad_card_is_refused(hub: LoopbackHub, api: HfApi, metadata: str, complaint: str) -> None:
    before = hub.head(REPO)
    with pytest.raises(ValueError, match=complaint):
        upload(api, "README.md", f"---\n{metadata}\n---\n# Card\n".encode())
    assert hub.head(REPO) == before
    upload(api, "README.md", b"---\nlicense: mit\nbase_model: [a/b]\n---\n# Card\n")
    card = api.model_info(REPO).card_data
    assert card is not None
    assert card.license == "mit"


def test_branches_and_tags(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.head(REPO)
    api.create_branch(REPO, branch="next/one", revision=first)
    second = upload(api, "a.txt", b"a", revision="next/one")
    api.create_tag(REPO, tag="v1", revision="next/one")
    assert (hub.head(REPO), hub.head(REPO, "v1"), hub.head(REPO, second[:8])) == (first, second, second)
    refused(409, lambda: api.create_branch(REPO, branch="next/one"))
    refused(409, lambda: api.create_tag(REPO, tag="v1"))
    api.create_tag(REPO, tag="v1", exist_ok=True)
    refused(400, lambda: upload(api, "b.txt", b"b", revision="v1"))
    refs = api.list_repo_refs(REPO)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", first), ("next/one", second)]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", second)]
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="next/one")
    for revision in ("v1", "next/one"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)
    refused(403, lambda: api.delete_branch(REPO, branch="main"))


def test_every_listing_tells_the_same(hub: LoopbackHub, api: HfApi) -> None:
    sha = hub.commit(REPO, {"a.txt": b"a", "sub/model.safetensors": WEIGHTS}, "Add two")
    info = api.model_info(REPO, files_metadata=True)
    tree = {one.path: one for one in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert info.sha == sha == api.model_info(REPO, revision=sha, expand=["sha"]).sha
    assert info.siblings is not None
    assert set(tree) == {one.rfilename for one in info.siblings} | {"sub"}
    for one in info.siblings:
        entry = tree[one.rfilename]
        assert (one.size, one.blob_id, one.lfs) == (entry.size, entry.blob_id, entry.lfs)  # type: ignore[union-attr]
        assert api.get_paths_info(REPO, one.rfilename, expand=True) == [entry]
    lfs = tree["sub/model.safetensors"].lfs  # type: ignore[union-attr]
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert [one.path for one in api.list_repo_tree(REPO, "sub")] == ["sub/model.safetensors"]
    assert "sub/model.safetensors" not in [one.path for one in api.list_repo_tree(REPO)]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    newest = api.list_repo_commits(REPO)[0]
    assert (newest.commit_id, newest.title) == (sha, "Add two")


def test_object_ids_are_those_of_git() -> None:
    assert File.plain(b"hello\n").blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert File.plain(b"").blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    large = File.large(b"hello\n", hashlib.sha256(b"hello\n").hexdigest())
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{large.sha256}\nsize 6\n".encode()
    assert (large.blob_id, large.pointer_size) == (File.plain(pointer).blob_id, len(pointer))


def test_a_snapshot_downloads_what_it_is_asked_for(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    sha = hub.commit(REPO, {"a.txt": b"a", "model.safetensors": WEIGHTS, "pytorch_model.bin": WEIGHTS[1:]})
    wanted = ["*.txt", "*.safetensors"]
    folder = Path(api.snapshot_download(REPO, cache_dir=tmp_path, allow_patterns=wanted))
    assert folder.name == sha
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloaded(REPO) == {"a.txt", "model.safetensors"}
    before = asked(hub, "GET", "model.safetensors")
    api.snapshot_download(REPO, cache_dir=tmp_path, allow_patterns=wanted)
    assert asked(hub, "GET", "model.safetensors") == before == [200]
    assert api.verify_repo_checksums(REPO, cache_dir=tmp_path).mismatches == []


def test_an_absent_file_or_revision_is_said_to_be(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.txt", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "absent.txt", revision="v9", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        upload(api, "a.txt", b"a", revision="v9")
    assert not api.file_exists(REPO, "absent.txt")


def test_ranges(hub: LoopbackHub) -> None:
    hub.commit(REPO, {"a.txt": b"0123456789"})
    file = f"/{REPO}/resolve/main/a.txt"
    expected = {"2-4": b"234", "7-": b"789", "-3": b"789", "8-99": b"89"}
    for wanted, part in expected.items():
        status, headers, body = raw(hub.endpoint, "GET", file, Range=f"bytes={wanted}")
        assert (status, body) == (206, part)
        assert headers["Content-Range"].endswith("/10")
    status, headers, _ = raw(hub.endpoint, "GET", file, Range="bytes=10-")
    assert (status, headers["Content-Range"]) == (416, "bytes */10")


def test_datasets_have_their_own_names(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    url = api.create_repo("tester/model", repo_type="dataset")
    assert (url.repo_type, str(url)) == ("dataset", f"{hub.endpoint}/datasets/tester/model")
    upload(api, "part.parquet", WEIGHTS, repo_type="dataset")
    assert "part.parquet" not in hub.files(REPO)
    path = api.hf_hub_download(REPO, "part.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert api.dataset_info(REPO).sha == hub.head(REPO, repo_type="dataset")
    assert hub.downloaded(REPO, "dataset") == {"part.parquet"}


def test_distilgpt2_with_its_decoys(hub: LoopbackHub, tmp_path: Path, pocket: Path) -> None:
    sha = seed_distilgpt2(hub, pocket)
    api = as_anybody(hub)
    info = api.model_info("distilbert/distilgpt2")
    assert (info.sha, hub.head("distilbert/distilgpt2")) == (sha, sha)
    files = hub.files("distilbert/distilgpt2")
    expected = {".gitattributes", "LICENSE", "README.md", "config.json", "merges.txt", "model.safetensors"}
    assert files.keys() >= expected | {"tokenizer.json", "vocab.json", *DECOYS}
    assert files["model.safetensors"] == (pocket / "model.safetensors").read_bytes()
    assert json.loads(files["vocab.json"]) == json.loads(files["tokenizer.json"])["model"]["vocab"]
    assert all(files[path].startswith(b"DECOY") and len(files[path]) < 4096 for path in DECOYS)
    assert info.card_data is not None
    assert (info.card_data.license, info.card_data.datasets) == ("apache-2.0", ["openwebtext"])
    wanted = ["config.json", "*.safetensors"]
    api.snapshot_download("distilbert/distilgpt2", cache_dir=tmp_path, allow_patterns=wanted)
    assert hub.downloaded("distilbert/distilgpt2") == {"config.json", "model.safetensors"}


def test_a_status_comes_as_often_as_it_is_told_to(hub: LoopbackHub, api: HfApi) -> None:
    hub.inject(Fault("GET", r"/api/models/tester/model$", status=500, skip=1, times=2))
    api.model_info(REPO)
    for _ in range(2):
        refused(500, lambda: api.model_info(REPO))
    api.model_info(REPO)
    hub.inject(Fault("*", r"revision/main", times=None, status=404, error_code="RevisionNotFound"))
    for _ in range(3):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision="main")
    hub.clear_faults()
    api.model_info(REPO, revision="main")
    met = [(record.status, record.fault) for record in hub.requests if record.fault]
    assert met == [(500, "status")] * 2 + [(404, "status")] * 3


def test_too_many_requests_says_when_to_come_back(hub: LoopbackHub, api: HfApi) -> None:
    hub.inject(Fault("POST", "/preupload/", status=429, retry_after=0))
    upload(api, "a.txt", b"a")
    assert asked(hub, "POST", "/preupload/") == [429, 200]
    hub.inject(Fault("GET", "/refs", status=429, retry_after=7))
    assert refused(429, lambda: api.list_repo_refs(REPO)).response.headers["Retry-After"] == "7"


def test_a_commit_that_fails_is_not_tried_again(hub: LoopbackHub, api: HfApi) -> None:
    before = hub.head(REPO)
    hub.inject(Fault("POST", "/commit/", status=503))
    assert "injected fault" in str(refused(503, lambda: upload(api, "a.txt", b"a")))
    assert (asked(hub, "POST", "/commit/"), hub.head(REPO)) == ([503], before)
    hub.inject(Fault("POST", "/commit/", status=504, applied=True))
    refused(504, lambda: upload(api, "a.txt", b"a"))
    assert hub.files(REPO)["a.txt"] == b"a"


def test_a_commit_takes_effect_and_its_reply_is_lost(hub: LoopbackHub, api: HfApi) -> None:
    before = hub.head(REPO)
    hub.inject(Fault("POST", "/commit/", "drop-reply"))
    with pytest.raises(HTTP.ReadError):
        upload(api, "a.txt", b"a", parent_commit=before)
    applied = hub.head(REPO)
    assert hub.log(REPO)[0].parent == before
    assert upload(api, "a.txt", b"a") == applied
    refused(412, lambda: upload(api, "b.txt", b"b", parent_commit=before))
    assert asked(hub, "POST", "/commit/") == [0, 412]


@pytest.mark.parametrize("applied", [False, True])
def test_a_commit_that_is_never_answered(hub: LoopbackHub, api: HfApi, applied: bool) -> None:
    before = hub.head(REPO)
    hub.inject(Fault("POST", "/commit/", "hang", applied=applied))
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[str] = pool.submit(upload, api, "a.txt", b"a")
        wait_until(lambda: [record for record in hub.requests if record.fault == "hang"])
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        assert (hub.head(REPO) != before) == applied
        hub.clear_faults()
        with pytest.raises(HTTP.TransportError):
            waiting.result(5)


def test_the_hub_stops_while_a_request_hangs() -> None:
    with ThreadPoolExecutor(1) as pool:
        with LoopbackHub() as hub:
            hub.inject(Fault("GET", "whoami", "hang"))
            waiting = pool.submit(HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).whoami)
            wait_until(lambda: hub.requests)
            before = time.monotonic()
        assert time.monotonic() - before < 1
        with pytest.raises(HTTP.TransportError):
            waiting.result(5)


def test_an_upload_is_reset_and_tried_again(hub: LoopbackHub, api: HfApi) -> None:
    hub.inject(Fault("PUT", "/lfs/", "reset"))
    upload(api, "model.safetensors", WEIGHTS * 100)
    assert asked(hub, "PUT", "/lfs/") == [0, 200]
    hub.inject(Fault("PUT", "/lfs/", status=403))
    with pytest.raises(RuntimeError):
        upload(api, "other.safetensors", WEIGHTS[1:])
    hub.inject(Fault("POST", "/objects/verify", status=404))
    with pytest.raises(RuntimeError):
        upload(api, "other.safetensors", WEIGHTS[2:])
    assert "other.safetensors" not in hub.files(REPO)


def test_a_download_that_is_cut_short_resumes(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    # The client drops what it has of an unfinished chunk.
    chunk = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
    data = WEIGHTS * (chunk // len(WEIGHTS) + 2)
    hub.commit(REPO, {"model.safetensors": data})
    hub.inject(Fault("GET", r"/model\.safetensors", "cut", after=chunk + 1000))
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == data
    assert asked(hub, "GET", "model.safetensors") == [200, 206]


def test_a_download_that_is_reset_fails(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.inject(Fault("GET", r"/model\.safetensors", "reset-body"))
    with pytest.raises(HTTP.ReadError):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert hub.downloaded(REPO) == {"model.safetensors"}
    hub.inject(Fault("HEAD", r"/model\.safetensors", "reset"))
    with pytest.raises(HTTP.ReadError):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)


def test_corrupt_bytes_arrive_in_silence(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.inject(Fault("GET", r"/model\.safetensors", "corrupt", after=5))
    found = Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    assert [at for at, (a, b) in enumerate(zip(found, WEIGHTS, strict=True)) if a != b] == [5]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_a_fault_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        Fault("GET", "/", "explode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="applied"):
        Fault("GET", "/", "cut", applied=True)


def test_start_and_stop_are_quick_and_leave_no_thread() -> None:
    before = set(threading.enumerate())
    took = []
    for _ in range(5):
        start = time.monotonic()
        with LoopbackHub() as hub:
            raw(hub.endpoint, "GET", "/api/whoami-v2")
        took.append(time.monotonic() - start)
    assert min(took) < 0.2
    with LoopbackHub() as hub:
        HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).whoami()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_another_process_finds_the_hub_through_its_variables(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"a.txt": b"a"})
    program = "import huggingface_hub as h; print(h.get_token(), h.hf_hub_download('tester/model', 'a.txt'))"

    def run(token: str | None) -> list[str]:
        variables = {**os.environ, **hub.env(token, home=tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, check=True)
        return done.stdout.decode().split()

    assert run(WRITE_TOKEN)[0] == WRITE_TOKEN
    seen = len(hub.requests)
    token, path = run(None)
    assert (token, Path(path).is_relative_to(tmp_path)) == ("None", True)
    assert not any(record.authorized for record in hub.requests[seen:])
    assert hub.downloaded(REPO) == {"a.txt"}
