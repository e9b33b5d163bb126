"""Style and script of the report page; the page carries both, and loads nothing else."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5f6368; --line: #d9d9de;
  --page: #ffffff; --card: #f6f6f8; --good: #00694d; --bad: #b04500; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a2a6ad; --line: #3c3d42;
  --page: #17181a; --card: #222327; --good: #4fd1a5; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; }
figure p, .soft, caption { color: var(--soft); }
figure p { margin: .1rem 0 .5rem; font-size: .9rem; }
.number { white-space: nowrap; }
.lead { font-size: 1.1rem; }
.note { background: var(--card); border-left: .25rem solid var(--bad); padding: .6rem .9rem; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.plot { min-height: 20rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-size: .9rem; }
th, td { text-align: left; padding: .45rem .8rem .45rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .9rem; overflow-wrap: normal; }
tbody th { font-weight: 600; }
pre { background: var(--card); padding: .8rem 1rem; overflow-x: auto; border-radius: .4rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
@media (max-width: 40rem) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  th, td { display: block; border: 0; padding: .1rem 0; }
  td[data-label]:not(:empty)::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media print { .plot { break-inside: avoid; } }
"""

SCRIPT = """
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const looks = read("looks");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const draw = (box) => {
    const figure = read(box.dataset.figure);
    const layout = { ...figure.layout, template: looks[dark.matches ? "dark" : "light"] };
    if (narrow.matches) {
      layout.margin = { ...layout.margin, l: 44, r: 6 };
    }
    Plotly.react(box, figure.data, layout, config);
  };
  const all = () => document.querySelectorAll(".plot").forEach(draw);
  dark.addEventListener("change", all);
  narrow.addEventListener("change", all);
  all();
})();
"""
