"""The manifest reads back as it was written, and in no other way."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from align.checkpoint import SCHEMA, FileRecord, Manifest
from align.errors import ConfigError, SaveError

SHA = hashlib.sha256(b"").hexdigest()
MANIFEST = Manifest(
    SCHEMA,
    step=40,
    round=2,
    epoch=3,
    files=(FileRecord("a.json", 7, SHA), FileRecord("policy/rank-00000.safetensors", 8, SHA)),
    facts={"world": {"policy": 2}, "lr": 1e-6, "none": None, "list": [1, "ü"]},
    metrics={"reward": 0.1, "kl": float("inf")},
)
HERE = Path("manifest.json")


def seal(content: dict) -> bytes:
    """Text whose own sha256 fits, as somebody with the source can make it."""
    body = json.dumps(content, sort_keys=True)
    sealed = {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, sort_keys=True, indent=2) + "\n").encode()


def content(**changes) -> dict:
    found = json.loads(MANIFEST.text()) | changes
    del found["sha256"]
    return found


def test_a_manifest_reads_back_equal():
    assert Manifest.read(MANIFEST.text().encode(), HERE) == MANIFEST
    assert seal(content()) == MANIFEST.text().encode()


def test_the_order_of_files_and_the_types_of_facts_do_not_matter():
    other = replace(MANIFEST, files=MANIFEST.files[::-1], facts=MANIFEST.facts | {"list": (1, "ü")})
    assert other.text() == MANIFEST.text()
    odd = replace(MANIFEST, facts={10: 1, 9: (2, 3)}, metrics={"tokens": 5})
    assert Manifest.read(odd.text().encode(), HERE).facts == {"10": 1, "9": [2, 3]}


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_it_can_change(bit):
    text = MANIFEST.text().encode()
    for byte in range(len(text)):
        changed = bytearray(text)
        changed[byte] ^= 1 << bit
        with pytest.raises(ValueError):
            Manifest.read(bytes(changed), HERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "it has no sha256"),
        (b'{"step": 40}', "it has no sha256"),
        (MANIFEST.text().encode() + b"\n", "was changed"),
        (MANIFEST.text().replace('"step": 40', '"step": 50').encode(), "was changed"),
        (MANIFEST.text().replace("{", '{"step": 40,', 1).encode(), "was changed"),
        (seal({"schema": SCHEMA}), "has the keys"),
        (seal(content(more=1)), "has the keys"),
        (seal(content(step="40")), "step is '40', not of type int"),
        (seal(content(step=True)), "step is True, not of type int"),
        (seal(content(facts=[])), r"facts is \[\], not of type dict"),
        (seal(content(metrics={"reward": "high"})), "metrics"),
        (seal(content(files=[{"name": "x", "size": 1}])), "without name, size and sha256"),
        (seal(content(files=["x"])), "without name, size and sha256"),
        (seal(content(files=[{"name": "x", "size": 1.0, "sha256": SHA}])), "without name, size and sha256"),
        (seal(content(files=[{"name": "x", "size": 1, "sha256": SHA}] * 2)), "twice"),
    ],
)
def test_what_is_no_manifest_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Manifest.read(text, HERE)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a//b", "./a", "manifest.json"])
def test_a_name_that_leaves_the_checkpoint_is_refused(name):
    with pytest.raises(ValueError, match="outside the checkpoint"):
        Manifest.read(seal(content(files=[{"name": name, "size": 1, "sha256": SHA}])), HERE)


@pytest.mark.parametrize("schema", [0, SCHEMA - 1, SCHEMA + 1, "1", None])
def test_another_schema_is_no_damage(tmp_path, small, schema):
    with pytest.raises(ConfigError, match=f"has schema {schema!r}, and this version of align reads {SCHEMA}"):
        Manifest.read(seal(content(schema=schema, more=1)), HERE)
    store = small.make_store(tmp_path / "checkpoints")
    for step in (10, 20):
        small.save(store, step)
    path = store.folder / "step-000020/manifest.json"
    found = json.loads(path.read_text()) | {"schema": schema}
    del found["sha256"]
    path.write_bytes(seal(found))
    for call in (store.newest, lambda: store.open(path.parent)):
        with pytest.raises(ConfigError, match=rf"step-000020/manifest.json: has schema {schema!r}") as raised:
            call()
        assert raised.value.remedy == "resume with the version of align that wrote it, or start in a new run.dir"
    assert store.steps() == [10, 20] and store.notes == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "driver.json").unlink(), r"driver.json: is missing"),
        (lambda folder: (folder / "driver.json").write_text("{}"), r"driver.json: has 2 bytes, the manifest says"),
        (lambda folder: (folder / "more").write_text(""), r"more: is not in the manifest"),
        (lambda folder: (folder / "policy/more").symlink_to("/"), r"policy/more: is a symbolic link"),
        (lambda folder: (folder / "policy").chmod(0o777), r"policy: may be written by other users"),
    ],
    ids=["missing", "other size", "extra", "link", "open folder"],
)
def test_only_what_the_manifest_says_is_published(tmp_path, small, change, message):
    store = small.make_store(tmp_path / "checkpoints", keep_latest=1)
    small.save(store, 10)
    partial = store.begin(20, 0)
    files = small.write(partial, 20)
    change(partial)
    with pytest.raises(SaveError, match=message) as refused:
        store.publish(partial, small.manifest(20, files))
    assert refused.value.exit_status == 76
    store.abandon(partial)
    assert small.torsos(store.folder) == [] and store.steps() == [10]
    small.check_whole(store.newest())
