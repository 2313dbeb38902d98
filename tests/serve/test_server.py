"""What the server answers, to whom, and what it refuses."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from longlive_rag.serve import app as app_module
from longlive_rag.serve import protocol
from longlive_rag.serve.studio import Studio
from support.serving import picture_times

HERE, SOCKET = "http://127.0.0.1:8765", "ws://127.0.0.1:8765/ws"


@pytest.fixture
def client(scene, tmp_path):
    with TestClient(app_module.make_app(Studio(scene, tmp_path, ahead=1.0)), base_url=HERE) as client:
        yield client


def until(socket, kind: str, **wanted) -> dict:
    for _ in range(200):
        message = socket.receive_json()
        if message["type"] == kind and all(message[name] == value for name, value in wanted.items()):
            return message
    raise AssertionError(f"never heard {kind}")


def wait_for_blocks(client, number: int) -> dict:
    with client.websocket_connect(SOCKET) as socket:
        if socket.receive_json()["state"]["blocks"] < number:
            until(socket, "block", block=number - 1)
    return client.get("/state").json()


def test_the_video_so_far_plays_whole_and_by_range(client):
    state = wait_for_blocks(client, 10)
    answer = client.get("/video.mp4")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert len(picture_times(answer.content)) == state["frames"] == 10
    blocks = client.get("/blocks").json()["blocks"]
    head, third = blocks[0]["offset"], blocks[3]
    start, end = third["offset"], third["offset"] + third["bytes"]
    part = client.get("/video.mp4", headers={"Range": f"bytes={start}-{end - 1}"})
    assert (part.status_code, part.headers["content-range"]) == (206, f"bytes {start}-{end - 1}/{len(answer.content)}")
    assert picture_times(answer.content[:head] + part.content) == pytest.approx([third["time"]])
    assert client.get("/video.mp4", headers={"Range": "bytes=-7"}).content == answer.content[-7:]
    assert client.get("/video.mp4", headers={"Range": "bytes=999999999-"}).status_code == 416
    assert client.head("/video.mp4").headers["content-length"] == str(len(answer.content))


def test_a_prompt_is_acknowledged_with_its_block_and_told_to_all(client):
    with client.websocket_connect(SOCKET) as speaker, client.websocket_connect(SOCKET) as listener:
        state = speaker.receive_json()["state"]
        assert state["prompt"] == "here" and state["places"] == ["here", "there"]
        speaker.send_json({"type": "prompt", "text": "there", "id": 7})
        answer = until(speaker, "ack", id=7)
        assert answer["prompt"] == until(listener, "prompt")["prompt"] == "there"
        speaker.send_json({"type": "watching", "video": 1, "seconds": 5})
        assert until(listener, "block", block=answer["block"])["shot"]["prompt"] == "there"


def test_pause_resume_new_video_and_save(client, tmp_path):
    wait_for_blocks(client, 3)
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "pause", "id": 1})
        until(socket, "ack", id=1)
        assert client.get("/state").json()["paused"]
        socket.send_json({"type": "resume", "id": 2})
        until(socket, "ack", id=2)
        socket.send_json({"type": "save", "id": 3})
        saved = until(socket, "ack", id=3)
        assert len(picture_times(client.get("/" + saved["url"]).content)) == saved["block"]
        socket.send_json({"type": "new", "id": 4, "seed": 5, "policies": ["remembers"]})
        assert until(socket, "ack", id=4)["video"] == 2
        assert until(socket, "video")["state"]["seed"] == 5
    assert client.get("/video.mp4?video=1").status_code == 200
    assert client.get("/video.mp4?video=9").status_code == 404


def test_what_memory_gave_back_can_be_looked_at(client):
    wait_for_blocks(client, 10)
    block = client.get("/blocks?from=9&to=10").json()["blocks"][0]
    assert block["retrieved"][0] is None, "the sliding window remembers nothing"
    recalled = block["retrieved"][1]
    assert len(recalled["frames"]) == len(recalled["similarity"]) == 1
    picture = client.get(f"/thumbnails/1/{recalled['frames'][0]}/1.jpg")
    assert picture.headers["content-type"] == "image/jpeg" and picture.content[:2] == b"\xff\xd8"
    assert client.get("/thumbnails/1/999/1.jpg").status_code == 404
    assert client.get("/thumbnails/1/0/2.jpg").status_code == 404


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("{", "must be JSON"),
        ("[" * 5000, "must be JSON"),
        ("[]", "must be a JSON object"),
        ('{"type": "dance"}', "type must be one of"),
        ('{"type": ["prompt"]}', "type must be one of"),
        ('{"type": "prompt"}', "needs text or camera"),
        ('{"type": "prompt", "text": ""}', "1 to 1000 characters"),
        (json.dumps({"type": "prompt", "text": "a" * 1001}), "1 to 1000 characters"),
        (json.dumps({"type": "prompt", "text": "a" * 9000}), "8192 bytes at most"),
        ('{"type": "prompt", "text": "elsewhere"}', "Only here and there"),
        ('{"type": "prompt", "camera": "spin"}', "camera must be one of"),
        ('{"type": "pause", "file": "/etc/passwd"}', "has no 'file'"),
        ('{"type": "new", "policies": ["hope"]}', "There is no policy 'hope'"),
        ('{"type": "new", "policies": [1]}', "must be a list of names"),
        ('{"type": "new", "seed": true}', "must be of type integer"),
        ('{"type": "new", "seed": -1}', "must be from 0"),
        ('{"type": "watching", "video": 1, "seconds": NaN}', "must be from 0"),
        ('{"type": "watching", "video": 1}', "needs seconds"),
        ('{"type": "pause", "id": "x"}', "id must be a whole number"),
    ],
)
def test_a_message_that_is_no_command_is_answered_in_plain_words(client, message, reason):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_text(message)
        assert reason in until(socket, "error")["message"]
        socket.send_json({"type": "pause", "id": 1})  # the connection is as good as before
        until(socket, "ack", id=1)


def test_the_schema_lists_every_command(client):
    commands = client.get("/schema.json").json()["oneOf"]
    assert {command["properties"]["type"]["const"] for command in commands} == set(protocol.COMMANDS)


def test_a_viewer_that_talks_too_much_is_let_go(client):
    with client.websocket_connect(SOCKET) as socket, pytest.raises(WebSocketDisconnect) as closed:
        for _ in range(200):
            socket.send_json({"type": "watching", "video": 1, "seconds": 0})
        until(socket, "never")
    assert closed.value.code == 1008


def test_there_is_a_limit_to_viewers(client, monkeypatch):
    monkeypatch.setattr(app_module, "MOST_VIEWERS", 1)
    with client.websocket_connect(SOCKET) as socket:
        socket.receive_json()
        with client.websocket_connect(SOCKET) as other, pytest.raises(WebSocketDisconnect) as closed:
            other.receive_json()
    assert closed.value.code == 1013


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/%2e%2e/pyproject.toml", "/static/../app.py", "/saved/../../x.mp4", "/video-0001.jsonl"],
)
def test_no_path_reaches_the_file_system(client, path):
    assert client.get(path).status_code == 404


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in app_module.STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, f"{path.name} names another server"
        assert client.get("/" if path.name == "index.html" else f"/{path.name}").text == path.read_text(
            encoding="utf-8"
        )
        assert len(text.splitlines()) <= 400
    for forbidden in ("<script>", "onclick=", "style="):
        assert forbidden not in page.text, "the content security policy would refuse it"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8765"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "proxy.example"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": HERE}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_sites_are_refused(scene, tmp_path, headers, status):
    application = app_module.make_app(Studio(scene, tmp_path), hosts=["proxy.example"])
    client = TestClient(application, base_url=HERE)
    assert client.get("/state", headers=headers).status_code == status


def test_another_site_gets_no_websocket(client):
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(SOCKET, headers={"Origin": "http://evil.example"}) as socket,
    ):
        socket.receive_json()
    assert closed.value.code == 1008


def test_beyond_this_machine_a_token_is_needed(scene, tmp_path):
    application = app_module.make_app(Studio(scene, tmp_path), token="open sesame")
    client = TestClient(application, base_url="http://192.0.2.1:8765", follow_redirects=False)
    assert client.get("/state").status_code == 403
    assert client.get("/?token=guess").status_code == 403
    assert client.get("/state", headers={"Authorization": "Bearer guess"}).status_code == 403
    assert client.get("/state", headers={"Authorization": "Bearer open sesame"}).status_code == 200
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(SOCKET):
        pass
    answer = client.get("/?token=open%20sesame")
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/state").status_code == 200, "the cookie is enough"
