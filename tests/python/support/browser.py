"""Opens a page in headless Chromium, runs a script in it and returns what the script found."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Before anything else in the page: collects what goes wrong.
_WATCH = """
window.problems = [];
addEventListener("error", (event) => problems.push("error: " + event.message), true);
addEventListener("unhandledrejection", (event) => problems.push("rejected: " + event.reason));
document.addEventListener("securitypolicyviolation",
  (event) => problems.push("policy: " + event.violatedDirective + " " + event.blockedURI));
for (const kind of ["error", "warn"]) {
  const own = console[kind];
  console[kind] = (...values) => { problems.push(kind + ": " + values.join(" ")); own(...values); };
}
"""

# After everything else: `found` is what the test's script returned.
_RUN = """
(async () => {
  const pause = (ms = 300) => new Promise((done) => setTimeout(done, ms));
  const $ = (selector) => document.querySelector(selector);
  const $$ = (selector) => [...document.querySelectorAll(selector)];
  const key = (element, name) => element.dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  let found = null;
  try { await pause(); found = await (async () => { %s })(); }
  catch (error) { problems.push("script: " + error.stack); }
  const loaded = performance.getEntriesByType("resource").map((one) => one.name);
  const outcome = document.createElement("pre");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify({ found, problems, loaded });
  document.body.append(outcome);
})();
"""


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _with_script(page: str, script: str, place: int) -> str:
    """The page with a script of the test's own, which its security policy allows."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page[:place] + f"<script>{script}</script>" + page[place:]
    return page.replace("script-src ", f"script-src &#39;sha256-{digest}&#39; ", 1)


def browse(page: str, script: str, folder: Path, *, width: int = 1200) -> dict[str, Any]:
    """What ``script``, the body of an async function, returns: ``found``; ``problems`` of the page
    (errors and warnings of the console, breaches of the policy), and what it ``loaded``.

    Skips the test without Chromium.
    """
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"there is no Chromium here (looked for {', '.join(NAMES)})")
    page = _with_script(page, _RUN % script, page.rindex("</body>"))
    page = _with_script(page, _WATCH, page.index("<title>"))
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome, done.stderr[-2000:]
    return json.loads(html.unescape(outcome[1]))
