"""API keys: where they come from, who gets in, and how much a key may ask for."""

import asyncio
import base64
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve_app.access import ADMIN_KEY, API_KEYS, API_KEYS_FILE
from serve_app.gateway import deployment
from serve_app.gateway.errors import ApiError
from serve_app.gateway.keys import Keys, KeysError, hashed, new_key
from tests.processes.rollout_process import until
from tests.unit.gateway_double import Gateway

SHOP, CRAWLER = "shop-0123456789abcdef", "crawler-0123456789abcdef"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"shop: sha256:{hashed(SHOP)}\ncrawler: {{sha256: {hashed(CRAWLER)}, pairs_per_s: 100}}\n", "utf-8"
    )
    return path


def keys(path, **more):
    return Keys({API_KEYS_FILE: str(path), **more}, Clock())


def bearer(key):
    return f"Bearer {key}"


def test_keys_of_file_and_environment_get_in_by_name(keys_file):
    known = keys(keys_file, **{API_KEYS: "search:search-0123456789, other:other-0123456789a"})
    assert known.check(bearer(SHOP)).name == "shop"
    assert known.check(f"bearer  {CRAWLER} ").name == "crawler"
    assert known.check(bearer("search-0123456789")).name == "search"
    assert known.check(bearer("other-0123456789a")).pairs_per_s is None


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SHOP}", SHOP, "Bearer \udcff"]
)
def test_whoever_has_no_key_stays_outside(keys_file, given):
    with pytest.raises(ApiError) as refused:
        keys(keys_file).check(given)
    assert (refused.value.status, refused.value.code) == (401, "unauthorized")


def test_without_keys_everybody_gets_in():
    assert Keys({}).check("") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shop: {", "line 1: is not valid YAML"),
        (
            f"shop: {hashed(SHOP)}\nshop: {hashed(CRAWLER)}",
            "line 2: is not valid YAML, or a name stands twice",
        ),
        (f"shop: {{sha256: {hashed(SHOP)}, expires: 2025-02-30}}", "line 1: is not valid YAML"),
        ("[" * 5_000, "is not valid YAML"),
        ("", "has none"),
        ("- shop", "no mapping of names to keys"),
        (f"shop: {hashed(SHOP)}\nother: abc", "entry 2: has no sha256 of 64"),
        (f"'a b': {hashed(SHOP)}", "entry 1: this is no name for a key"),
        (
            f"shop: {{sha256: {hashed(SHOP)}, rate: 3}}",
            "entry 1: has something unknown; allowed: sha256, pairs_per_s",
        ),
        (f"shop: {{sha256: {hashed(SHOP)}, pairs_per_s: 0}}", "entry 1: pairs_per_s is no number above 0"),
        (
            f"shop: {{sha256: {hashed(SHOP)}, pairs_per_s: yes}}",
            "entry 1: pairs_per_s is no number above 0",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, text, says):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError, match=says):
        keys(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shop", "entry 1 is not NAME:KEY"),
        ("a:0123456789abcdef,b:short", "the key of entry 2 has 5 characters"),
        ("0123456789abcdef:shop", "the key of entry 1 has 4 characters"),
    ],
)
def test_a_bad_list_is_refused_and_no_key_is_told(text, says):
    with pytest.raises(KeysError, match=says) as refused:
        Keys({API_KEYS: text})
    assert "0123" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}: shop",
        "{}=: shop",
        "{}: shop\n{}: search",
        "shop: {{{}}}",
        "shop: {{sha256: {}}}",
        "shop: {{pairs_per_s: {}, sha256: " + hashed(SHOP) + "}}",
        "shop: {{{}: sha256}}",
        "shop: *{}",
        "shop: !{}",
    ],
)
def test_a_key_in_the_wrong_place_of_the_file_is_not_shown(keys_file, text):
    gateway = Gateway()
    gateway.service.keys = keys(keys_file)
    replace(keys_file, text.format(CRAWLER, CRAWLER))
    assert gateway.service.keys.refresh()
    assert str(keys_file) in gateway.service.keys.problem
    assert CRAWLER not in gateway.service.keys.problem
    shown = gateway.request("GET", "/readyz")
    assert shown.json()["keys_error"] == gateway.service.keys.problem
    assert CRAWLER not in shown.text


