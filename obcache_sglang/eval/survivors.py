"""The survivor view: a document's text, every token shaded by how many heads kept it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import Arm
from obcache_sglang.eval.results import arm_label


def read_survivors(path: Path) -> list[dict[str, Any]]:
    """The documents of a survivors.json, as the page's script reads them; none where there is no such file.

    Each has title, tokens [str] and views: label, heads (KV heads of a layer) and kept, for each layer a text of one character
    per token, "0" plus the number of heads that kept it: half the size of a list. Raises ConfigError where the numbers do not fit the tokens.
    """
    if not path.is_file():
        return []
    documents: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for number, given in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        title, tokens, heads, kept = given["title"], given["tokens"], given["num_heads"], given["kept"]
        if not kept or any(len(layer) != len(tokens) or not all(0 <= count <= heads for count in layer) for layer in kept):
            raise ConfigError(
                f"{path.name}, entry {number} ({title}): kept must have a count from 0 to {heads} for each of the {len(tokens)} "
                "tokens in every layer. Delete the file and note the survivors again."
            )
        document = documents.setdefault((title, tuple(tokens)), {"title": title, "tokens": tokens, "views": []})
        packed = ["".join(chr(ord("0") + count) for count in layer) for layer in kept]
        document["views"].append({"label": arm_label(Arm(**given["arm"])), "heads": heads, "kept": packed})
    return list(documents.values())


def survivor_section(documents: list[dict[str, Any]]) -> str:
    """HTML of the view with its data and script. documents: of :func:`read_survivors`, at least one."""
    # "<" would let a token end the script element.
    data = json.dumps(documents, separators=(",", ":")).replace("<", "\\u003c")
    return f'{_CONTROLS}<script type="application/json" id="survivor-data">{data}</script><script>{_SCRIPT}</script>'


_CONTROLS = """
<div class="controls">
<label>document <select id="survivor-doc"></select></label>
<label>arm <select id="survivor-arm"></select></label>
<label>layer <select id="survivor-layer"></select></label>
</div>
<p id="survivor-summary" aria-live="polite"></p>
<p id="survivor-legend"></p>
<p id="survivor-token">Point at a token to see how many heads kept it.</p>
<div id="survivor-text"></div>
"""

# The choice stands in the address (#doc=1&arm=0&layer=3), so that a view can be linked to.
_SCRIPT = """
"use strict";
(() => {
  const byId = (id) => document.getElementById("survivor-" + id);
  const documents = JSON.parse(byId("data").textContent);
  const selects = { doc: byId("doc"), arm: byId("arm"), layer: byId("layer") };
  const number = (value) => value.toLocaleString("en");

  function fill(select, labels, wished) {
    select.replaceChildren(...labels.map(([value, label]) => new Option(label, value)));
    select.value = wished;
    if (select.selectedIndex < 0) select.selectedIndex = 0;
    return select.value;
  }

  function shade(element, count, heads) {
    element.dataset.kept = count;
    element.className = count ? "kept" : "dropped";
    element.style.setProperty("--share", Math.sqrt(count / heads).toFixed(3));
  }

  function swatch(count, heads) {
    const element = document.createElement("span");
    shade(element, count, heads);
    element.textContent = " " + number(count) + " ";
    return element;
  }

  function render(wish) {
    const listed = (items, label) => items.map((item, i) => [i, label(item, i)]);
    const doc = documents[fill(selects.doc, listed(documents, (d) => d.title), wish.get("doc"))];
    const view = doc.views[fill(selects.arm, listed(doc.views, (v) => v.label), wish.get("arm"))];
    const layers = [["all", "all " + view.kept.length], ...listed(view.kept, (row, i) => "layer " + i)];
    const layer = fill(selects.layer, layers, wish.get("layer"));

    const chosen = layer === "all" ? view.kept : [view.kept[layer]];
    const heads = view.heads * chosen.length;
    const counts = doc.tokens.map((_, i) => chosen.reduce((sum, row) => sum + row.charCodeAt(i) - 48, 0));
    const pairs = counts.reduce((sum, count) => sum + count, 0);
    const lost = counts.filter((count) => count === 0).length;
    byId("summary").textContent =
      `${number(pairs)} of ${number(heads * counts.length)} KV pairs kept ` +
      `(${(100 * pairs / (heads * counts.length)).toFixed(1)} %); ` +
      `${number(lost)} of ${number(counts.length)} tokens kept by no head.`;

    const steps = [...new Set([0, 0.1, 0.25, 0.5, 1].map((share) => Math.round(share * heads)))];
    byId("legend").replaceChildren("heads that kept a token: ", ...steps.flatMap((count) => [swatch(count, heads), " "]),
      " (\\u21b5: a line break of the document)");

    byId("text").replaceChildren(...doc.tokens.map((token, i) => {
      const element = document.createElement("span");
      shade(element, counts[i], heads);
      element.textContent = token.replaceAll("\\n", "\\u21b5\\n");
      element.title = `token ${i}: kept by ${counts[i]} of ${heads} heads`;
      return element;
    }));
  }

  for (const select of Object.values(selects)) {
    select.addEventListener("change", () => {
      const wish = new URLSearchParams(Object.entries(selects).map(([name, each]) => [name, each.value]));
      history.replaceState(null, "", "#" + wish);
      render(wish);
    });
  }
  byId("text").addEventListener("pointerover", (event) => {
    if (event.target.title) byId("token").textContent = JSON.stringify(event.target.textContent) + ", " + event.target.title;
  });
  const fromAddress = () => render(new URLSearchParams(location.hash.slice(1)));
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
"""
