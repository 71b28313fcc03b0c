"""Text that would run, load, link or reorder something where it is taken for markup, and what it would leave behind."""

import html
import json
import time
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from .browser import Page
from .models import SPECIAL, TEMPLATE, save_tiny

HOST = "evil.example"
IMAGE = "<img src=x onerror=owned=1>"
REMOTE = f"<img src=http://{HOST}/i.png onerror=owned=1>"
SCRIPT = "</script><script>owned=1</script>"
LINK = f'<a href="http://{HOST}/">t</a>'
RUN_LINK = '<a href="javascript:owned=1">j</a>'
PICTURE = f"![x](http://{HOST}/m.png)"
MATH = "$$x^2$$"
BIDI, BELL = "\u202e", "\x07"
MARKUP = (
    IMAGE,
    REMOTE,
    SCRIPT,
    LINK,
    RUN_LINK,
    PICTURE,
    MATH,
    "<b>b</b>",
    "<br>",
    "<sup>s</sup>",
    "%{x}",
    "&lt;",
    "\"'",
)
TOKENS = (
    '<img/src="x"onerror="owned=1">CircuitsVis.render(owned=1)//"circuits-vis-x"',
    LINK,
    SCRIPT,
)
"""In the places of `SPECIAL`: two of them stand behind every instruction. Views of circuitsvis make spaces something
else, so that the tags of these have none."""
TEMPLATE_TEXT = "<sup>s</sup>&lt;"
FOLDER = f"{IMAGE}{BIDI}{MATH}&lt;"

_FOREIGN = """[...document.querySelectorAll('*')].filter(e => {
  const tag = e.tagName.toLowerCase(), where = ['href', 'xlink:href', 'src', 'action'].map(n => e.getAttribute(n));
  return ['img', 'iframe', 'object', 'embed', 'video', 'audio', 'link', 'base', 'b', 'sup'].includes(tag)
    || (tag === 'script' && e.textContent.trim().startsWith('owned'))
    || (tag === 'a' && where.some(to => to && !/^(#|[\\w./-]+html$)/.test(to)))
    || where.some(to => to && /evil|owned|javascript/.test(to))
    || [...e.attributes].some(a => a.name.startsWith('on'))
}).map(e => e.outerHTML.slice(0, 80))"""
_TEXT = """(() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  const isSeen = node => !['SCRIPT', 'STYLE'].includes(node.parentElement.tagName);
  while (walk.nextNode()) if (isSeen(walk.currentNode)) found.push(walk.currentNode.data);
  return found.join('');
})()"""
_HOVER = """(() => {
  const seen = [], done = new Set();
  for (const plot of document.querySelectorAll('.js-plotly-plot')) for (let k = 0; k < plot.data.length; k++) {
    const full = plot._fullData[k], panel = full.xaxis + full.yaxis;
    const at = full.type === 'heatmap' ? {xval: 0, yval: 0} : [{curveNumber: k, pointNumber: 0}];
    const what = [full.name, full.hovertemplate].join();
    if (full.hoverinfo === 'skip' || done.has(what)) continue;
    done.add(what);
    Plotly.Fx.hover(plot, at, panel);
    const drawn = plot.querySelector('.hoverlayer');
    seen.push(drawn.textContent);
    if (drawn.querySelector('a')) seen.push('A LINK');
    Plotly.Fx.unhover(plot);
  }
  return seen;
})()"""


def save_hostile(folder: Path) -> Path:
    """A tiny llama whose folder, tokens and template are hostile."""
    path = save_tiny("llama", folder / FOLDER)
    for file in path.glob("tokenizer*.json"):
        text = file.read_text("utf-8")
        for old, new in zip(SPECIAL, TOKENS, strict=True):
            text = text.replace(json.dumps(old), json.dumps(new))
        file.write_text(text, "utf-8")
    template = TEMPLATE.replace("{{ m['role'] }}", "{{ m['role'] }}" + TEMPLATE_TEXT)
    for old, new in zip(SPECIAL, TOKENS, strict=True):
        template = template.replace(old, new)
    (path / "chat_template.jinja").write_text(template, "utf-8")
    return path


def seen(page: Page) -> str:
    """The text of a page as it is seen, with what hovering over the first point of each trace shows."""
    text = page.evaluate(_TEXT) + "\n".join(page.evaluate(_HOVER))
    return text.replace("\u2060", "").replace("\u200b", "").replace("\xa0", " ")


def foreign(page: Page, *, wait_s: float = 0.0) -> list[str]:
    """The elements of a page that its maker did not put there, and what ran; a picture takes a while to fail."""
    deadline = time.monotonic() + wait_s
    while not (ran := page.evaluate("typeof owned !== 'undefined'")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [*page.evaluate(_FOREIGN), *(["A SCRIPT RAN"] if ran else [])]


def unescaped(figure: go.Figure) -> go.Figure:
    """The same figure as it would be if nothing had been escaped."""

    def undo(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: undo(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [undo(entry) for entry in value]
        return html.unescape(value) if isinstance(value, str) else value

    return go.Figure(undo(json.loads(figure.to_json())))