def test_a_list_may_have_blanks():
    assert Keys({API_KEYS: f" shop : {SHOP} ,"}).check(bearer(SHOP)).name == "shop"


def test_a_file_that_becomes_readable_is_read(keys_file, monkeypatch):
    known = keys(keys_file)
    replace(keys_file, f"shop: {hashed('a new key of the shop')}\n")
    with monkeypatch.context() as closed:
        closed.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
        assert known.refresh()
    assert "denied" in known.problem
    # Nothing else of the file changes by it.
    keys_file.chmod(0o640)
    assert known.refresh()
    assert known.problem is None
    assert known.check(bearer("a new key of the shop")).name == "shop"


def test_names_are_unique(keys_file):
    with pytest.raises(KeysError, match="two API keys are called 'shop'"):
        keys(keys_file, **{API_KEYS: f"shop:{SHOP}"})


def test_a_changed_file_rotates_keys_and_a_broken_or_missing_one_changes_nothing(keys_file):
    known = keys(keys_file)
    assert not known.refresh()
    replace(keys_file, f"shop: {hashed('a new key of the shop')}\n")
    assert known.refresh()
    assert known.problem is None
    assert known.check(bearer("a new key of the shop")).name == "shop"
    for old in (SHOP, CRAWLER):
        with pytest.raises(ApiError):
            known.check(bearer(old))
    for broken in ("shop: {", "", "shop: 2025-02-30"):
        replace(keys_file, broken)
        assert known.refresh()
        assert str(keys_file) in known.problem
        assert known.check(bearer("a new key of the shop")).name == "shop"
    keys_file.unlink()
    assert known.refresh()
    assert known.check(bearer("a new key of the shop")).name == "shop"


def test_following_the_file_outlives_whatever_goes_wrong(keys_file, monkeypatch):
    monkeypatch.setattr(deployment, "_REFRESH_EVERY_S", 0.001)
    told = []

    class Gauges:
        def set(self, service):
            told.append(service)
            if len(told) == 1:
                raise RuntimeError("no metrics yet")

    async def follow():
        service = SimpleNamespace(keys=keys(keys_file))
        following = asyncio.create_task(deployment._refresh(service, Gauges()))
        await until(lambda: len(told) > 1, "another look")
        replace(keys_file, f"other: {hashed(SHOP)}\n")
        await until(lambda: [key.name for key in service.keys.known] == ["other"], "the new keys")
        following.cancel()

    asyncio.run(follow())


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_admin_key_may_end_in_a_newline(monkeypatch, ending):
    monkeypatch.setenv(ADMIN_KEY, f"the operators' key{ending}")
    gateway = Gateway()
    for key, status in (("the operators' key", 404), ("another", 401), ("", 401)):
        # 404: there are no rollouts here.
        assert gateway.request("GET", "/v1/rollouts", headers={"Authorization": bearer(key)}).status_code == status
    monkeypatch.setenv(ADMIN_KEY, ending)
    assert gateway.request("GET", "/v1/rollouts", headers={"Authorization": "Bearer "}).status_code == 403


def replace(path, text):
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_rate_is_kept_over_time_and_a_large_call_is_paid_for_afterwards(keys_file):
    known = keys(keys_file)
    crawler = known.check(bearer(CRAWLER))
    known.spend(crawler, 1000)
    for waited_s in (0.0, 7.9):
        known.clock.now = 100.0 + waited_s
        with pytest.raises(ApiError) as refused:
            known.spend(crawler, 1)
        assert (refused.value.status, refused.value.code) == (429, "rate_limited")
        assert "crawler has used up its 100 pairs_per_s" in refused.value.message
        assert refused.value.retry_after_s == (8 if waited_s == 0 else 1)
    known.clock.now = 108.1
    known.spend(crawler, 1)
    # Over a long time no more than the rate passes.
    passed = 0
    for tick in range(1000):
        known.clock.now = 200 + tick / 10
        try:
            known.spend(crawler, 50)
            passed += 50
        except ApiError:
            pass
    assert 100 * 100 <= passed <= 100 * 100 + 300


