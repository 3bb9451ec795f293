"""The console as a process of its own: in a real browser, on real topics and a real store."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.command import Command, encode_command
from tests.browser import browser
from tests.conftest import picture
from tests.forked import Forked
from tests.monitoring.console.records import event, prediction
from tests.servers import wait_until
from tests.system.conftest import Site, run_cli

__all__ = ["browser"]

EVIL = '<img src=x onerror="alert(1)">&"</script>'
TOKEN = "a token of some length"
# Pictures of what the tests saw, kept for whoever looks at a run afterwards.
SHOTS = Path(os.environ.get("DRIFTKEEL_TEST_SHOTS", "screenshots"))


class ConsoleProcess:
    """One console, started by its command line."""

    def __init__(self, site: Site, folder: Path, **section: Any) -> None:
        path = folder / "console.yaml"
        path.write_text(yaml.safe_dump({**site.config, "console": {"port": 0, **section}, "log": {"format": "text"}}))
        said, self.log = folder / "console.txt", folder / "console.log"
        self.process = Forked(["console", "--config", str(path)], said, self.log)

        def where() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"console: http://(\S+):(\d+)/\n", said.read_text())

        wait_until(lambda: where() is not None, "the console's address")
        found = where()
        assert found
        self.port = int(found[2])
        self.url = f"http://127.0.0.1:{self.port}/"

    def ask(
        self,
        method: str,
        path: str,
        content: Any = None,
        headers: dict[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120, source_address=(source, 0))
        body = None if content is None else json.dumps(content)
        sent = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, body, {**sent, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith(("{", "[", "null")) else text, answer.headers

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@pytest.fixture
def start(site: Site, tmp_path: Path) -> Iterator[Callable[..., ConsoleProcess]]:
    running: list[ConsoleProcess] = []

    def start_one(**section: Any) -> ConsoleProcess:
        running.append(ConsoleProcess(site, tmp_path, **section))
        return running[-1]

    yield start_one
    for console in running:
        if console.process.poll() is None:
            console.process.kill()
            console.process.wait()


def open_page(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what went wrong in it."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(120_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    return page, wrong


def publish_predictions(site: Site, rows: list[Any]) -> None:
    records = [(p.stream.encode(), p.model_dump_json().encode(), []) for p in rows]
    site.topic.send(site.kafka.topics.predictions, records)


def publish_events(site: Site, rows: list[Any]) -> None:
    records = [(e.stream.encode(), e.model_dump_json().encode(), []) for e in rows]
    site.topic.send(site.kafka.topics.updates, records)


def test_a_working_site_in_a_browser(browser: Any, site: Site, start: Callable[..., ConsoleProcess]) -> None:
    """Tiles and pictures come, text stays text, charts move while frames flow, and nothing is reported as an error."""
    worker = site.start(store={**site.config["store"], "snapshot_every": 1})
    site.send([(stream, picture(i)) for i in range(24) for stream in ("cam-1", EVIL)])
    console = start(workers=[f"http://127.0.0.1:{worker.port}/metrics"])
    page, wrong = open_page(browser, console.url, viewport={"width": 1280, "height": 800})
    tiles = page.locator("a.tile")
    tiles.nth(1).wait_for()
    assert {name.inner_text() for name in page.locator(".tile .name").all()} == {"cam-1", EVIL}
    assert page.locator("main img[onerror]").count() == 0
    page.locator(".tile img.there").nth(1).wait_for()
    page.get_by_text("1/1 worker").wait_for()
    page.screenshot(path=_shot("fleet.png"))
    # By keyboard alone to the stream with the evil name.
    page.keyboard.press("/")
    page.keyboard.type("onerror")
    page.wait_for_function("document.querySelectorAll('a.tile').length === 1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("h1.name").wait_for()
    assert page.locator("h1.name").inner_text() == EVIL
    chart = page.locator("figure.wide canvas").first
    chart.wait_for()
    before = chart.evaluate("canvas => canvas.toDataURL()")
    stop = threading.Event()

    def film() -> None:
        for i in range(24, 10_000):
            if stop.wait(0.05):
                return
            site.send([(EVIL, picture(i))])

    filming = threading.Thread(target=film)
    filming.start()
    try:
        page.wait_for_function(
            "before => document.querySelector('figure.wide canvas').toDataURL() !== before", arg=before
        )
    finally:
        stop.set()
        filming.join()
    page.locator("img.frame[src]").wait_for()
    page.locator(".events li").first.wait_for()
    # What source and the adapted parameters call the same frame stands side by side.
    page.wait_for_function("() => [...document.querySelectorAll('.side .said')].every(one => one.textContent !== '')")
    page.screenshot(path=_shot("stream.png"))
    page.keyboard.press("Escape")
    tiles.first.wait_for()
    assert tiles.count() == 1, "the filter is kept"
    assert wrong == []
    assert console.stop() == 0


def test_rolling_back_by_button(browser: Any, site: Site, start: Callable[..., ConsoleProcess]) -> None:
    """The button's command reaches the worker, the worker does it, and the page says what came of it."""
    worker = site.start(store={**site.config["store"], "snapshot_every": 1})
    site.send([("cam-1", picture(i)) for i in range(24)])
    site.wait_folded(worker, {"cam-1": 24})
    console = start(workers=[f"http://127.0.0.1:{worker.port}/metrics"])
    page, wrong = open_page(browser, f"{console.url}#/stream/cam-1", color_scheme="dark")
    page.locator(".events li").first.wait_for()
    page.get_by_role("button", name="Roll back").click()
    page.locator("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Roll back").click()
    page.get_by_label("Reason").fill("it looks <b>wrong</b>")
    page.screenshot(path=_shot("confirm.png"))
    page.locator("dialog").get_by_role("button", name="Roll back").click()
    page.locator(".result", has_text="Roll back: rolled back").wait_for()
    (record,) = site.topic.read(site.kafka.topics.commands, lambda records: len(records) == 1)
    command = Command.model_validate_json(record.value)
    assert record.value == encode_command(command)
    assert (command.stream, command.action, command.snapshot) == ("cam-1", "rollback", 1)
    assert (command.reason, command.by, record.key) == ("it looks <b>wrong</b>", "console", b"cam-1")
    (done,) = [e for e in site.events(lambda es: any(e.command for e in es)) if e.command]
    assert (done.command, done.decision) == (command.id, "rolled_back")
    page.locator(".events .decision", has_text="rolled back").wait_for()
    for button, result in (("Shadow", "policy"), ("Freeze", "frozen"), ("Reset", "reset")):
        page.get_by_role("button", name=f"{button}…", exact=True).click()
        page.locator("dialog").get_by_role("button", name=button).click()
        page.locator(".result", has_text=f"{button}: {result}").wait_for()
    assert wrong == []


