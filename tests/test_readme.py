"""The README's Python, run in order in one namespace, as a reader would."""

import re
from pathlib import Path

import given_times

README = Path(__file__).resolve().parent.parent / "README.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_python_snippets(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    snippets = list(FENCE.finditer(text))
    assert snippets, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    given_times.keep_in(monkeypatch, tmp_path)
    given_times.prefer(monkeypatch)
    namespace = {"__name__": "readme"}
    for snippet in snippets:
        # As many lines before it as in the README: a traceback then points there.
        above = text.count("\n", 0, snippet.start(1)) * "\n"
        exec(compile(above + snippet[1], str(README), "exec"), namespace)
