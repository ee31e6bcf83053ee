"""The status page, in a browser without a screen: it shows what the engine does, and nothing that is secret."""

import shutil
import time

import httpx
import pytest
from live_server import served

import llmkernels
from llmkernels.engine import LLM
from llmkernels.server.app import create_app

KEY, SECRET = "key", "xyzzy-plugh"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def url():
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", page_size=4, kv_cache_pages=300, max_length=512)
    step = llm.step

    def slowly():
        time.sleep(0.005)  # or an answer is over before anybody looks
        return step()

    llm.step = slowly
    with served(create_app(llm, "manual", api_key=KEY)) as url:
        yield url


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not CHROMIUM:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_data_are_behind_the_key_and_hold_no_text(url, http):
    assert httpx.get(f"{url}/status").status_code == 401
    page = httpx.get(url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    body = {"prompt": f"{SECRET} is a word that nobody else says", "ignore_eos": True, "stream": True}
    body |= {"max_tokens": 300, "n": 4}  # long enough to be seen
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # held: when it is forgotten, the connection closes
        next(lines)
        told = http.get("/status")
    status = told.json()
    assert "xyzzy" not in told.text
    request = status["requests"][0]
    assert request["state"] == "runs"
    assert (request["limit"], status["running"], status["page_size"], status["pages"]) == (300, 4, 4, 300)
    assert request["computed"] + 1 >= request["prompt"]
    assert len(status["cells"]) == 300
    in_use = sum(cell > 0 for cell in status["cells"])
    assert in_use * 4 >= request["computed"]
    assert sum(pages for _, pages, _ in status["tree"]) == status["tree_pages"]
    assert status["generated"] >= status["next_count"] >= 0
    assert status["problem"] is None


def test_a_fork_shares_pages_and_the_tree_shows_it(http):
    prompt = "one prompt, two answers: " * 6
    for tail in ("alpha", "beta", "gamma"):
        http.post("/v1/completions", json={"prompt": prompt + tail, "max_tokens": 4})
    tree = http.get("/status").json()["tree"]
    trunk = max(range(len(tree)), key=lambda run: tree[run][1])
    assert sum(parent == trunk for parent, _, _ in tree) >= 2
    assert all(parent < number for number, (parent, _, _) in enumerate(tree))
    with http.stream("POST", "/v1/completions", json={"prompt": prompt, "n": 4, "max_tokens": 99, "stream": True}) as s:
        lines = s.iter_lines()
        next(lines)
        assert max(http.get("/status").json()["cells"]) == 4


def until(page, condition):
    """The page's own policy forbids wait_for_function, which evaluates text in it."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"{condition} never came true"
        time.sleep(0.1)


def test_a_browser_shows_it(browser, url, http):
    page = browser.new_page(color_scheme="dark")
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("form.on")
    page.fill("#key", KEY)
    page.click("button")
    body = {"prompt": "What is shown", "max_tokens": 400, "ignore_eos": True, "n": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        until(page, "document.querySelectorAll('#rows tr').length === 3")
        assert page.inner_text("#name") == "manual"
        assert page.inner_text("#queue").startswith("3 run, 0 wait")
        until(page, "parseFloat(document.querySelector('#rate').textContent.replace(',', '')) > 0")
    until(page, "document.querySelectorAll('#rows tr').length === 0")
    status = http.get("/status").json()
    until(page, f"document.querySelector('#n-idle').textContent === '{status['cells'].count(-1)}'")
    shades = """id => {
      const node = document.getElementById(id), all = node.getContext("2d").getImageData(0, 0, node.width, node.height);
      return new Set(new Uint32Array(all.data.buffer)).size;
    }"""
    assert all(page.evaluate(shades, picture) > 2 for picture in ("rates", "nexts", "pages", "tree"))
    assert "pages empty" in page.get_attribute("#pages", "aria-label")
    assert page.inner_text("#sum") == "every page accounted for"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 22)"
    assert not wrong
    assert all(address.startswith((url, "data:")) for address in asked)
    page.close()


def test_nobody_asks_while_the_page_is_hidden(browser, url):
    context = browser.new_context()
    context.add_init_script("Object.defineProperty(document, 'hidden', {get: () => true})")
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    time.sleep(2.5)
    assert not [address for address in asked if address.endswith("/status")]
    context.close()