def test_a_command_that_no_worker_answers_waits(browser: Any, site: Site, start: Callable[..., ConsoleProcess]) -> None:
    console = start()
    publish_predictions(site, [prediction("cam-1")])
    page, wrong = open_page(browser, f"{console.url}#/stream/cam-1")
    page.locator(".state", has_text=re.compile("fine|silent")).wait_for()  # it falls silent soon
    page.get_by_role("button", name="Reset").click()
    page.locator("dialog").get_by_role("button", name="Reset").click()
    page.locator(".result", has_text="waiting for the worker").wait_for()
    (record,) = site.topic.read(site.kafka.topics.commands, lambda records: len(records) == 1)
    answer = Command.model_validate_json(record.value).id
    said = {"decision": "skipped", "reason": "cannot reset", "raw_gradient_norm": None, "command": answer}
    publish_events(site, [event("cam-1", 1, None, **said)])
    page.locator(".result", has_text="Reset: not done, cannot reset").wait_for()
    assert wrong == []


def test_only_routine_events_of_one_kind_share_a_row(
    browser: Any, site: Site, start: Callable[..., ConsoleProcess]
) -> None:
    console = start()
    routine = [event("cam-1", number) for number in (1, 2, 3)]
    undone = [event("cam-1", 4, decision="rolled_back"), event("cam-1", 5, decision="reset")]
    publish_events(site, [*routine, *undone, event("cam-1", 6, decision="frozen", command="c1")])
    page, wrong = open_page(browser, f"{console.url}#/stream/cam-1")
    page.locator(".events li").first.wait_for()
    rows = [row.inner_text().split("\n") for row in page.locator(".events summary").all()]
    assert [(row[1], row[2][:1] == "\u00d7") for row in rows] == [
        ("frozen", False),
        ("reset", False),
        ("rolled back", False),
        ("applied", True),
    ]
    assert wrong == []