def test_gateways_share_a_rate(keys_file):
    known = keys(keys_file)
    crawler = known.check(bearer(CRAWLER))
    known.spend(crawler, 50, gateways=4)
    with pytest.raises(ApiError) as refused:
        known.spend(crawler, 1, gateways=4)
    assert refused.value.retry_after_s == 1


def test_keys_without_a_rate_are_not_counted(keys_file):
    known = keys(keys_file)
    for _ in range(100):
        known.spend(known.check(bearer(SHOP)), 10**6)


def test_the_gateway_asks_for_a_key_before_it_reads_the_body(keys_file, monkeypatch):
    monkeypatch.setenv(ADMIN_KEY, "the operators' key")
    gateway = Gateway()
    gateway.service.keys = keys(keys_file)
    body = {"query": "cats", "documents": ["document number 1"]}
    read = []

    async def trickles():
        read.append(True)
        yield b"{"

    for path in posts(gateway):
        refused = gateway.request("POST", path, content=trickles())
        assert refused.status_code == 401, path
        assert refused.json()["error"]["code"] == "unauthorized"
    assert not read
    assert gateway.request("GET", "/v1/models").status_code == 401
    assert gateway.request("GET", "/healthz").status_code == 200
    assert gateway.post("/v1/rerank", body, {"Authorization": bearer(SHOP)}).status_code == 200
    assert gateway.request("GET", "/v1/models", headers={"Authorization": bearer(SHOP)}).status_code == 200


def posts(gateway):
    """All paths that take a POST."""
    found = {route.path for route in gateway.app.routes if "POST" in getattr(route, "methods", ())}
    assert {"/v1/search", "/rerank", "/v1/events", "/v1/rollouts", "/v1/rollouts/{rollout}/{action}"} <= found
    return found


def test_a_key_over_its_rate_gets_429_and_others_go_on(keys_file):
    gateway = Gateway()
    gateway.service.keys = keys(keys_file)
    body = {"query": "cats", "documents": [f"document number {i}" for i in range(20)]}
    answers = [gateway.post("/v1/rerank", body, {"Authorization": bearer(CRAWLER)}) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert gateway.post("/v1/rerank", body, {"Authorization": bearer(SHOP)}).status_code == 200


def test_gateways_share_a_keys_rate(keys_file, monkeypatch):
    gateway = Gateway()
    gateway.service.keys = keys(keys_file)
    gateway.service.application = "gateway"
    running = {("gateway", "Gateway"): 4}
    monkeypatch.setattr(gateway.fleet, "running", lambda app, deployment: running.get((app, deployment)))
    body = {"query": "cats", "documents": [f"document number {i}" for i in range(20)]}
    answers = [gateway.post("/v1/rerank", body, {"Authorization": bearer(CRAWLER)}) for _ in range(4)]
    # A fourth of what two seconds have.
    assert [answer.status_code for answer in answers] == [200] * 3 + [429]


def test_a_new_key_gets_in_by_the_line_that_was_made_for_it(tmp_path):
    key, line = new_key("partner")
    path = tmp_path / "keys.yaml"
    path.write_text(line)
    assert keys(path).check(bearer(key)).name == "partner"
    assert key not in line
    with pytest.raises(KeysError, match="no name for a key"):
        new_key("a b")


@pytest.mark.parametrize("user", ["", "key", "ü"])
def test_a_key_can_be_the_password_of_a_url(keys_file, user):
    given = base64.b64encode(f"{user}:{SHOP}".encode()).decode()
    assert keys(keys_file).check(f"Basic {given}").name == "shop"
    for wrong in (
        given[:-4],
        "%%%",
        base64.b64encode(SHOP.encode()).decode(),
        base64.b64encode(b"\xff:").decode(),
    ):
        with pytest.raises(ApiError):
            keys(keys_file).check(f"Basic {wrong}")
