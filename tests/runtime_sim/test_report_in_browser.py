"""The HTML report in a real browser: everything fits the window and no text is cut off or written over other
text.  Skipped where there is no Chromium.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.browser import BROWSER
from tyir.runtime_sim.report.html import html_report
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.summary import summarize

# Appended to a copy of the page: what sticks out of the window or its drawing, and pairs of labels of one
# drawing that overlap.
PROBE = """<pre id='found'></pre><script>
const out = [], label = e => e.textContent.trim().slice(0, 40), width = document.documentElement.clientWidth;
for (const e of document.querySelectorAll('h1,h2,h3,p,table,svg,.card')) if (e.getBoundingClientRect().right > width + 1) out.push('wide: ' + label(e));
for (const svg of document.querySelectorAll('svg')) {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
  for (const [t, r] of texts) if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 2 || r.bottom > frame.bottom + 3) out.push('cut off: ' + label(t));
  texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, q]) => {
    const w = Math.min(r.right, q.right) - Math.max(r.left, q.left), h = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
    if (w > 3 && h > 5) out.push('overlap: ' + label(a) + ' / ' + label(b));
  }));
}
document.getElementById('found').textContent = JSON.stringify({out, svgs: document.querySelectorAll('svg').length, width});
</script>"""  # noqa: E501


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look with")
@pytest.mark.parametrize("dies", [1, 3])
def test_nothing_is_cut_off_or_overlaps(make_model: Callable[..., Any], tmp_path: Path, dies: int) -> None:
    models = {n: make_model(tokens=n, group=16, dies=dies, layers=6) for n in (1, 8)}
    predictor = Predictor(lambda s: models[s].programs, (1, 8), 40, models[1].machine)
    summary = summarize(predictor, "out/a-folder-with-a-rather-long-name/4die", 12, 12, tornado=True)
    page = tmp_path / "page.html"
    page.write_text(html_report(summary, predictor).replace("</body>", PROBE + "</body>"))
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,900",
        "--dump-dom",
    ]
    done = subprocess.run(
        [str(BROWSER), *arguments, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    match = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    found = json.loads(unescape(match[1]))
    assert found["out"] == [] and found["svgs"] >= 9 and found["width"] >= 1200