def test_hostile_records_harm_nothing(browser: Any, site: Site, start: Callable[..., ConsoleProcess]) -> None:
    """Records that are none, frames that are none, numbers that JSON does not have: the rest goes on being shown."""
    console = start()
    bad_frame, good_frame = site.send([("bad", b"\x89PNG not a picture"), ("good", picture(1))])
    topics = site.kafka.topics
    for topic in (topics.predictions, topics.updates):
        site.topic.send(
            topic, [(b"\xff\xfe", b"{", []), (None, b"", []), (b"x", b"[" * 5_000, []), (b"x", b"\x00", [])]
        )
    publish_events(site, [event("good", 1, loss=0.5)])
    content = event("good", 2).model_dump_json().replace('"loss":0.5', '"loss":Infinity').encode()
    site.topic.send(topics.updates, [(b"good", content, [])])
    publish_predictions(
        site,
        [prediction("bad", id=bad_frame), prediction("good", id=good_frame), prediction("odd", id="elsewhere/0/0")],
    )
    page, wrong = open_page(browser, f"{console.url}#/stream/good")
    page.locator(".events li").first.wait_for()
    page.locator("img.frame[src]").wait_for()
    page.goto(console.url)
    page.locator("a.tile").nth(2).wait_for()
    page.locator("a.tile", has_text="good").locator("img.there").wait_for()
    assert page.locator("img.there").count() == 1
    assert wrong == []


def test_a_camera_shows_without_further_news(browser: Any, site: Site, start: Callable[..., ConsoleProcess]) -> None:
    """It comes just after the page has put its tiles in order, and next is heard of when it has fallen silent."""
    console = start()
    page, _ = open_page(browser, console.url)
    page.get_by_text("Waiting for the first predictions").wait_for()
    publish_predictions(site, [prediction("cam-1")])
    page.locator("a.tile", has_text="as on clean frames").wait_for()


def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser: Any, site: Site, start: Callable[..., ConsoleProcess]
) -> None:
    console = start()
    publish_predictions(site, [prediction("a-camera-with-a-rather-long-name-" + 60 * "x")])
    page, wrong = open_page(browser, console.url, viewport={"width": 390, "height": 844})
    page.locator("a.tile").wait_for()
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    page.locator("a.tile").click()
    page.locator("h1.name").wait_for()
    assert not page.evaluate(wide)
    page.screenshot(path=_shot("phone.png"))
    assert wrong == []


def test_with_a_token_nothing_is_shown_before_it_is_given(
    browser: Any, site: Site, start: Callable[..., ConsoleProcess]
) -> None:
    console = start(token=TOKEN)
    publish_predictions(site, [prediction("cam-1")])
    for path in ("/api/live", "/api/thumbnails?s=0.0", "/api/stored?stream=cam-1"):
        assert console.ask("GET", path)[0] == 401
    assert console.ask("POST", "/api/command", {"stream": "cam-1", "action": "reset"})[0] == 401
    assert console.ask("GET", "/api/session")[1] == {"login": True}
    page, _ = open_page(browser, console.url)
    page.get_by_label("token").fill("not the right one, no")
    page.keyboard.press("Enter")
    page.get_by_text("this is not the console's token").wait_for()
    page.get_by_label("token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.locator("a.tile").wait_for()
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert TOKEN not in cookie["value"]


def test_requests_from_elsewhere_are_refused(site: Site, start: Callable[..., ConsoleProcess]) -> None:
    console = start(hosts=["console.example"])
    publish_predictions(site, [prediction("cam-1")])
    ours = f"127.0.0.1:{console.port}"
    assert console.ask("GET", "/", headers={"host": "evil.example"})[0] == 421
    assert console.ask("GET", "/api/session", headers={"host": f"evil.example:{console.port}"})[0] == 421
    assert console.ask("GET", "/", headers={"host": "console.example"})[0] == 200
    csrf = console.ask("GET", "/api/session")[1]["csrf"]
    reset = {"stream": "cam-1", "action": "reset"}
    good = {"x-driftkeel-csrf": csrf}
    deadline = time.monotonic() + 120
    while console.ask("POST", "/api/command", reset, good)[0] == 404:  # until the stream is known
        assert time.monotonic() < deadline
    for headers in (
        {},
        {"x-driftkeel-csrf": "x"},
        {**good, "origin": "http://evil.example"},
        {**good, "origin": "null"},
        {**good, "origin": "http://["},
        {**good, "sec-fetch-site": "cross-site"},
    ):
        assert console.ask("POST", "/api/command", reset, headers)[0] == 403
    assert console.ask("POST", "/api/command", reset, {**good, "content-type": "text/plain"})[0] == 415
    assert console.ask("POST", "/api/command", {**reset, "reason": 20_000 * "x"}, good)[0] == 413
    assert console.ask("POST", "/api/command", {**reset, "action": "explode"}, good)[0] == 400
    assert console.ask("POST", "/api/command", {**reset, "more": 1}, good)[0] == 400
    assert console.ask("POST", "/api/command", reset, {**good, "origin": f"http://{ours}"})[0] == 200
    sent = site.topic.read(site.kafka.topics.commands, lambda records: len(records) == 2)
    assert len(sent) == 2
    for path in ("/", "/static/main.js", "/api/session"):
        headers = console.ask("GET", path)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd"):
        assert console.ask("GET", path)[0] == 404


def test_what_is_no_request_leaves_no_line_in_the_log(site: Site, start: Callable[..., ConsoleProcess]) -> None:
    console = start()
    before = console.log.read_text()
    head = f"HTTP/1.1\r\nhost: 127.0.0.1:{console.port}\r\n"
    cut = "content-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    for said in (f"POST /api/login {head}{cut}", f"GET /healthz {head}{upgrade}", "\x16\x03\x01 nothing\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", console.port), timeout=120) as connection:
            connection.sendall(said.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                pass
    assert console.ask("GET", "/healthz")[0] == 200
    assert console.log.read_text() == before


def test_bound_elsewhere_it_wants_a_token() -> None:
    result = run_cli("console", "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 1
    assert "needs console.token" in result.stderr
    result = run_cli("console", "--token", "short")
    assert result.returncode == 1
    assert "--token" in result.stderr
    assert "short" not in result.stderr.replace("too_short", "").replace("shorter", "")


def test_wrong_tokens_are_not_tried_for_ever(site: Site, start: Callable[..., ConsoleProcess]) -> None:
    """One after the other, and then all at once, with their ends held back until the console waits for each."""
    console = start(token=TOKEN)
    codes = [console.ask("POST", "/api/login", {"token": f"guess number {i:06d}"})[0] for i in range(6)]
    assert codes == [403] * 6
    body = b'{"token": "guess number 000007"}'
    head = b"POST /api/login HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    with contextlib.ExitStack() as opened:
        guesses = [opened.enter_context(socket.create_connection(("127.0.0.1", console.port), 120)) for _ in range(12)]
        for guess in guesses:
            guess.sendall(head + b"content-length: %d\r\n\r\n%b" % (len(body), body[:-1]))
        assert console.ask("GET", "/healthz")[0] == 200  # It has seen all heads: they came before this one.
        for guess in guesses:
            guess.sendall(body[-1:])
        codes = [int(guess.recv(4_096).split()[1]) for guess in guesses]
    assert sorted(codes) == [403] * 4 + [429] * 8


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address on loopback")
def test_a_guesser_shuts_out_nobody_else(site: Site, start: Callable[..., ConsoleProcess]) -> None:
    console = start(token=TOKEN)
    forwarded = [{"x-forwarded-for": f"10.0.0.{i}"} for i in range(12)]
    wrong = [console.ask("POST", "/api/login", {"token": "a guess, and no more"}, header)[0] for header in forwarded]
    assert wrong == [403] * 10 + [429] * 2
    assert console.ask("POST", "/api/login", {"token": TOKEN})[0] == 429
    assert console.ask("POST", "/api/login", {"token": TOKEN}, source="127.0.0.2")[0] == 200


def _shot(name: str) -> str:
    SHOTS.mkdir(exist_ok=True)
    return str(SHOTS / name)
